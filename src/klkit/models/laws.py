"""The laws of the model contract, as checks that any adapter runs on itself.

Strings are drawn from the model one at a time, by stepping; that is the reference. Every other way
of asking for the same log-probabilities must then give the same answer: teacher forcing, other
batches, other padding, rows that leave the batch. An adapter that passes can be measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from klkit import rng
from klkit.models.base import LanguageModel, head_of, read_logits
from klkit.sequences import Content, Sequences

AGREEMENT = {torch.float64: 1e-9, torch.float32: 5e-4, torch.float16: 0.05, torch.bfloat16: 0.3}
"""Largest ``|a − b| / (1 + |a|)`` between two routes to one log-probability, by the model's precision.

Rounding differs between batch shapes; a genuine mistake (a shift, a leak) is orders of magnitude above."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Whether one law holds.

    Attributes:
        law: what must be true.
        holds: whether it is.
        detail: the largest deviation and its limit, or what was found instead.
    """

    law: str
    holds: bool
    detail: str

    def __str__(self) -> str:
        return f"{'holds' if self.holds else 'BROKEN'}: {self.law} ({self.detail})"


@dataclass(frozen=True, slots=True)
class Drawn:
    """Strings and the log-probabilities met while drawing each by itself."""

    x: Sequences
    rows: Float[Tensor, "m v"]


def check_laws(
    model: LanguageModel,
    prompts: Sequence[Content | None] = (None,),
    *,
    max_tokens: int = 8,
    strings: int = 6,
    seed: int = 0,
    strict: bool = True,
) -> list[Outcome]:
    """Check that ``model`` keeps the contract of :class:`klkit.models.base.LanguageModel`.

    Args:
        prompts: what to continue; contexts of several lengths are made from them in any case.
        max_tokens: longest completion to try.
        strings: how many strings to draw.
        strict: raise when a law is broken, rather than only report it.

    Raises:
        AssertionError: a law is broken (unless ``strict=False``).
        ValueError: the strings would not fit the model's window.

    Example:
        >>> from klkit.models.automaton import coin
        >>> outcomes = check_laws(coin(end=0.5))
        >>> len(outcomes), all(outcome.holds for outcome in outcomes)
        (11, True)
    """
    with torch.no_grad():
        outcomes = list(_vocabulary_laws(model, prompts))
        if all(outcome.holds for outcome in outcomes):
            outcomes += _string_laws(model, prompts, max_tokens, strings, seed)
    broken = [str(outcome) for outcome in outcomes if not outcome.holds]
    if strict and broken:
        raise AssertionError(
            f"expected {model.name} to keep the laws of a language model, got {len(broken)} broken; correct the "
            f"adapter before measuring with it:\n" + "\n".join(broken)
        )
    return outcomes


def _vocabulary_laws(model: LanguageModel, prompts: Sequence[Content | None]) -> Iterator[Outcome]:
    size, ends = model.vocabulary.size, model.vocabulary.ends
    valid = bool(ends) and len(set(ends)) == len(ends) and all(0 <= end < size for end in ends)
    yield Outcome("end tokens are ids of the vocabulary", valid, f"ends {ends}, size {size}")
    if not valid:
        return
    contexts = [model.context(prompt) for prompt in (None, *prompts)]
    again = [model.context(prompt) for prompt in (None, *prompts)]
    good = all(
        c.ndim == 1 and c.dtype == torch.long and len(c) > 0 and 0 <= int(c.min()) <= int(c.max()) < size
        for c in contexts
    )
    yield Outcome("every prompt has a context of one id or more", good, f"lengths {[c.numel() for c in contexts]}")
    same = all(torch.equal(a, b) for a, b in zip(contexts, again, strict=True))
    yield Outcome("a prompt always has the same context", same, "asked twice")
    asked = contexts[0].tolist() if good else []
    pieces = model.pieces(asked)
    yield Outcome("every token has one piece of text", len(pieces) == len(asked), f"{len(pieces)} for {len(asked)}")
    table = model.embedding()
    found = "none" if table is None else f"shape {tuple(table.shape)}, size {size}"
    whole = table is None or (table.ndim == 2 and len(table) == size and bool(table.isfinite().all()))
    yield Outcome("the embedding has one finite vector a token", whole, found)


def _string_laws(
    model: LanguageModel, prompts: Sequence[Content | None], max_tokens: int, strings: int, seed: int
) -> Iterator[Outcome]:
    drawn = _draw(model, prompts, max_tokens, strings, seed)
    x, limit = drawn.x, AGREEMENT[model.dtype]
    total = drawn.rows.logsumexp(-1).abs().nan_to_num(nan=math.inf, posinf=math.inf).max()
    tolerance = limit if model.dtype == torch.float64 else 1e-4  # the read-out is never below fp32
    yield Outcome(
        "log-probabilities sum to one in every row",
        bool(total <= tolerance) and drawn.rows.shape[-1] == model.vocabulary.size,
        f"{float(total):.2g} nats off, limit {tolerance:.2g}; {drawn.rows.shape[-1]} columns",
    )

    def compare(law: str, rows: Tensor, reference: Tensor = drawn.rows) -> Outcome:
        worst = deviation(rows, reference)
        return Outcome(law, worst <= limit, f"deviation {worst:.2g}, limit {limit:.2g}")

    alone = [model.encode(x.select([i])) for i in range(len(x))]
    width = {h.shape[-1] for h in alone}
    forced = torch.cat([_read(model, h) for h in alone])
    outcome = compare("teacher forcing agrees with stepping", forced)
    yield Outcome(outcome.law, outcome.holds and width == {model.width}, f"{outcome.detail}; width {sorted(width)}")

    backwards = list(reversed(range(len(x))))
    together, turned = _read(model, model.encode(x)), _read(model, model.encode(x.select(backwards)))
    turned = torch.cat(torch.split(turned, x.lengths[backwards].tolist())[::-1])
    yield compare("a string's rows do not depend on its batch", torch.cat([together, turned]), drawn.rows.repeat(2, 1))

    generator = rng.stream(seed, "laws", "padding")
    noise = torch.randint(model.vocabulary.size, (len(x), x.tokens.shape[1] + 3), generator=generator)
    if model.window is not None:
        noise = noise[:, : max(model.window, x.tokens.shape[1])]
    inside = torch.arange(noise.shape[1]) < x.stop[:, None]
    padded = torch.nn.functional.pad(x.tokens, (0, noise.shape[1] - x.tokens.shape[1]))
    noisy = Sequences(padded.where(inside, noise), x.start, x.stop, x.prompt, x.cluster, x.finished)
    yield compare("what stands in the padding is ignored", _read(model, model.encode(noisy)))

    yield compare("stepping strings together agrees with stepping each alone", _step_together(model, x))

    hidden = model.encode(x)
    single = torch.cat([_read(model, hidden[i : i + 1]) for i in range(len(hidden))])
    yield compare("the read-out works row by row", single, _read(model, hidden))

    if head_of(model) is not None:
        logits = torch.cat([chunk.double().log_softmax(-1).cpu() for chunk in read_logits(model, hidden, rows=3)])
        yield compare("logits of the output head normalise to the read-out", logits, _read(model, hidden))


def deviation(rows: Float[Tensor, "m v"], reference: Float[Tensor, "k w"]) -> float:
    """Largest ``|a − b| / (1 + |b|)``; infinite for unlike shapes, or where only one is ``-inf`` or NaN.

    Example:
        >>> import torch
        >>> deviation(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[1.0, -torch.inf]]))
        0.5
    """
    if rows.shape != reference.shape:
        return math.inf
    gap = ((rows - reference).abs() / (1 + reference.abs())).masked_fill(rows == reference, 0.0)
    return float(gap.nan_to_num(nan=math.inf, posinf=math.inf).max())


def _draw(model: LanguageModel, prompts: Sequence[Content | None], max_tokens: int, strings: int, seed: int) -> Drawn:
    """Draw strings one at a time; the first tokens of some become part of their contexts."""
    contexts, completions, rows, finished = [], [], [], []
    for i in range(strings):
        context = model.context(prompts[i % len(prompts)])
        shift, length = i % 3, 1 + (i * 5 + max_tokens - 1) % max_tokens
        if model.window is not None and len(context) + shift + length > model.window:
            raise ValueError(
                f"expected contexts and completions within the window of {model.window} tokens, got "
                f"{len(context)} + {shift + length}; use shorter prompts or a smaller max_tokens"
            )
        generator = rng.stream(seed, "laws", i)
        tokens: list[int] = []
        met: list[Tensor] = []
        state, hidden = model.begin([context])
        while True:
            met.append(_read(model, hidden))
            # Masses, not logits: also a read-out that does not normalise must get as far as its verdict.
            mass = met[-1][0].exp().nan_to_num(nan=0.0, posinf=0.0) + 1e-300
            tokens.append(int(torch.multinomial(mass, 1, generator=generator)))
            if tokens[-1] in model.vocabulary.ends or len(tokens) == shift + length:
                break
            state, hidden = model.advance(state, torch.tensor(tokens[-1:]))
        shift = min(shift, len(tokens) - 1)
        contexts.append(torch.cat([context, torch.tensor(tokens[:shift], dtype=torch.long)]))
        completions.append(torch.tensor(tokens[shift:]))
        finished.append(tokens[-1] in model.vocabulary.ends)
        rows += met[shift:]
    return Drawn(Sequences.pack(contexts, completions, finished=finished), torch.cat(rows))


def _step_together(model: LanguageModel, x: Sequences) -> Float[Tensor, "m v"]:
    """Step all strings in one batch that is turned round at every step and that finished ones leave."""
    live = list(range(len(x)))
    state, hidden = model.begin([x.context(i) for i in live])
    found: dict[tuple[int, int], Tensor] = {}
    step = 0
    while True:
        for i, row in zip(live, _read(model, hidden), strict=True):
            found[i, step] = row
        step += 1
        keep = [place for place, i in enumerate(live) if int(x.lengths[i]) > step][::-1]
        if not keep:
            return torch.stack([found[key] for key in sorted(found)])
        live = [live[place] for place in keep]
        state = model.select(state, torch.tensor(keep))
        state, hidden = model.advance(state, torch.stack([x.completion(i)[step - 1] for i in live]))


def _read(model: LanguageModel, hidden: Tensor) -> Tensor:
    return model.readout(hidden).double().cpu()
