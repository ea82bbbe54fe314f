"""What a configured KL penalty optimises: its formula, its gradient, and whose gradient that is.

The losses here are written as trainers write them, so that :func:`klkit.objectives.gradient_check.check_gradient` can
say what they do. Those of known libraries are in :mod:`klkit.objectives.presets`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from klkit.objectives.gradient_check import GradientReport, check_gradient
from klkit.objectives.policy_weights import policy_weights
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
    "loss": "Σ_n {w_n}{k_n}",
    "reward": "sg(Σ_j {w_j}{k_j}) Σ_n log p(y_n)",
    "reward_to_go": "Σ_n sg(Σ_{{j≥n}} {w_j}{k_j}) log p(y_n)",
    "advantage": "Σ_n sg({w_n}{k_n}) log p(y_n)",
    "rb": "Σ_n [{w_n}{k_n} + sg(Σ_{{j>n}} {w_j}{k_j}) log p(y_n)]",
}
"""Where it enters, and the loss of a response that follows; ``sg`` stops the gradient."""

WEIGHTS = {
    "none": "",
    "token": "r_n ",
    "token_detached": "sg(r_n) ",
    "prefix": "w_n ",
}
"""Corrections for strings of an older policy μ: ``r_n = p(y_n)/μ(y_n)``, ``w_n = Π_{i<n} p(y_i)/μ(y_i)``."""

SLOPES = {"k1": "s_n", "k2": "u_n s_n", "k3": "(1 − exp(−u_n)) s_n", "abs": "sign(u_n) s_n", "full": "∇D_n"}
"""Gradient of each of :data:`TERMS` at a fixed prefix, ``s_n = ∇log p(y_n)``."""

WEIGHTED_SLOPES = {
    "k1": "r_n (1 + u_n) s_n",
    "k2": "r_n (½ u_n² + u_n) s_n",
    "k3": "r_n u_n s_n",
    "abs": "r_n (|u_n| + sign(u_n)) s_n",
    "full": "r_n (∇D_n + D_n s_n)",
}
"""The same times ``r_n``, which has a gradient of its own, ``r_n s_n``."""

SYMBOLS = {
    "u_n": "log p(y_n) − log q(y_n)",
    "D_n": "Σ_a p_n(a) log(p_n(a)/q_n(a)), the next-token divergence",
    "s_n": "∇log p(y_n)",
    "r_n": "p(y_n)/μ(y_n), μ the policy that drew the strings",
    "w_n": "Π_{i<n} p(y_i)/μ(y_i)",
    "sg": "stops the gradient",
}
"""What the symbols of the formulas mean."""

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
        if self.placement == "rb" and self.weight == "token_detached":
            raise ValueError("expected the weight none, token or prefix with the placement rb, got token_detached")
        if not self.detach and self.placement != "reward":
            raise ValueError(f"expected detach=False with the placement reward only, got {self.placement}")
        if self.gradient and self.placement != "loss":
            raise ValueError(f"expected a straight-through gradient in the loss only, got placement {self.placement}")

    def __call__(self, batch: Batch) -> Tensor:
        """The penalty of a batch, mean over its strings."""
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
        if self.placement == "rb":
            per_token = self._rao_blackwell(batch, score, ratio)
        elif self.placement == "loss":
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

    def _rao_blackwell(self, batch: Batch, score: Tensor, ratio: Tensor) -> Tensor:
        """Each token's part of the pathwise loss with later divergences on its score."""
        sampler = batch.old if self.weight == "prefix" else None
        d, logp, logq = (x.masked_fill(~batch.mask, 0.0) for x in (TERMS["full"][1](batch), batch.logp, batch.logq))
        numbers = d.detach(), logp.detach(), logq.detach()
        weights = policy_weights(*numbers, batch.mask, estimator="rb", sampler_logp=sampler)
        # The ratio's gradient is its value times the score.
        scored = ratio.masked_fill(~batch.mask, 0.0) if self.weight == "token" else score
        return weights.kl * d + weights.logp * scored

    @property
    def formula(self) -> str:
        """The loss of one response, in symbols."""
        symbol = TERMS[self.estimator][0]
        k = symbol if self.estimator in ("k1", "full") else f"({symbol})"
        w = WEIGHTS[self.weight]
        if self.placement == "rb" and self.weight != "none":
            text = {
                "token": "Σ_n [D_n + sg(Σ_{j>n} D_j) r_n]",
                "prefix": "Σ_n [sg(w_n) D_n + sg(Σ_{j>n} w_j D_j) log p(y_n)]",
            }[self.weight]
        else:
            at_j = {"w_j": w.replace("_n", "_j"), "k_j": k.replace("_n", "_j")}
            text = PLACEMENTS[self.placement].format(w_n=w, k_n=k, **at_j)
        if not self.detach:
            text += f" + Σ_n {w}{k}"
        if self.gradient is not None:
            text += f", with the gradient of {TERMS[self.gradient][0]}"
        return f"L = {text}" + self._over_length

    @property
    def slope(self) -> str:
        """The gradient of that loss, in symbols."""
        k = TERMS[self.estimator][0]
        k = k if self.estimator in ("k1", "full") else f"({k})"
        w = WEIGHTS[self.weight].replace("sg(r_n)", "r_n")
        later = f"{w}{k}".replace("_n", "_j")
        inside = f"{w}{SLOPES[self.gradient or self.estimator]}"
        if self.weight == "token":
            inside = WEIGHTED_SLOPES[self.estimator] if self.gradient is None else f"r_n ({inside[4:]} + {k} s_n)"
        elif self.weight == "prefix":
            inside = f"w_n [{inside[4:]} + {k} Σ_{{i<n}} s_i]"
        if self.placement == "rb":
            inside = {"none": "∇D_n", "token": "∇D_n", "prefix": "w_n ∇D_n"}[self.weight]
            scored = "r_n s_n" if self.weight == "token" else "s_n"
            text = f"Σ_n [{inside} + {scored} Σ_{{j>n}} {'w_j ' if self.weight == 'prefix' else ''}D_j]"
        else:
            text = {
                "loss": f"Σ_n {inside}",
                "reward": f"(Σ_j {later}) Σ_n s_n",
                "reward_to_go": f"Σ_n s_n Σ_{{j≥n}} {later}",
                "advantage": f"Σ_n {w}{k} s_n",
            }[self.placement]
        if not self.detach:
            text += f" + Σ_n {inside}"
        return f"∇L = {text}" + self._over_length

    @property
    def _over_length(self) -> str:
        return ", all divided by the response's length" if self.normalise == "length" else ""

    @property
    def symbols(self) -> dict[str, str]:
        """What the symbols in :attr:`formula` and :attr:`slope` mean."""
        text = (self.formula + self.slope).replace("_j", "_n").replace("_i", "_n")
        return {name: meaning for name, meaning in SYMBOLS.items() if name in text}


def explain(penalty: Penalty, *, off_policy: bool = False) -> GradientReport:
    """What the gradient of ``penalty`` follows, by exact enumeration; see :func:`check_gradient`.

    Example:
        >>> explain(Penalty("k3", "loss")).target
        'token_local_forward'
    """
    return check_gradient(penalty, off_policy=off_policy)
