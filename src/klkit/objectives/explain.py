"""What a configured KL penalty optimises: its formula, its gradient, and whose gradient that is.

The losses here are written as trainers write them, so that :func:`klkit.objectives.gradient_check.check_gradient` can
say what they do. None of them is klkit's own; those are in :mod:`klkit.objectives.policy`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from klkit.objectives.gradient_check import GradientReport, check_gradient
from klkit.objectives.policy import kl_surrogate
from klkit.objectives.toy import Batch

TERMS: dict[str, tuple[str, Callable[[Batch], Tensor]]] = {
    "k1": ("u_n", lambda b: b.logp - b.logq),
    "k2": ("½ u_n²", lambda b: 0.5 * (b.logp - b.logq).square()),
    "k3": ("exp(−u_n) − 1 + u_n", lambda b: torch.expm1(b.logq - b.logp) - (b.logq - b.logp)),
    "abs": ("|u_n|", lambda b: (b.logp - b.logq).abs()),
    "full": ("D_n", lambda b: (b.rows_p.exp() * (b.rows_p - b.rows_q)).sum(-1)),
}
"""What is computed at each decision; ``u_n = log p(y_n) − log q(y_n)``, ``D_n`` the full next-token divergence."""

PLACEMENTS = {
    "loss": "L = Σ_n {w}{k}",
    "reward": "L = sg(Σ_j {w}{k_j}) Σ_n log p(y_n)",
    "reward_to_go": "L = Σ_n sg(Σ_{{j≥n}} {w}{k_j}) log p(y_n)",
    "advantage": "L = Σ_n sg({w}{k}) log p(y_n)",
    "rb": "L = Σ_n [{w}{k} + sg(Σ_{{j>n}} {w}{k_j}) log p(y_n)]",
}
"""Where it enters, and the loss that follows; ``sg`` stops the gradient."""

WEIGHTS = {
    "none": "",
    "token": "r_n ",
    "token_detached": "sg(r_n) ",
    "prefix": "w_n ",
}
"""Corrections for strings of an older policy μ: ``r_n = p(y_n)/μ(y_n)``, ``w_n = Π_{i<n} p(y_i)/μ(y_i)``."""

NORMALISERS = ("sum", "length")


@dataclass(frozen=True, slots=True)
class Penalty:
    """A KL penalty as trainers configure it.

    Attributes:
        estimator: key of :data:`TERMS`.
        placement: key of :data:`PLACEMENTS`.
        weight: key of :data:`WEIGHTS`.
        gradient: whose gradient a straight-through value has, key of :data:`TERMS`; None for its own.
        detach: whether the return of a reward is cut off from the policy.
        normalise: ``"sum"`` over the tokens of a response, or ``"length"``: their mean.

    Raises:
        ValueError: an unknown key, or parts that do not go together.
    """

    estimator: str = "k3"
    placement: str = "loss"
    weight: str = "none"
    gradient: str | None = None
    detach: bool = True
    normalise: str = "sum"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("estimator", self.estimator, tuple(TERMS)),
            ("placement", self.placement, tuple(PLACEMENTS)),
            ("weight", self.weight, tuple(WEIGHTS)),
            ("gradient", self.gradient or "k1", tuple(TERMS)),
            ("normalise", self.normalise, NORMALISERS),
        ):
            if value not in known:
                raise ValueError(f"expected {name} to be one of {', '.join(known)}, got {value!r}")
        if self.placement == "rb" and self.estimator != "full":
            raise ValueError(
                f"expected the estimator full with the placement rb, got {self.estimator}; use reward_to_go"
            )
        if not self.detach and self.placement != "reward":
            raise ValueError(f"expected detach=False with the placement reward only, got {self.placement}")
        if self.gradient and self.placement != "loss":
            raise ValueError(f"expected a straight-through gradient in the loss only, got placement {self.placement}")

    def __call__(self, batch: Batch) -> Tensor:
        """The penalty of a batch, mean over its strings."""
        if self.placement == "rb":
            return kl_surrogate(
                TERMS["full"][1](batch),
                batch.logp,
                batch.logq,
                batch.mask,
                sampler_logp=batch.old if self.weight == "prefix" else None,
            ).loss
        ratio = (batch.logp - batch.old).exp()
        step = (batch.logp - batch.old).masked_fill(~batch.mask, 0.0)
        weight = {
            "none": torch.ones_like(ratio),
            "token": ratio,
            "token_detached": ratio.detach(),
            "prefix": (step.cumsum(1) - step).exp(),
        }[self.weight]
        term = TERMS[self.estimator][1](batch)
        if self.gradient is not None:
            slope = TERMS[self.gradient][1](batch)
            term = term.detach() + slope - slope.detach()
        term = (weight * term).masked_fill(~batch.mask, 0.0)
        score = batch.logp.masked_fill(~batch.mask, 0.0)
        if self.placement == "loss":
            per_token = term
        elif self.placement == "reward":
            whole = term.sum(1, keepdim=True)
            per_token = whole.detach() * score
            if not self.detach:
                per_token = per_token + term
        elif self.placement == "reward_to_go":
            per_token = term.detach().flip(1).cumsum(1).flip(1) * score
        else:
            per_token = term.detach() * score
        total = per_token.sum(1)
        return (total / batch.mask.sum(1) if self.normalise == "length" else total).mean()

    @property
    def formula(self) -> str:
        """The loss of one response, in symbols."""
        symbol = TERMS[self.estimator][0]
        k = symbol if self.estimator in ("k1", "full") else f"({symbol})"
        text = PLACEMENTS[self.placement].format(w=WEIGHTS[self.weight], k=k, k_j=k.replace("_n", "_j"))
        if self.weight != "none" and self.placement in ("reward", "reward_to_go"):
            text = text.replace("r_n (", "r_j (").replace("w_n (", "w_j (")
        if not self.detach:
            text += f" + Σ_n {k}"
        if self.gradient is not None:
            text += f", with the gradient of {TERMS[self.gradient][0]}"
        if self.normalise == "length":
            text += ", all divided by the response's length"
        return text


PRESETS: dict[str, tuple[str, Penalty]] = {
    "klkit": ("klkit's rb", Penalty("full", "rb")),
    "klkit-off-policy": ("klkit's rb with prefix weights", Penalty("full", "rb", "prefix")),
    "kl-rb": ("rycolab/kl-rb, the paper's released code", Penalty("full", "reward", detach=False)),
    "trl-rloo": ("TRL RLOOTrainer", Penalty("k1", "reward")),
    "trl-grpo": ("TRL GRPOTrainer since 1.10", Penalty("k3", "loss", "token")),
    "trl-grpo-before-1.10": ("TRL GRPOTrainer before 1.10", Penalty("k3", "loss")),
    "trl-distillation": ("TRL's distillation trainers on the student's text", Penalty("full", "loss")),
    "verl": ("verl, use_kl_loss with low_var_kl", Penalty("k3", "loss")),
    "verl-reward": ("verl, use_kl_in_reward", Penalty("k1", "reward_to_go")),
    "verl-plus": ("verl, k3+", Penalty("k3", "loss", gradient="k2")),
    "openrlhf": ("OpenRLHF, KL in the reward", Penalty("k1", "reward_to_go")),
    "openrlhf-loss": ("OpenRLHF, KL loss switched on without another estimator", Penalty("k1", "loss")),
    "openrlhf-unbiased": ("OpenRLHF, unbiased_gradient", Penalty("k2", "loss", "token_detached")),
    "skyrl": ("SkyRL, KL loss", Penalty("k3", "loss")),
    "skyrl-reward": ("SkyRL, KL in the reward with its default estimator", Penalty("k3", "reward")),
    "slime": ("slime, KL loss switched on without another estimator", Penalty("k1", "loss")),
    "slime-unbiased": ("slime, use-unbiased-kl", Penalty("k3", "loss", "token")),
    "nemo-rl": ("NeMo-RL", Penalty("k3", "loss", "token")),
    "open-instruct": ("open-instruct", Penalty("k3", "loss")),
    "prime-rl": ("prime-rl, ref_kl; tinker; slime's distillation", Penalty("k1", "advantage")),
    "miles": (
        "full divergence detached as the token's own advantage (radixark/miles #2362)",
        Penalty("full", "advantage"),
    ),
}
"""What libraries do, by name: a description and the penalty, as read in their sources in 2026."""


def explain(penalty: Penalty, *, off_policy: bool = False) -> GradientReport:
    """What the gradient of ``penalty`` follows, by exact enumeration; see :func:`check_gradient`.

    Example:
        >>> explain(PRESETS["verl"][1]).target
        'token_local_forward'
    """
    return check_gradient(penalty, off_policy=off_policy)


def customised(preset: str, **changes: object) -> Penalty:
    """The penalty of ``preset`` with other parts.

    Raises:
        ValueError: no such preset, or parts that do not go together.
    """
    if preset not in PRESETS:
        raise ValueError(f"expected a preset among {', '.join(PRESETS)}, got {preset!r}")
    return replace(PRESETS[preset][1], **changes)  # type: ignore[arg-type]
