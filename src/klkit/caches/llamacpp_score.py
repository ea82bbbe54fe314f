"""The divergence of a model from laws that a file keeps to 16 bits, and only 16 nats deep.

What a file says of a law leaves two things open, and both are kept apart from the number. The tokens at the floor have
a mass together, which is what the others leave, but no shares: they are one bucket, in ``p`` and in ``q``, and merging
tokens never raises a divergence. And every stored value is rounded, so that the bucket's mass is known to an interval
only: of this interval the value nearest to ``q``'s mass is taken, the safe side of a lower bound. What rounding can add
all the same is bounded decision by decision.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klkit.caches.llamacpp import StoredLaws
from klkit.caches.shards import CacheError
from klkit.divergences.fused import RowStatistics, row_statistics
from klkit.numerics import wide_dtype

SINGLE = 5e-6
"""Nats by which single precision may shift a whole law when it is stored: some units in the last place of 16."""
DAMAGED = 1e-3
"""How far the mass of a law may be from 1, beyond rounding, before it is taken for damage."""
SKIPPED = -16.0
"""Stored log-probabilities down to this one are left out of llama.cpp's sum."""


@dataclass(frozen=True, slots=True)
class ScoredLaws:
    """Scalars of each decision of stored laws against a model's; every field but ``rows`` is ``(m,)``, double.

    Attributes:
        rows: of the bucketed laws. ``kl``, ``reverse_kl``, ``total_variation`` and ``entropy_p`` are at most those of
            the whole laws; ``logp`` of a token at the floor is the floor, which is at least its log-probability;
            ``top_p``, ``top_q``, ``logq``, ``entropy_q`` and ``end_q`` are those of the whole laws.
        llamacpp: ``Σ p̃ (log p̃ − log q)`` over stored values ``p̃`` above −16 nats: llama.cpp's number, of either sign.
        log_stored: stored log-probability of the drawn token, as llama.cpp takes it for its perplexity.
        bucket: mass of the tokens at the floor under ``p``: what the others leave, within ``error``.
        floored: how many they are.
        beyond: stored mass of all other tokens, less 1: above 0 by rounding only.
        error: by how much a stored log-probability may be off.
        rounding: by how much rounding can have raised ``kl`` above what holds for the law that was rounded.
        drawn_floored: 1 where the drawn token is at the floor.
        outside: mass of ``q`` on ids that the file does not have.
    """

    rows: RowStatistics
    llamacpp: Float[Tensor, " m"]
    log_stored: Float[Tensor, " m"]
    bucket: Float[Tensor, " m"]
    floored: Float[Tensor, " m"]
    beyond: Float[Tensor, " m"]
    error: Float[Tensor, " m"]
    rounding: Float[Tensor, " m"]
    drawn_floored: Float[Tensor, " m"]
    outside: Float[Tensor, " m"]

    @staticmethod
    def cat(parts: list[ScoredLaws]) -> ScoredLaws:
        """Successive decisions, on the CPU."""
        rows = RowStatistics.cat([part.rows for part in parts]).kept()
        own = {
            f.name: torch.cat([getattr(part, f.name) for part in parts]).cpu()
            for f in fields(ScoredLaws)
            if f.name != "rows"
        }
        return ScoredLaws(rows=rows, **own)


