"""Strings from a model itself: token after token from the full next-token law, nothing cut off.

``transformers``' ``generate`` may apply a top-k of the generation config without being asked; here
the step loop is klkit's own, so what is sampled is the law that is read out, and its trunk vectors
are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from klkit import rng
from klkit.models.base import LanguageModel
from klkit.sampling.draw import TOLERANCE, Noise, draw
from klkit.sequences import Sequences

Choose = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(step, strings still in the batch, their log-probabilities, all tokens so far) → their next tokens."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Sampled strings and what their sampling pass leaves behind.

    Attributes:
        sequences: the strings.
        hidden: the trunk vector of every decision, flat, so ``model.readout(hidden)`` is the law
            that each token was drawn from.
        logp: log-probability of each drawn token under that law, on the CPU.
    """

    sequences: Sequences
    hidden: Float[Tensor, "m d"]
    logp: Float[Tensor, " m"]


def sample(
    model: LanguageModel,
    contexts: Sequence[Int[Tensor, " _c"]],
    *,
    max_tokens: int,
    seed: int,
    prompt: Sequence[int] | None = None,
    replicate: Sequence[int] | None = None,
    cluster: Sequence[int] | None = None,
    settle: bool = True,
) -> Draw:
    """Draw one string ``y ~ p(· | context)`` for each context, as one batch.

    String ``i`` is named by ``(prompt[i], replicate[i])``, and its randomness comes from that name and
    the seed only. With ``settle`` (and a model in fp32 or fp64) it is the same string, bit for bit, in
    whatever batch it is drawn: a choice that rounding could flip (its margin is below
    ``draw.TOLERANCE``) is made again with the same noise on the log-probabilities of its prefix
    evaluated alone, and so is a function of the prefix. That happens at a fraction of decisions of
    about the tolerance. In half precision nothing is settled and batches of another shape may give
    other strings, of the same law.

    Args:
        max_tokens: decisions a string may have; a string cut there is not ``finished``.
        prompt: names of the prompts; by default each context is a prompt of its own.
        replicate: tells strings of one prompt apart; by default they are counted from 0.
        cluster: independent units; by default the prompts if there are several, else the replicates.
            Give it when a batch is not all that is drawn: one batch cannot know of other prompts.
        settle: whether to settle close choices.

    Raises:
        ValueError: no context, an empty context, strings that do not fit the model's window, or two
            strings of one name.

    Example:
        >>> from klkit.models.automaton import coin
        >>> p = coin(end=0.5)
        >>> x = sample(p, [p.context(None)] * 3, max_tokens=10, seed=0).sequences
        >>> len(x), bool(x.finished.all())
        (3, True)
    """
    prompt, replicate, cluster = name_strings(len(contexts), prompt, replicate, cluster)
    generators = [rng.stream(seed, "string", k, r) for k, r in zip(prompt, replicate, strict=True)]
    tolerance = TOLERANCE.get(model.dtype, 0.0) if settle else 0.0
    noise: Noise | None = None

    def choose(step: int, rows: Tensor, logp: Tensor, tokens: Tensor) -> Tensor:
        nonlocal noise
        if noise is None:
            noise = Noise(generators, logp.shape[1], logp.device)
        gumbel = noise.take(rows, step)
        chosen, margin = draw(logp, gumbel)
        for j in (margin < tolerance).nonzero()[:, 0].tolist():
            i = int(rows[j])
            _, alone = model.begin([torch.cat([contexts[i].cpu(), tokens[i, :step]])])
            chosen[j : j + 1] = draw(model.readout(alone), gumbel[j : j + 1])[0]
        return chosen

    return roll_out(model, contexts, choose, max_tokens=max_tokens, prompt=prompt, cluster=cluster)


