"""Whether a cache still says what its model says: some decisions asked again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from klkit.caches.cache import TeacherCache
from klkit.caches.recording import SAMPLED, Law, record
from klkit.caches.recording import law as law_of
from klkit.divergences.partial import Hidden, Hybrid, Sampled, TopK
from klkit.models.base import LanguageModel
from klkit.numerics import log_softmax
from klkit.rng import numpy_stream

FULL, HALF = 1e-4, 0.1
"""Total variation between two readings of one law that rounding explains, in full and in half precision."""
FULL_DRAWS = 2e-3
"""Share of draws that rounding turns into their neighbours, in full precision."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """A cache against its model.

    Attributes:
        examples: that were asked again.
        decisions: of these.
        largest: total variation between the two laws of a decision, at most; for a sampled cache, the share of all
            draws that come out otherwise; for a hybrid one, with the tail's share of it as the draws have it.
        tolerance: what rounding explains.
    """

    examples: int
    decisions: int
    largest: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether no more was found than rounding explains."""
        return self.largest <= self.tolerance


def compare(cache: TeacherCache, teacher: LanguageModel, *, count: int = 8, seed: int = 0) -> Agreement:
    """Ask ``teacher`` again about ``count`` examples, drawn at random, and compare.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from klkit.caches.build import build
        >>> from klkit.caches.recording import Recording
        >>> from klkit.models.automaton import coin
        >>> from klkit.sequences import Sequences
        >>> x = Sequences.pack([torch.tensor([1])], [torch.tensor([1, 0])])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = build(folder, coin(end=0.5), x, Recording("top-k", k=1)).cache
        ...     compare(cache, coin(end=0.5)).holds, round(compare(cache, coin(end=0.25)).largest, 6)
        (True, 0.25)
    """
    chosen = numpy_stream(seed, "cache", "verify").choice(len(cache), size=min(count, len(cache)), replace=False)
    found: list[float] = []
    decisions = 0
    for index in sorted(int(i) for i in chosen):
        strings = cache.strings([index])
        if not strings.decisions:
            continue
        decisions += strings.decisions
        hidden = teacher.encode(strings)
        before = cache.rows([index])
        if isinstance(before, Hidden | Hybrid):
            # The read-out is asked again, too: its weights are part of what was recorded.
            now = log_softmax(teacher.readout(hidden).cpu()[:, : before.size])
            if isinstance(before, Hidden):
                found.append(_variation(log_softmax(before.rows(slice(0, len(before)))), now))
            else:
                found.append(_hybrid_variation(before, now, strings.targets()))
        else:
            recording, one = cache.manifest.recording, torch.tensor([index])
            kept, _ = record(teacher, hidden, recording, strings, size=cache.manifest.size, examples=one)
            found += _differences(before, law_of(cache.kind, kept, head=None, temperature=recording.temperature))
    eps = torch.finfo(getattr(torch, cache.manifest.teacher.dtype)).eps
    if cache.kind == SAMPLED:
        mean = sum(found) / max(1, len(found))
        return Agreement(len(chosen), decisions, mean, FULL_DRAWS if eps < 1e-5 else HALF)
    return Agreement(len(chosen), decisions, max(found, default=0.0), FULL if eps < 1e-5 else HALF)


def _variation(logp: Float[Tensor, "m v"], other: Float[Tensor, "m v"]) -> float:
    return float((logp.exp() - other.to(logp.device).exp()).abs().sum(-1).max()) / 2


def _hybrid_variation(law: Hybrid, logp: Float[Tensor, "m v"], tokens: Int[Tensor, " m"]) -> float:
    """Over what is known, and over the tail: half the mean of ``|1 − ratio|`` over draws, times the tail's mass."""
    logp = logp.double()
    rest = law.rest.double().exp()
    known = (law.logp.double().exp() - logp.gather(-1, law.tokens).exp()).abs().sum(-1)
    tail = (rest - logp.scatter(-1, law.tokens, -torch.inf).exp().sum(-1)).abs()
    ratio = (logp.gather(-1, law.draws) - law.logp_draws.double()).nan_to_num(nan=0.0)  # nothing drawn, or both exclude
    inside = rest * torch.expm1(ratio).abs().mean(-1)
    assert law.scalars is not None
    own = logp.gather(-1, tokens.clamp(max=logp.shape[-1] - 1)[:, None])[:, 0].exp()
    text = (law.scalars.logp.double().exp() - own).where(tokens < logp.shape[-1], 0.0)
    return float(torch.maximum((known + torch.maximum(tail, inside)) / 2, text.abs()).max())


def _differences(before: Law, now: Law) -> list[float]:
    """Total variation of each decision over what both know, everything else in one place; of draws, their shares."""
    found = []
    for i in range(len(before)):
        one, other = _masses(before, i), _masses(now, i)
        found.append(sum(abs(one.get(t, 0.0) - other.get(t, 0.0)) for t in one.keys() | other.keys()) / 2)
    return found


def _masses(law: Law, i: int) -> dict[int, float]:
    """Probability, or share of draws, by token; -1 for all others."""
    if isinstance(law, Sampled):
        drawn = law.share[i] > 0  # the others pad the row
        return dict(zip(law.tokens[i][drawn].tolist(), law.share[i][drawn].tolist(), strict=True))
    assert isinstance(law, TopK)
    return {-1: float(law.log_rest[i].exp())} | dict(
        zip(law.tokens[i].tolist(), law.logp[i].exp().tolist(), strict=True)
    )