@torch.no_grad()
def score_laws(
    laws: StoredLaws,
    logq: Float[Tensor, "m w"],
    tokens: Int[Tensor, " m"],
    ends: tuple[int, ...],
    *,
    backend: str | None = None,
) -> ScoredLaws:
    """Compare stored laws with those of ``q`` at the same decisions.

    ``kl`` is at most ``KL(p‖q) + rounding`` with ``p`` the law that was stored, whatever it was. With ``K`` the
    divergence of the two laws given that the token is not at the floor, and ``B`` the bucket's mass, it is
    ``B log(B/B_q) + (1−B) log((1−B)/(1−B_q)) + (1−B) K``.

    Args:
        laws: of ``p``, over ``v`` tokens.
        logq: log-probabilities of ``q``, all of them; ids from ``v`` on are impossible under ``p``.
        tokens: the token of the text at each decision.
        ends: ids that end a response.
        backend: see :func:`klkit.divergences.fused.row_statistics`.

    Raises:
        CacheError: a stored law cannot have had a mass of 1.

    Example:
        >>> from klkit.caches.llamacpp import StoredLaws
        >>> stored = torch.tensor([[0.5, 0.25, 1e-9, 1e-9]]).log()  # a quarter of the mass is at the floor
        >>> laws = StoredLaws(stored, torch.tensor([[False, False, True, True]]), torch.zeros(1), torch.tensor([-1.0]))
        >>> q = torch.tensor([[0.25, 0.25, 0.2, 0.3]]).log()
        >>> scored = score_laws(laws, q, torch.tensor([0]), ends=(1,))
        >>> [round(float(x), 4) for x in (scored.rows.kl, scored.bucket, scored.llamacpp)]
        [0.1733, 0.25, 0.3466]
    """
    size, floored = laws.logp.shape[1], laws.floored
    count, stored = floored.sum(1), laws.logp.exp()
    kept = stored.masked_fill(floored, 0.0)
    log_mass = kept.sum(1, dtype=torch.float64).log()
    error = laws.step.double() / 2 + SINGLE
    most = count * (laws.lowest.double() + error).exp()
    least_left, most_left = -torch.expm1(log_mass + error), -torch.expm1(log_mass - error)
    _require_mass(least_left, most_left, most)

    # What rounding leaves open of the bucket's mass is settled in favour of q.
    inside = torch.nn.functional.pad(floored, (0, logq.shape[1] - size))
    log_bucket_q = logq.masked_fill(~inside, -torch.inf).logsumexp(1).double()
    least_left, most_left = least_left.clamp(min=0.0).minimum(most), most_left.clamp(min=0.0).minimum(most)
    bucket = log_bucket_q.exp().maximum(least_left).minimum(most_left)

    dtype = wide_dtype(logq)
    place = _representative(floored, ends)
    some = (count > 0)[:, None]
    shift = (torch.log1p(-bucket) - log_mass).to(dtype)[:, None]
    p = (laws.logp + shift).masked_fill(floored, -torch.inf)
    p = p.scatter(1, place, bucket.log().to(dtype)[:, None].where(some, p.gather(1, place)))
    p = torch.nn.functional.pad(p, (0, logq.shape[1] - size), value=-torch.inf)
    q = logq.masked_fill(inside, -torch.inf)
    q = q.scatter(1, place, log_bucket_q.to(dtype)[:, None].where(some, q.gather(1, place)))
    rows = row_statistics(p, q, tokens, ends, backend=backend)

    drawn = tokens[:, None]
    at_floor = floored.gather(1, drawn)[:, 0]
    missing = (-torch.expm1(log_mass)).clamp(min=0.0).minimum(most)
    rows = replace(
        rows,
        logp=torch.where(at_floor, laws.lowest.to(dtype), rows.logp),
        logq=logq.gather(1, drawn)[:, 0],
        top_p=laws.logp.argmax(1),
        top_q=logq.argmax(1),
        entropy_p=_entropy(kept, laws.logp, log_mass, missing).to(dtype),
        entropy_q=torch.special.entr(logq.exp()).sum(1),
        end_q=logq[:, sorted(set(ends))].exp().sum(1),
    )
    # Rounded masses move the mean of the log-ratio by its spread at most, and the bucket's settled mass by 2 error kl.
    spread = rows.variance_ratio.double().sqrt()
    return ScoredLaws(
        rows=rows,
        llamacpp=_as_llamacpp(stored, laws.logp, logq[:, :size]),
        log_stored=laws.logp.gather(1, drawn)[:, 0].double(),
        bucket=missing,
        floored=count.double(),
        beyond=torch.expm1(log_mass),
        error=error,
        rounding=error * (spread + 2 * error + 2 * rows.kl.double()),
        drawn_floored=at_floor.double(),
        outside=logq[:, size:].exp().sum(1).double(),
    )


def _require_mass(least_left: Tensor, most_left: Tensor, most: Tensor) -> None:
    """Refuse laws whose stored values and floor cannot make up a mass of 1."""
    wrong = (most_left < -DAMAGED) | (least_left > most + DAMAGED)
    if bool(wrong.any()):
        i = int(wrong.int().argmax())
        raise CacheError(
            f"expected stored laws with a mass of 1, got one with {1 - float(most_left[i]):.6g} above its floor and at "
            f"most {float(most[i]):.3g} at it ({int(wrong.sum())} such of {len(wrong)}); the file is damaged: write it "
            f"again with llama-perplexity"
        )


def _entropy(
    kept: Float[Tensor, "m v"], logp: Float[Tensor, "m v"], log_mass: Float[Tensor, " m"], bucket: Float[Tensor, " m"]
) -> Float[Tensor, " m"]:
    """Entropy of a bucket and of all else in proportion to ``kept``, in nats; ``q`` has no say in it."""
    inside = log_mass - (kept * logp).sum(1, dtype=torch.float64) / log_mass.exp()
    total: Tensor = (1 - bucket) * inside + torch.special.entr(bucket) + torch.special.entr(1 - bucket)
    return total


def _representative(floored: Bool[Tensor, "m v"], ends: tuple[int, ...]) -> Int[Tensor, "m 1"]:
    """A floored token of each row to stand for all, one that ends no response if there is one."""
    rank = floored.int() * 2
    for end in set(ends):
        if end < floored.shape[1]:
            rank[:, end] -= floored[:, end].int()
    return rank.argmax(1, keepdim=True)


def _as_llamacpp(
    stored: Float[Tensor, "m v"], logp: Float[Tensor, "m v"], logq: Float[Tensor, "m v"]
) -> Float[Tensor, " m"]:
    """``Σ p̃ (log p̃ − log q)`` over the stored values above −16 nats, terms in single precision."""
    terms: Tensor = torch.where(logp > SKIPPED, stored * (logp - logq), 0.0)
    return terms.sum(1, dtype=torch.float64)
