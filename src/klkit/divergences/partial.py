"""Next-token laws as they come: logits, hidden states with a head, or only a part of the law.

A part is the likeliest tokens with one bucket for all others, or a sample, or both: the likeliest tokens and a sample
of all others. What can be said from a part is less, and it is said here: merging tokens into a bucket never raises an
f-divergence, so that a bucket gives a lower bound, and a sample gives without bias what is linear in the law, and
nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klkit.divergences.adaptive import HeadRule, within
from klkit.divergences.linear import Head
from klkit.numerics import log1mexp, mass_slack


@dataclass(frozen=True, eq=False, slots=True)
class Logits:
    """Laws given by their logits, ``(m, v)``, normalised or not."""

    logits: Float[Tensor, "m v"]

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def size(self) -> int:
        """Tokens they are over."""
        return self.logits.shape[1]

    def rows(self, rows: slice) -> Float[Tensor, "c v"]:
        """The logits of some rows."""
        return self.logits[rows]


@dataclass(frozen=True, eq=False, slots=True)
class Hidden:
    """Laws given by what enters an output head, ``(m, d)``, and that head; logits exist for some rows at a time."""

    hidden: Float[Tensor, "m d"]
    head: Head

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def size(self) -> int:
        """Tokens they are over."""
        return self.head.tokens

    def rows(self, rows: slice) -> Float[Tensor, "c v"]:
        """The logits of some rows, without gradients."""
        return self.head.logits(self.hidden[rows])


@dataclass(frozen=True, eq=False, slots=True)
class TopK:
    """The likeliest tokens of each law with their exact log-probabilities; all others are one bucket.

    Attributes:
        tokens: ids, all different in a row, ``(m, k)``.
        logp: their log-probabilities under the whole law, ``(m, k)``, nats.
        rest: log-probability of all other tokens together, ``(m,)``; None for one minus the sum of the others.
        temperature: at which the law was taken. A law cannot be tempered when only a part of it is known.

    Example:
        >>> law = TopK(torch.tensor([[2, 0]]), torch.tensor([[0.5, 0.25]]).log())
        >>> law.log_rest.exp().tolist()
        [0.25]
    """

    tokens: Int[Tensor, "m k"]
    logp: Float[Tensor, "m k"]
    rest: Float[Tensor, " m"] | None = None
    temperature: float = 1.0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def log_rest(self) -> Float[Tensor, " m"]:
        """Log-probability of the bucket, ``-inf`` where nothing is left."""
        if self.rest is not None:
            return self.rest
        known = self.logp.double().logsumexp(-1).clamp(max=0.0)
        return log1mexp(known).to(self.logp.dtype)


@dataclass(frozen=True, eq=False, slots=True)
class Sampled:
    """Tokens drawn from each law, and the weight of each draw.

    Attributes:
        tokens: ids, ``(m, s)``; one that is repeated counts as often.
        share: weights, ``(m, s)``, whose sum over the draws of a token has the token's probability as its mean.
    """

    tokens: Int[Tensor, "m s"]
    share: Float[Tensor, "m s"]

    def __len__(self) -> int:
        return len(self.tokens)


class Scalars(NamedTuple):
    """What was worked out of each whole law while it was at hand, ``(m,)`` each but for the last, in nats.

    Attributes:
        logp: log-probability of the text's token.
        entropy: ``−Σ p log p``.
        variance: of ``log p(a)`` for ``a`` drawn from ``p``.
        coin: log-probabilities of ending here (all end tokens together) and of going on, ``(m, 2)``.
    """

    logp: Float[Tensor, " m"]
    entropy: Float[Tensor, " m"]
    variance: Float[Tensor, " m"]
    coin: Float[Tensor, "m 2"]


@dataclass(frozen=True, eq=False, slots=True)
class Hybrid:
    """The likeliest tokens of each law with their exact log-probabilities, and draws from all others.

    Attributes:
        tokens: ids of the likeliest, all different in a row, ``(m, k)``.
        logp: their log-probabilities under the whole law, likeliest first, ``(m, k)``, nats.
        rest: log-probability of all other tokens together, ``(m,)``; ``-inf`` where nothing is left, or drawn.
        draws: ids drawn from the other tokens in proportion to their probabilities, with replacement, ``(m, s)``.
        logp_draws: their log-probabilities under the whole law, ``(m, s)``.
        whole: whether the law gives every one of its tokens some probability, ``(m,)``.
        size: ids that the law is over; None for all that the other one is over.
        scalars: what else is known of each law; None if that is nothing.

    Example:
        >>> p = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> law = Hybrid(
        ...     torch.tensor([[0]]), p[:, :1], torch.tensor([0.5]).log(), torch.tensor([[2, 2]]), p[:, [2, 2]],
        ...     torch.tensor([True]),
        ... )
        >>> law.sampled().share.tolist()
        [[0.5, 0.25, 0.25]]
    """

    tokens: Int[Tensor, "m k"]
    logp: Float[Tensor, "m k"]
    rest: Float[Tensor, " m"]
    draws: Int[Tensor, "m s"]
    logp_draws: Float[Tensor, "m s"]
    whole: Bool[Tensor, " m"]
    size: int | None = None
    scalars: Scalars | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device) -> Hybrid:
        """The same on a device."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        moved: dict[str, Any] = {name: x.to(device) for name, x in columns.items() if isinstance(x, Tensor)}
        scalars = None if self.scalars is None else Scalars(*(x.to(device) for x in self.scalars))
        return replace(self, **moved, scalars=scalars)

    def top(self) -> TopK:
        """The same without the draws: a lower bound of every f-divergence."""
        return TopK(self.tokens, self.logp, self.rest)

    def sampled(self) -> Sampled:
        """All of it as weighted draws: what is linear in the law has its mean, and noise from the tail alone."""
        share = (self.rest.exp() / self.draws.shape[1])[:, None].expand(self.draws.shape)
        return Sampled(torch.cat([self.tokens, self.draws], 1), torch.cat([self.logp.exp(), share], 1))


