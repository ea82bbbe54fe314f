"""What a trainer adds to its loss for the divergence, and how a loss type averages it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from klkit.objectives.policy import Surrogate, kl_surrogate


@dataclass(frozen=True, slots=True)
class KLTerm:
    """How the gradient of the divergence is estimated; by default as the theorem of the paper says.

    Attributes:
        estimator: key of :data:`klkit.objectives.policy.GRADIENT_ESTIMATORS`.
        gamma: discount of later divergences a token; below 1 it biases.
        leave_one_out: subtract from a token's later divergences their mean over the prompt's other responses in the
            batch: less variance, and a gradient that depends on how a prompt's responses are split into batches.
        cap: largest prefix weight where responses are of an older policy; None for exact weights of any size.
        engine: weigh by what the inference engine says that it sampled from, not by the trainer's own older scores.

    Raises:
        ValueError: an unknown estimator, or options that exclude each other.

    Example:
        >>> KLTerm(estimator="token_local").estimator
        'token_local'
    """

    estimator: str = "rb"
    gamma: float = 1.0
    leave_one_out: bool = False
    cap: float | None = 3.0
    engine: bool = False

    def __post_init__(self) -> None:
        zero = torch.zeros(1, 1)
        group = torch.zeros(1, dtype=torch.long)
        self.surrogate(zero, zero, zero, torch.ones(1, 1, dtype=torch.bool), torch.ones(1), zero, group)

    def surrogate(
        self,
        kl: Float[Tensor, "n l"],
        logp: Float[Tensor, "n l"],
        logq: Float[Tensor, "n l"],
        mask: Bool[Tensor, "n l"],
        share: Float[Tensor, " n"],
        sampler_logp: Float[Tensor, "n l"] | None = None,
        group: Int[Tensor, " n"] | None = None,
    ) -> Surrogate:
        """The surrogate of ``E_p Σ_n share · D_n``, each response's divergences weighed by its share."""
        share = share[:, None]
        return kl_surrogate(
            share * kl,
            logp,
            logp.detach() + share * (logq - logp.detach()),
            mask,
            estimator=self.estimator,
            gamma=self.gamma,
            group=group if self.leave_one_out else None,
            sampler_logp=sampler_logp,
            cap=None if sampler_logp is None else self.cap,
        )


def averaging(
    loss_type: str,
    mask: Bool[Tensor, "n l"],
    *,
    max_completion_length: int | None,
    items: Float[Tensor, ""],
    window: int,
) -> tuple[Float[Tensor, " n"], Float[Tensor, ""]]:
    """``(share, scale)`` such that a loss type averages ``x`` as ``scale · mean_i share_i Σ_n x_in``.

    With a share of 1 the term is a constant times the divergence between the laws of whole responses. ``grpo`` and
    ``sapo`` divide each response by its length, as they do with the reward: long responses then count less.

    Args:
        mask: the decisions of this batch.
        items: decisions of all batches that one optimiser step averages over, a process.
        window: batches that are accumulated.

    Raises:
        ValueError: a loss type that is not known here.

    Example:
        >>> mask = torch.tensor([[True, True], [True, False]])
        >>> share, scale = averaging("grpo", mask, max_completion_length=8, items=torch.tensor(3.0), window=2)
        >>> share.tolist(), float(scale)
        ([0.5, 1.0], 0.5)
    """
    lengths = mask.sum(1).clamp(min=1).to(items.dtype)
    one, count = torch.ones_like(lengths), len(mask)
    if loss_type == "rloo":  # whose trainer divides by the window itself
        return one, one.new_ones(())
    if loss_type in ("grpo", "sapo"):
        return 1 / lengths, one.new_tensor(1 / window)
    if loss_type == "bnpo":
        return one, count / mask.sum().clamp(min=1) / window
    if loss_type == "dr_grpo":
        if max_completion_length is None:
            raise ValueError("expected max_completion_length with loss_type dr_grpo, got None; set it")
        return one, one.new_tensor(1 / max_completion_length / window)
    if loss_type in ("dapo", "cispo", "vespo"):
        return one, count / items.clamp(min=torch.finfo(items.dtype).tiny)
    if loss_type == "luspo":
        return one, one.new_tensor(1 / window)
    raise ValueError(
        f"expected a loss_type that klkit knows the average of (grpo, sapo, bnpo, dr_grpo, dapo, cispo, vespo, luspo), "
        f"got {loss_type!r}; choose one of these"
    )
