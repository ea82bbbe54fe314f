"""The numbers of a training run, checked where they are written down."""

from __future__ import annotations

import math
from dataclasses import dataclass

from klkit.train.penalties import PENALTIES, RETURNS


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a policy is trained: everything that changes its numbers, but models, prompts and reward.

    Attributes:
        penalty: key of :data:`klkit.train.penalties.PENALTIES`.
        coefficient: what a nat of KL costs, in units of reward (β).
        prompts: prompts a step.
        samples: strings a prompt and step; their mean is each other's baseline, so at least two.
        max_tokens: longest response.
        learning_rate: AdamW's.
        updates: of the weights for each batch of strings; those after the first are off-policy.
        micro_batch: strings whose gradients are formed together; 0 for all of a step.
        gamma: discount of later divergences a decision; below 1 the KL term is biased.
        kl_baseline: subtract from each string's divergence what the prompt's other strings show.
        mc_share: share of ``mc`` in ``rb``.
        cap: largest prefix weight of the KL term in off-policy updates; None for no cap.
        clip: how far a string's weight in the reward term may leave 1 in the direction it is pushed; None for any.
        target_kl: KL in nats per response that the coefficient is steered to; None leaves it alone.
        gradient_norm: longest gradient; longer ones are shortened.
        max_kl: mean KL of a batch, in nats per response, above which the run has come apart.
        seed: names every random draw.

    Raises:
        ValueError: a number is out of range, or options exclude each other.

    Example:
        >>> Recipe(samples=1)
        Traceback (most recent call last):
            ...
        ValueError: expected samples of at least 2, got 1; the strings of a prompt are each other's baseline
    """

    penalty: str = "rb"
    coefficient: float = 0.05
    prompts: int = 16
    samples: int = 2
    max_tokens: int = 64
    learning_rate: float = 1e-4
    updates: int = 1
    micro_batch: int = 0
    gamma: float = 1.0
    kl_baseline: bool = True
    mc_share: float = 0.0
    cap: float | None = None
    clip: float | None = 0.2
    target_kl: float | None = None
    gradient_norm: float = 1.0
    max_kl: float = 100.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.penalty not in PENALTIES:
            raise ValueError(
                f"expected a KL penalty among {', '.join(PENALTIES)}, got {self.penalty!r}; rb is the one to start with"
            )
        if self.samples < 2:
            raise ValueError(
                f"expected samples of at least 2, got {self.samples}; the strings of a prompt are each other's baseline"
            )
        for name in ("prompts", "max_tokens", "updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} of at least 1, got {getattr(self, name)}; raise it")
        for name in ("learning_rate", "gradient_norm", "max_kl", "target_kl", "cap", "clip"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and (math.isfinite(value) or name in ("max_kl", "gradient_norm"))):
                raise ValueError(f"expected a positive {name}, got {value:g}; choose one above 0")
        if not 0 <= self.coefficient < math.inf:
            raise ValueError(f"expected a coefficient of 0 or more, got {self.coefficient:g}; 0 trains without penalty")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"expected a discount gamma from 0 to 1, got {self.gamma:g}; 1 follows KL(p‖q)")
        if self.gamma != 1 and self.penalty not in RETURNS:
            raise ValueError(
                f"expected gamma with one of {', '.join(RETURNS)}, got {self.penalty}, which has no return of single "
                f"tokens; leave gamma at 1"
            )
        if self.mc_share and self.penalty != "rb":
            raise ValueError(f"expected mc_share with rb only, got it with {self.penalty}; leave it at 0")
        if self.micro_batch % self.samples:
            raise ValueError(
                f"expected a micro_batch of whole prompts, a multiple of {self.samples} samples, got "
                f"{self.micro_batch}; {self.micro_batch + self.samples - self.micro_batch % self.samples} would do"
            )