def bucketed(
    law: TopK, logq: Float[Tensor, "m v"], rows: slice = slice(None)
) -> tuple[Float[Tensor, "m _k"], Float[Tensor, "m _k"]]:
    """Both laws over the known tokens of ``p`` and one bucket: ``(m, k + 1)`` twice, nats, differentiable in ``logq``.

    Any f-divergence of the two is at most that of the whole laws (data processing), and equal to it where the ratio
    of the laws is constant in the bucket.

    Args:
        law: what is known of ``p``.
        logq: log-probabilities of ``q``, all of them.
        rows: the rows of ``law`` that ``logq`` belongs to.

    Raises:
        ValueError: an id is out of range.

    Example:
        >>> law = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]).log())
        >>> p, q = bucketed(law, torch.tensor([[0.25, 0.25, 0.125, 0.375]]).log())
        >>> [[round(x, 6) for x in law[0].exp().tolist()] for law in (p, q)]
        [[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]
    """
    tokens, logp = law.tokens[rows], law.logp[rows].to(logq.dtype)
    require_tokens(tokens, logq.shape[-1])
    # The bucket of q is summed from what is in it: one minus the others would lose what is left of it in rounding.
    others = logq.scatter(-1, tokens, -torch.inf)
    full = tokens.shape[1] == logq.shape[-1]
    rest = logq.new_full(logq.shape[:1], -torch.inf) if full else others.logsumexp(-1)
    ours = torch.full_like(rest, -torch.inf) if full else law.log_rest[rows].to(logq.dtype)
    return torch.cat([logp, ours[:, None]], 1), torch.cat([logq.gather(-1, tokens), rest[:, None]], 1)


