"""The divergences one distils by, as one table of names, formulas, and what is known of each.

``p`` is the teacher and ``q`` the student. A name carries its options: ``"adaptive_kl,mass=0.5,head=inside"``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from klkit.divergences.adaptive import HeadRule, adaptive_kl
from klkit.divergences.alpha_beta import alpha_beta_divergence
from klkit.divergences.differentiable import Divergences
from klkit.divergences.f import total_variation
from klkit.divergences.kl import jeffreys, kl, reverse_kl
from klkit.divergences.linear_loss import Weights
from klkit.divergences.mixtures import (
    generalised_jensen_shannon,
    normalised_jensen_shannon,
    skew_kl,
    skew_reverse_kl,
)

CROSS_ENTROPY = "cross_entropy"


@dataclass(frozen=True, eq=False, slots=True)
class TokenLoss:
    """A divergence between next-token laws, as a loss.

    Attributes:
        key: its name in :data:`LOSSES`.
        formula: in words of ``p``, the teacher, and ``q``, the student.
        rows: ``(logp, logq)``, each ``(*b, v)``, to nats ``(*b)``.
        fused: weights of what one visit to the logits computes anyway, if the loss is a sum of that; else None.
        options: as given, by name.
        merging_lowers: whether merging tokens never raises it, so that a top-k bucket gives a lower bound.
        linear_in_p: whether, up to a term without ``q``, it is linear in ``p``, so that draws from ``p`` are enough.
        head: how its head is chosen, if it has one.
    """

    key: str
    formula: str
    rows: Callable[[Tensor, Tensor], Float[Tensor, "*b"]]
    fused: Callable[[Divergences], Weights] | None = None
    options: Mapping[str, float | str] = field(default_factory=dict)
    merging_lowers: bool = True
    linear_in_p: bool = False
    head: HeadRule | None = None

    @property
    def spec(self) -> str:
        """Name and options, as :func:`token_loss` reads them."""
        return ",".join([self.key, *(f"{name}={value}" for name, value in self.options.items())])

    @property
    def swapped(self) -> bool:
        """Whether its head's weight goes to ``KL(q‖p)``."""
        return self.key.endswith("swapped")

    @property
    def mixed(self) -> bool:
        """Whether its fused form needs the Jensen-Shannon divergence."""
        return self.key in ("generalised_js", "normalised_js")


def token_loss(spec: str) -> TokenLoss:
    """The loss that ``spec`` names, with its options.

    Raises:
        ValueError: there is no such loss, or an option is unknown, out of range or no number.

    Example:
        >>> token_loss("adaptive_kl,head=inside").formula
        'w KL(p‖q) + (1 − w) KL(q‖p), w = share of Σ|p − q| in the head of mass 0.5 (inside)'
        >>> import torch
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> round(float(token_loss("reverse_kl").rows(p, q)), 6)
        0.130812
    """
    key, *options = [part.strip() for part in spec.split(",")]
    if key not in LOSSES:
        raise ValueError(f"expected a loss among {', '.join(LOSSES)}, got {key!r}")
    accepted = {name: x.default for name, x in inspect.signature(LOSSES[key]).parameters.items()}
    given: dict[str, float | str] = {}
    for option in options:
        name, _, text = option.partition("=")
        if name not in accepted:
            names = ", ".join(f"{name}={default}" for name, default in accepted.items()) or "none"
            raise ValueError(f"expected options of {key} among: {names}; got {option!r}")
        given[name] = text if isinstance(accepted[name], str) else _number(text, option)
    return LOSSES[key](**given)


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"expected a number, got {option!r}; write for example {option.split('=')[0]}=0.5") from None


def _sum(kl_share: float, reverse_share: float) -> Callable[[Divergences], Weights]:
    """Weights of the two directions."""

    def weigh(found: Divergences) -> Weights:
        one = torch.ones_like(found.kl)
        return Weights(
            kl=kl_share * one if kl_share else None, reverse_kl=reverse_share * one if reverse_share else None
        )

    return weigh


def _adaptive(swapped: bool) -> Callable[[Divergences], Weights]:
    def weigh(found: Divergences) -> Weights:
        assert found.head_weight is not None
        weight = 1 - found.head_weight if swapped else found.head_weight
        return Weights(kl=weight, reverse_kl=1 - weight)

    return weigh


def _adaptive_loss(mass: float, head: str, swapped: bool) -> TokenLoss:
    first, second = ("KL(q‖p)", "KL(p‖q)") if swapped else ("KL(p‖q)", "KL(q‖p)")
    return TokenLoss(
        "adaptive_kl_swapped" if swapped else "adaptive_kl",
        f"w {first} + (1 − w) {second}, w = share of Σ|p − q| in the head of mass {mass:g} ({head})",
        partial(adaptive_kl, mass=mass, head=head, swapped=swapped),
        _adaptive(swapped),
        {"mass": mass, "head": head},
        merging_lowers=False,
        head=HeadRule(mass, head),
    )