def name_strings(
    n: int, prompt: Sequence[int] | None, replicate: Sequence[int] | None, cluster: Sequence[int] | None
) -> tuple[list[int], list[int], list[int]]:
    """Complete the names of ``n`` strings: the prompt, the replicate and the cluster of each."""
    prompt = list(range(n)) if prompt is None else [int(k) for k in prompt]
    if replicate is None:
        seen: Counter[int] = Counter()
        replicate = []
        for k in prompt:
            replicate.append(seen[k])
            seen[k] += 1
    replicate = [int(r) for r in replicate]
    cluster = (prompt if len(set(prompt)) > 1 else replicate) if cluster is None else [int(c) for c in cluster]
    if not len(prompt) == len(replicate) == len(cluster) == n:
        raise ValueError(
            f"expected one prompt, replicate and cluster for each of the {n} contexts, got {len(prompt)}, "
            f"{len(replicate)} and {len(cluster)}"
        )
    (name, count), *_ = Counter(zip(prompt, replicate, strict=True)).most_common(1) or [((0, 0), 0)]
    if count > 1:
        raise ValueError(
            f"expected a name of its own for every string, got (prompt, replicate) = {name} {count} times: they "
            f"would be copies of one string; number the strings of each prompt with replicate"
        )
    return prompt, replicate, cluster


@torch.no_grad()
def roll_out(
    model: LanguageModel,
    contexts: Sequence[Int[Tensor, " _c"]],
    choose: Choose,
    *,
    max_tokens: int,
    prompt: Sequence[int],
    cluster: Sequence[int],
) -> Draw:
    """Extend every context by the tokens ``choose`` picks, until each string ends or is cut.

    Raises:
        ValueError: as for :func:`sample`.
    """
    n = len(contexts)
    longest, shortest = max(map(len, contexts), default=0), min(map(len, contexts), default=0)
    if max_tokens < 1 or shortest < 1:
        raise ValueError(
            f"expected contexts of at least one token and max_tokens of at least 1, got {n} contexts, the shortest of "
            f"{shortest} tokens, and max_tokens {max_tokens}; model.context(None) is the empty prompt's context"
        )
    if model.window is not None and longest + max_tokens > model.window:
        raise ValueError(
            f"expected context and completion to fit {model.name}'s window of {model.window} tokens, got a context of "
            f"{longest} and max_tokens {max_tokens}; lower max_tokens to {max(0, model.window - longest)} or shorten "
            f"the prompt"
        )
    tokens = torch.zeros(n, max_tokens, dtype=torch.long)
    lengths = torch.full((n,), max_tokens)
    finished = torch.zeros(n, dtype=torch.bool)
    rows = torch.arange(n)
    kept: list[tuple[Tensor, Tensor, Tensor]] = []  # flat place, trunk vector and log p of the decisions of each step
    state, hidden = model.begin(contexts)
    for step in range(max_tokens):
        logp = model.readout(hidden)
        chosen = choose(step, rows, logp, tokens)
        kept.append((rows * max_tokens + step, hidden, logp.gather(1, chosen[:, None])[:, 0].cpu()))
        chosen = chosen.cpu()
        tokens[rows, step] = chosen
        ended = torch.isin(chosen, torch.tensor(model.vocabulary.ends))
        lengths[rows[ended]] = step + 1
        finished[rows[ended]] = True
        if step + 1 == max_tokens or bool(ended.all()):
            break
        if bool(ended.any()):
            stay = (~ended).nonzero()[:, 0]
            rows, chosen, state = rows[stay], chosen[stay], model.select(state, stay)
        state, hidden = model.advance(state, chosen)
    place, hiddens, logps = zip(*kept, strict=True)
    order = torch.cat(place).argsort()
    return Draw(
        sequences=Sequences.pack(
            [c.cpu() for c in contexts],
            [t[:length] for t, length in zip(tokens, lengths.tolist(), strict=True)],
            prompt=prompt,
            cluster=cluster,
            finished=finished.tolist(),
        ),
        hidden=torch.cat(hiddens)[order.to(hidden.device)],
        logp=torch.cat(logps)[order],
    )