def sampled_cross_entropy(law: Sampled, logq: Float[Tensor, "m v"], rows: slice = slice(None)) -> Float[Tensor, " m"]:
    """``-Σ share log q``: without bias for ``-Σ p log q``, which is ``KL(p‖q)`` plus the entropy of ``p``.

    Raises:
        ValueError: an id is out of range.

    Example:
        >>> law = Sampled(torch.tensor([[0, 0, 1]]), torch.full((1, 3), 1 / 3))
        >>> round(float(sampled_cross_entropy(law, torch.tensor([[0.5, 0.5]]).log())), 4)
        0.6931

    Source: A. Anshumann et al., 2025, arXiv 2503.16870.
    """
    require_tokens(law.tokens[rows], logq.shape[-1])
    taken = logq.gather(-1, law.tokens[rows])
    # A share of 0 pads a row; it silences whatever it is multiplied with.
    share = law.share[rows].to(logq.dtype)
    return -(share * taken.masked_fill(share == 0, 0.0)).sum(-1)


class Bracket(NamedTuple):
    """What a bucket leaves open about a head's weight, ``(m,)`` each.

    Attributes:
        least: no smaller than this.
        estimate: as if the laws' ratio were constant in the bucket; where the head is not known, with all known
            tokens for a head.
        greatest: no larger than this.
        covered: whether the head is known; elsewhere the bounds are 0 and 1.
    """

    least: Float[Tensor, " m"]
    estimate: Float[Tensor, " m"]
    greatest: Float[Tensor, " m"]
    covered: Bool[Tensor, " m"]


@torch.no_grad()
def head_bracket(
    logp: Float[Tensor, "m _k"], logq: Float[Tensor, "m _k"], *, mass: float = 0.5, head: str = "cover"
) -> Bracket:
    """Bounds of :func:`klkit.divergences.adaptive.head_weight` of whole laws, from :func:`bucketed` ones.

    The head is among the known tokens wherever these have its mass. Then ``Σ_head |p - q|`` is exact, and the bucket
    hides a difference from ``|P - Q|`` to ``P + Q`` of its two masses.

    Args:
        logp: log-probabilities: the likeliest tokens in any order, and the bucket last.
        logq: the same of ``q``.

    Example:
        >>> p, q = torch.tensor([[0.6, 0.2, 0.2]]), torch.tensor([[0.4, 0.4, 0.2]])
        >>> [[round(float(x), 4) for x in bound] for bound in head_bracket(p.log(), q.log())]
        [[0.25], [0.5], [0.5], [1.0]]
    """
    p, q = logp.double().exp(), logq.double().exp()
    gap = (p - q).abs()
    likely, place = p[:, :-1].sort(dim=-1, descending=True, stable=True)
    slack = mass_slack(logp.dtype)
    reached, inside = within(likely, HeadRule(mass, head), slack)
    known = reached[:, -1]
    # Where one more token may be inside, the next one has to be known too.
    covered = (known >= mass - slack if head == "cover" else known > mass + slack) | (p[:, -1] == 0)
    in_head = (gap[:, :-1].gather(-1, place) * inside).sum(-1)
    total = gap[:, :-1].sum(-1)

    def share(rest: Tensor) -> Tensor:
        return torch.where(total + rest > 0, in_head / (total + rest), 0.5).clamp(max=1.0).to(logp.dtype)

    estimate = share(gap[:, -1])
    return Bracket(
        share(p[:, -1] + q[:, -1]).masked_fill(~covered, 0.0), estimate, estimate.masked_fill(~covered, 1.0), covered
    )


def require_tokens(tokens: Int[Tensor, "m _k"], size: int) -> None:
    """Refuse ids that are no tokens of a vocabulary of ``size``.

    Raises:
        ValueError: an id is out of range.
    """
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < size:
        raise ValueError(
            f"expected ids in 0..{size - 1}, the tokens that q chooses from, got {int(tokens.min())}.."
            f"{int(tokens.max())}; take p and q from models with one tokenizer"
        )