def _js_loss(key: str, p_weight: float) -> TokenLoss:
    normalised = key == "normalised_js"
    rows = normalised_jensen_shannon if normalised else generalised_jensen_shannon
    formula = f"{p_weight:g} KL(p‖m) + {1 - p_weight:.4g} KL(q‖m), m = {p_weight:g} p + {1 - p_weight:.4g} q"
    if normalised:
        ends = {0: "KL(p‖q), the end at p_weight=0", 1: "KL(q‖p), the end at p_weight=1"}
        formula = ends.get(p_weight, f"({formula}) / {p_weight * (1 - p_weight):.4g}")  # type: ignore[call-overload]
    probe = torch.tensor([0.5, 0.5]).log()
    rows(probe, probe, p_weight=p_weight)  # refuses a weight that is none
    factor = 4.0 if normalised else 1.0
    return TokenLoss(
        key,
        formula,
        partial(rows, p_weight=p_weight),
        (lambda found: Weights(js=torch.full_like(found.kl, factor))) if p_weight == 0.5 else None,
        {"p_weight": p_weight},
    )


def _forward_kl() -> TokenLoss:
    return TokenLoss("forward_kl", "KL(p‖q) = Σ p (log p − log q)", kl, _sum(1.0, 0.0), linear_in_p=True)


def _reverse_kl() -> TokenLoss:
    return TokenLoss("reverse_kl", "KL(q‖p) = Σ q (log q − log p)", reverse_kl, _sum(0.0, 1.0))


def _sum_kl() -> TokenLoss:
    return TokenLoss("sum_kl", "½ KL(p‖q) + ½ KL(q‖p)", lambda logp, logq: 0.5 * jeffreys(logp, logq), _sum(0.5, 0.5))


def _jeffreys() -> TokenLoss:
    return TokenLoss("jeffreys", "KL(p‖q) + KL(q‖p)", jeffreys, _sum(1.0, 1.0))


def _adaptive_kl(mass: float = 0.5, head: str = "cover") -> TokenLoss:
    return _adaptive_loss(mass, head, swapped=False)


def _adaptive_kl_swapped(mass: float = 0.5, head: str = "cover") -> TokenLoss:
    return _adaptive_loss(mass, head, swapped=True)


def _generalised_js(p_weight: float = 0.5) -> TokenLoss:
    return _js_loss("generalised_js", p_weight)


def _normalised_js(p_weight: float = 0.5) -> TokenLoss:
    return _js_loss("normalised_js", p_weight)


def _skew_kl(p_weight: float = 0.1) -> TokenLoss:
    return TokenLoss(
        "skew_kl",
        f"KL(p‖{p_weight:g} p + {1 - p_weight:.4g} q)",
        partial(skew_kl, p_weight=_share(p_weight, "p_weight")),
        options={"p_weight": p_weight},
    )


def _skew_reverse_kl(q_weight: float = 0.1) -> TokenLoss:
    return TokenLoss(
        "skew_reverse_kl",
        f"KL(q‖{1 - q_weight:.4g} p + {q_weight:g} q)",
        partial(skew_reverse_kl, q_weight=_share(q_weight, "q_weight")),
        options={"q_weight": q_weight},
    )


def _total_variation() -> TokenLoss:
    return TokenLoss("total_variation", "½ Σ |p − q|", total_variation)


def _alpha_beta(p_power: float = 0.2, q_power: float = 0.7) -> TokenLoss:
    rows = partial(alpha_beta_divergence, p_power=p_power, q_power=q_power)
    probe = torch.tensor([0.5, 0.5]).log()
    rows(probe, probe)  # refuses powers that are none
    return TokenLoss(
        "alpha_beta",
        f"alpha-beta divergence, powers {p_power:g} of p and {q_power:g} of q",
        rows,
        options={"p_power": p_power, "q_power": q_power},
        merging_lowers=p_power + q_power == 1,
    )


def _cross_entropy() -> TokenLoss:
    return TokenLoss(
        CROSS_ENTROPY, "−log q(y) of the text's tokens; no teacher", _no_teacher, linear_in_p=True, merging_lowers=False
    )


def _no_teacher(logp: Tensor, logq: Tensor) -> Tensor:
    raise ValueError(f"expected tokens for {CROSS_ENTROPY}, got two laws; it compares the student with a text")


def _share(weight: float, name: str) -> float:
    if not 0 < weight < 1:
        raise ValueError(
            f"expected {name} strictly between 0 and 1, got {weight}; at the ends it is forward_kl or reverse_kl, or 0"
        )
    return weight


LOSSES: dict[str, Callable[..., TokenLoss]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "sum_kl": _sum_kl,
    "jeffreys": _jeffreys,
    "adaptive_kl": _adaptive_kl,
    "adaptive_kl_swapped": _adaptive_kl_swapped,
    "generalised_js": _generalised_js,
    "normalised_js": _normalised_js,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "total_variation": _total_variation,
    "alpha_beta": _alpha_beta,
    CROSS_ENTROPY: _cross_entropy,
}
"""Every loss by its key; a call with options makes it."""
