"""What is kept of a next-token law: the vector it is read from, its likeliest tokens, or draws from it.

kind       kept for each decision                                   what can be had from it
hidden     the vector before the output head, in its own format     the law itself, up to the rounding of a product
top-k      k ids, their log-probabilities, that of all others       a lower bound of every f-divergence
sampled    the different ones among so many draws, with counts      anything linear in the law, without bias
hybrid     k ids and draws from the others, log-probabilities of    the divergence of any q from it without bias, next
           all, and entropy, variance, probability of ending        to exact; the bound of top-k; anything linear
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from klkit.divergences.fused import end_coin
from klkit.divergences.linear import Head
from klkit.divergences.partial import Hidden, Hybrid, Sampled, Scalars, TopK
from klkit.models.base import LanguageModel, head_of, read_rows
from klkit.numerics import FLOOR, log_softmax
from klkit.rng import stream
from klkit.sequences import Sequences

HIDDEN, TOP_K, SAMPLED, HYBRID = "hidden", "top-k", "sampled", "hybrid"
KINDS = (HIDDEN, TOP_K, SAMPLED, HYBRID)
MOST_DRAWS = 32767
HEAD_MASS = 0.5  # mass of a head whose coverage is counted

Law = Hidden | TopK | Sampled | Hybrid


@dataclass(frozen=True, slots=True)
class Recording:
    """How laws are recorded.

    Attributes:
        kind: ``hidden``, ``top-k``, ``sampled`` or ``hybrid``.
        k: likeliest tokens that are kept of a law (top-k, hybrid).
        draws: draws from a law (sampled), or from its other tokens (hybrid), with replacement.
        temperature: at which the law is taken (top-k): one of which a part is known cannot be tempered later.
        seed: names the draws (sampled, hybrid).

    Raises:
        ValueError: the kind is unknown, or a number is out of range.

    Example:
        >>> Recording("top-k", k=8).options()
        {'kind': 'top-k', 'k': 8, 'temperature': 1.0}
    """

    kind: str = HIDDEN
    k: int = 64
    draws: int = 64
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"expected a kind among {', '.join(KINDS)}, got {self.kind!r}; choose one of them")
        if self.k < 1 or not 1 <= self.draws <= MOST_DRAWS:
            raise ValueError(
                f"expected k of at least 1 and 1..{MOST_DRAWS} draws, got {self.k} and {self.draws}; 64 is usual"
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"expected a positive finite temperature, got {self.temperature}; 1 is the law itself")
        if self.kind != TOP_K and self.temperature != 1.0:
            why = "vectors can be read at any" if self.kind == HIDDEN else "draws stand for the law itself"
            raise ValueError(
                f"expected a temperature with the kind top-k only, got {self.temperature:g} with {self.kind}; leave it "
                f"out: {why}"
            )

    def options(self) -> dict[str, Any]:
        """What matters for this kind, as JSON has it."""
        matter = {
            HIDDEN: ("kind",),
            TOP_K: ("kind", "k", "temperature"),
            SAMPLED: ("kind", "draws", "seed"),
            HYBRID: ("kind", "k", "draws", "seed"),
        }
        return {name: value for name, value in asdict(self).items() if name in matter[self.kind]}


@dataclass(frozen=True, slots=True)
class Coverage:
    """What was kept, added up over decisions.

    Attributes:
        decisions: how many.
        mass: probability of the tokens that were kept.
        heads: decisions at which these have at least half of it.
        different: tokens that were kept.
        entropy: of the laws, nats.
        unused: largest probability of rows that no tokenizer names, at one decision.
    """

    decisions: int = 0
    mass: float = 0.0
    heads: int = 0
    different: int = 0
    entropy: float = 0.0
    unused: float = 0.0

    def __add__(self, other: Coverage) -> Coverage:
        """Both together."""
        sums = {name: value + getattr(other, name) for name, value in asdict(self).items()}
        return Coverage(**{**sums, "unused": max(self.unused, other.unused)})

    def summary(self, kind: str) -> dict[str, float]:
        """Means over decisions, for people."""
        count = max(self.decisions, 1)
        found = {"mean_entropy": self.entropy / count, "largest_unused_mass": self.unused}
        if kind in (TOP_K, HYBRID):
            return {"mean_mass": self.mass / count, "heads_covered": self.heads / count, **found}
        return {"mean_different_tokens": self.different / count, **found} if kind == SAMPLED else {}


def require_recordable(model: LanguageModel, recording: Recording) -> None:
    """Refuse a kind that this model cannot be recorded in.

    Raises:
        ValueError: vectors are asked for and the way from them to logits is no linear map, or ``k`` exceeds the
            vocabulary.
    """
    size = model.vocabulary.size
    if recording.kind == HIDDEN and head_of(model) is None:
        raise ValueError(
            f"expected a model whose logits are a linear map of hidden states for the kind hidden, got {model.name}, "
            f"whose are not; use --kind top-k, sampled or hybrid"
        )
    if recording.kind in (TOP_K, HYBRID) and recording.k > size:
        raise ValueError(f"expected k of at most {size}, the vocabulary of {model.name}, got {recording.k}; lower it")


def record(
    model: LanguageModel,
    hidden: Float[Tensor, "m d"],
    recording: Recording,
    strings: Sequences,
    *,
    size: int,
    examples: Int[Tensor, " n"],
) -> tuple[dict[str, Tensor], Coverage]:
    """What is kept of the laws that trunk vectors stand for, and what that covers.

    Args:
        strings: whose decisions these are.
        size: ids that the laws are taken over: later ones are left out of the softmax.
        examples: global index of each string, which names its draws.
    """
    if recording.kind == HIDDEN:
        return {"hidden": hidden.cpu().contiguous()}, Coverage(decisions=len(hidden))
    drawn = recording.kind in (SAMPLED, HYBRID)
    each = zip(examples.tolist(), strings.lengths.tolist(), strict=True) if drawn else ()
    none = torch.empty(0, recording.draws, dtype=torch.float64)
    uniform = torch.cat([none, *(_uniform(recording, example, length) for example, length in each)])
    tokens, ends = strings.targets(), model.vocabulary.ends
    parts: list[dict[str, Tensor]] = []
    coverage = Coverage()
    start = 0
    for whole in read_rows(model, hidden):
        logp = whole if size == whole.shape[1] else log_softmax(whole[:, :size])
        if recording.temperature != 1.0:
            logp = log_softmax(logp / recording.temperature)
        rows = slice(start, start + len(logp))
        if recording.kind == TOP_K:
            kept, known = _likeliest(logp, recording.k)
        elif recording.kind == SAMPLED:
            kept, known = _drawn(logp, uniform[rows])
        else:
            kept, known = _both(logp, recording.k, uniform[rows], tokens[rows], ends)
        parts.append(kept)
        # 0 · -inf is the limit 0; a finite stand-in for the logarithm keeps a large row from a second pass.
        entropy = -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)
        coverage += Coverage(
            decisions=len(logp),
            mass=float(known.sum()),
            heads=int((known >= HEAD_MASS).sum()),
            different=int(kept["ids"].numel()),
            entropy=float(entropy.double().sum()),
            unused=float(whole[:, named(model) :].exp().sum(-1).max()) if len(whole) else 0.0,
        )
        start = rows.stop
    if not parts:
        parts = [_nothing(recording)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}, coverage


def law(
    kind: str, tensors: Mapping[str, Tensor], *, head: Head | None, temperature: float, size: int | None = None
) -> Law:
    """The laws over ``size`` ids that were recorded as ``tensors``; of draws that coincide, each id comes once."""
    if kind == HIDDEN:
        assert head is not None
        return Hidden(tensors["hidden"], head)
    if kind == TOP_K:
        return TopK(tensors["ids"].long(), tensors["logp"], tensors["rest"], temperature)
    if kind == HYBRID:
        return Hybrid(
            tensors["ids"].long(),
            tensors["logp"],
            tensors["rest"],
            tensors["draws"].long(),
            tensors["logp_draws"],
            tensors["whole"],
            size,
            Scalars(*(tensors[name] for name in ("text", "entropy", "variance", "coin"))),
        )
    unique = tensors["unique"].long()
    width = max(1, int(unique.max())) if len(unique) else 1
    inside = torch.arange(width) < unique[:, None]
    tokens = torch.zeros(inside.shape, dtype=torch.long).masked_scatter_(inside, tensors["ids"].long())
    counts = torch.zeros(inside.shape).masked_scatter_(inside, tensors["counts"].float())
    return Sampled(tokens, counts / counts.sum(-1, keepdim=True))


def named(model: LanguageModel) -> int:
    """Ids up to the last one that the tokenizer names; later rows of a table are padding."""
    tokens = model.vocabulary.tokens
    return next((i + 1 for i in reversed(range(len(tokens))) if tokens[i] is not None), len(tokens))


def _likeliest(logp: Float[Tensor, "c v"], k: int) -> tuple[dict[str, Tensor], Float[Tensor, " c"]]:
    best = logp.topk(k, dim=-1)
    # Summed from what is in it: one minus the others would lose it in rounding.
    others = logp.scatter(-1, best.indices, -torch.inf)
    rest = others.logsumexp(-1) if k < logp.shape[1] else torch.full_like(logp[:, 0], -torch.inf)
    kept = {
        "ids": best.indices.to(torch.int32).cpu(),
        "logp": best.values.float().cpu(),
        "rest": rest.float().cpu(),
    }
    return kept, best.values.exp().sum(-1)


def _drawn(logp: Float[Tensor, "c v"], uniform: Float[Tensor, "c s"]) -> tuple[dict[str, Tensor], Float[Tensor, " c"]]:
    """Draws by the inverse of the distribution function: ids in order, each once, with how often it came."""
    draws = _inverse(logp, uniform).sort(dim=-1).values.cpu()
    first = torch.ones_like(draws, dtype=torch.bool)
    first[:, 1:] = draws[:, 1:] != draws[:, :-1]
    place = first.flatten().nonzero()[:, 0]
    ends = torch.cat([place[1:], torch.tensor([first.numel()])]) if len(place) else place
    ids = draws.flatten()[place]
    unique = first.sum(-1)
    row = torch.repeat_interleave(torch.arange(len(draws)), unique)
    known = torch.zeros(len(draws), dtype=torch.float64)
    known.index_add_(0, row, logp.cpu().double().exp()[row, ids])
    kept = {
        "ids": ids.to(torch.int32),
        "counts": (ends - place).to(torch.int16),
        "unique": unique.to(torch.int16),
    }
    return kept, known


def _inverse(logp: Float[Tensor, "c v"], uniform: Float[Tensor, "c s"]) -> Int[Tensor, "c s"]:
    """What the inverse of the distribution function makes of numbers in [0, 1)."""
    reached = logp.double().exp().cumsum(-1)
    # Tokens of probability 0 reach no further than the one before them, and are never the first beyond a number.
    draws = torch.searchsorted(reached, uniform.to(reached.device) * reached[:, -1:], right=True)
    return draws.clamp_(max=logp.shape[1] - 1)


def _both(
    logp: Float[Tensor, "c v"],
    k: int,
    uniform: Float[Tensor, "c s"],
    tokens: Int[Tensor, " c"],
    ends: tuple[int, ...],
) -> tuple[dict[str, Tensor], Float[Tensor, " c"]]:
    """The likeliest, draws from the others, and what cannot be had from these."""
    kept, known = _likeliest(logp, k)
    ids, rest = kept["ids"].long().to(logp.device), kept["rest"].to(logp)
    there = (rest > -torch.inf)[:, None]
    # Relative to their sum: a tail of hardly any mass has a law like any other.
    tail = logp.scatter(-1, ids, -torch.inf) - rest[:, None].where(there, 0.0)
    draws = torch.where(there, _inverse(tail, uniform), 0)
    tokens = tokens.to(logp.device)
    text = logp.gather(-1, tokens.clamp(max=logp.shape[1] - 1)[:, None])[:, 0]
    p, level = logp.exp(), logp.clamp(min=FLOOR)
    entropy = -(p * level).sum(-1)
    ends = tuple(end for end in ends if end < logp.shape[1])
    kept |= {
        "draws": draws.to(torch.int32).cpu(),
        "logp_draws": logp.gather(-1, draws).where(there, -torch.inf).float().cpu(),
        "whole": (logp.amin(-1) > -torch.inf).cpu(),
        "text": text.masked_fill(tokens >= logp.shape[1], -torch.inf).float().cpu(),
        "entropy": entropy.clamp(min=0.0).float().cpu(),
        "variance": (p * (level + entropy[:, None]).square()).sum(-1).float().cpu(),
        "coin": end_coin(logp, ends, torch.zeros_like(rest, dtype=torch.float64)).float().cpu(),
    }
    return kept, known


def _uniform(recording: Recording, example: int, length: int) -> Float[Tensor, "t s"]:
    """Random numbers of a string, whatever else is in its batch."""
    generator = stream(recording.seed, "teacher", example)
    return torch.rand(length, recording.draws, dtype=torch.float64, generator=generator)


def _nothing(recording: Recording) -> dict[str, Tensor]:
    one = torch.empty(0)
    if recording.kind in (TOP_K, HYBRID):
        ids = torch.empty(0, recording.k, dtype=torch.int32)
        kept = {"ids": ids, "logp": ids.float(), "rest": one}
        if recording.kind == TOP_K:
            return kept
        draws = torch.empty(0, recording.draws, dtype=torch.int32)
        kept |= {"draws": draws, "logp_draws": draws.float(), "whole": one.bool(), "coin": torch.empty(0, 2)}
        return kept | dict.fromkeys(("text", "entropy", "variance"), one)
    return {
        "ids": torch.empty(0, dtype=torch.int32),
        "counts": torch.empty(0, dtype=torch.int16),
        "unique": torch.empty(0, dtype=torch.int16),
    }
