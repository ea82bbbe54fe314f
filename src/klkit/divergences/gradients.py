"""Closed-form gradients of every divergence with respect to logits.

They are what automatic differentiation through a log-softmax must return, derived apart from it: the
oracle of the tests, and what fused kernels write. Each takes the two rows of log-probabilities and
returns one value a token, ``(*b, v)``; in rows of infinite divergence the gradient is 0, because no
finite change of the logits makes them finite.

For ``D = Σ φ(log p, log q)`` the gradient in the logits behind ``p`` is ``φ' - p Σ φ'``, with ``φ'`` the
derivative of each summand in ``log p``: the second term is what the normalisation takes back.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from klkit.divergences.adaptive import head_weight
from klkit.divergences.mixtures import log_mixture, log_odds
from klkit.numerics import floored, lost, paired

Gradient = Callable[[Tensor, Tensor], Tensor]


def through_softmax(slope: Float[Tensor, "*b v"], logp: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"]:
    """``φ' - p Σ φ'``: a gradient in log-probabilities as a gradient in the logits behind them.

    Example:
        >>> import torch
        >>> through_softmax(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]).log()).tolist()
        [0.5, -0.5]
    """
    return slope - logp.exp() * slope.sum(-1, keepdim=True)


def entropy_grad(logp: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"]:
    """``-p (log p + H(p))``: gradient of ``-Σ p log p``."""
    return through_softmax(-logp.exp() * floored(logp), logp)


def cross_entropy_grad_p(logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"]:
    """``-p (log q - E_p log q)``: gradient of ``-Σ p log q`` in the logits of ``p``."""
    logp, logq = paired(logp, logq)
    gradient = through_softmax(-logp.exp() * floored(logq), logp)
    return _where_finite(gradient, logp, logq)


def cross_entropy_grad_q(logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"]:
    """``q - p``: gradient of ``-Σ p log q`` in the logits of ``q``."""
    return kl_grad_q(logp, logq)


def kl_grad_p(logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"]:
    """``p (log p - log q - KL(p‖q))``: gradient of ``Σ p (log p - log q)`` in the logits of ``p``.

    Example:
        >>> import torch
        >>> p = torch.tensor([0.5, 0.5, 0.0]).log()
        >>> [round(x, 6) for x in kl_grad_p(p, torch.tensor([0.125, 0.375, 0.5]).log()).tolist()][:2]
        [0.274653, -0.274653]
    """
    logp, logq = paired(logp, logq)
    gradient = through_softmax(logp.exp() * (floored(logp) - floored(logq)), logp)
    return _where_finite(gradient, logp, logq)


def kl_grad_q(logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"]:
    """``q - p``: gradient of ``Σ p (log p - log q)`` in the logits of ``q``."""
    logp, logq = paired(logp, logq)
    return _where_finite(logq.exp() - logp.exp(), logp, logq)


def jeffreys_grad_p(logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"]:
    """``p (log p - log q - KL(p‖q)) + p - q``: gradient of ``Σ (p - q)(log p - log q)`` in the logits of ``p``."""
    logp, logq = paired(logp, logq)
    gradient = kl_grad_p(logp, logq) + kl_grad_q(logq, logp)
    return _where_finite(_where_finite(gradient, logp, logq), logq, logp)


def generalised_jensen_shannon_grad_p(
    logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"], *, p_weight: float = 0.5
) -> Float[Tensor, "*b v"]:
    """``w p (log(p/m) - KL(p‖m))``: gradient of ``w KL(p‖m) + (1 - w) KL(q‖m)`` in the logits of ``p``."""
    logp, logq = paired(logp, logq)
    logm = log_mixture(logp, logq, log_odds(p_weight, "p_weight", logp))
    return through_softmax(p_weight * logp.exp() * (floored(logp) - logm), logp)


def generalised_jensen_shannon_grad_q(
    logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"], *, p_weight: float = 0.5
) -> Float[Tensor, "*b v"]:
    """``(1 - w) q (log(q/m) - KL(q‖m))``: gradient of ``w KL(p‖m) + (1 - w) KL(q‖m)`` in the logits of ``q``."""
    return generalised_jensen_shannon_grad_p(logq, logp, p_weight=1 - p_weight)


def skew_kl_grad_p(
    logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"], *, p_weight: float = 0.1
) -> Float[Tensor, "*b v"]:
    """``φ' - p Σ φ'``, ``φ' = p log(p/m) - w p p/m``: gradient of ``KL(p‖w p + (1 - w) q)`` in the logits of ``p``."""
    logp, logq = paired(logp, logq)
    ratio = floored(logp) - log_mixture(logp, logq, log_odds(p_weight, "p_weight", logp))
    return through_softmax(logp.exp() * (ratio - p_weight * ratio.exp()), logp)


def skew_kl_grad_q(
    logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"], *, p_weight: float = 0.1
) -> Float[Tensor, "*b v"]:
    """``φ' - q Σ φ'``, ``φ' = -(1 - w) p q/m``: gradient of ``KL(p‖w p + (1 - w) q)`` in the logits of ``q``."""
    logp, logq = paired(logp, logq)
    ratio = floored(logp) - log_mixture(logp, logq, log_odds(p_weight, "p_weight", logp))
    return through_softmax(-(1 - p_weight) * logq.exp() * ratio.exp(), logq)


def total_variation_grad_p(logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"]:
    """``½ p (s - Σ p s)``, ``s = sign(p - q)``: subgradient of ``½ Σ |p - q|`` in the logits of ``p``."""
    logp, logq = paired(logp, logq)
    p = logp.exp()
    return through_softmax(0.5 * p * (p - logq.exp()).sign(), logp)


def squared_hellinger_grad_p(logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"]:
    """``-½ (√(p q) - p Σ √(p q))``: gradient of ``½ Σ (√p - √q)²`` in the logits of ``p``."""
    logp, logq = paired(logp, logq)
    return through_softmax(-0.5 * (0.5 * (logp + logq)).exp(), logp)


def alpha_divergence_grad_p(
    logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"], *, p_power: float = 0.5
) -> Float[Tensor, "*b v"]:
    """``-(s - p Σ s) / (1 - α)``, ``s = p^α q^(1-α)``: gradient of ``(1 - Σ s)/(α (1 - α))`` in the logits of ``p``."""
    logp, logq = paired(logp, logq)
    return through_softmax(-(p_power * logp + (1 - p_power) * logq).exp() / (1 - p_power), logp)


def alpha_divergence_grad_q(
    logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"], *, p_power: float = 0.5
) -> Float[Tensor, "*b v"]:
    """``-(s - q Σ s) / α``, ``s = p^α q^(1-α)``: gradient of ``(1 - Σ s)/(α (1 - α))`` in the logits of ``q``."""
    return alpha_divergence_grad_p(logq, logp, p_power=1 - p_power)


def alpha_beta_grad_q(
    logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"], *, p_power: float = 0.2, q_power: float = 0.7
) -> Float[Tensor, "*b v"]:
    """``φ' - q Σ φ'``, ``φ' = (q^(a+b) - p^a q^b)/a``: gradient of the alpha-beta divergence in the logits of ``q``.

    At ``a = 0``, ``φ' = q^b (log q - log p)``.
    """
    logp, logq = paired(logp, logq)
    a, b = p_power, q_power
    x, y = floored(logp), floored(logq)
    if a == 0:
        return _where_finite(through_softmax((b * y).exp() * (y - x), logq), logq, logp)
    gradient = through_softmax((((a + b) * y).exp() - (a * x + b * y).exp()) / a, logq)
    return _where_finite(gradient, logp, logq) if b == 0 else gradient


def alpha_beta_grad_p(
    logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"], *, p_power: float = 0.2, q_power: float = 0.7
) -> Float[Tensor, "*b v"]:
    """The same in the logits of ``p``: the divergence with its laws and its powers exchanged is the same."""
    return alpha_beta_grad_q(logq, logp, p_power=q_power, q_power=p_power)


def adaptive_kl_grad_q(
    logp: Float[Tensor, "*b v"], logq: Float[Tensor, "*b v"], *, mass: float = 0.5, head: str = "cover"
) -> Float[Tensor, "*b v"]:
    """``w (q - p) + (1 - w) q (log q - log p - KL(q‖p))``: gradient of the adaptive KL in the logits of ``q``."""
    weight = head_weight(logp, logq, mass=mass, head=head).unsqueeze(-1)
    return weight * kl_grad_q(logp, logq) + (1 - weight) * kl_grad_p(logq, logp)


def swapped(gradient: Gradient) -> Gradient:
    """The same gradient with ``p`` and ``q`` exchanged."""
    return lambda logp, logq: gradient(logq, logp)


def _where_finite(gradient: Tensor, logp: Tensor, logq: Tensor) -> Tensor:
    """``gradient``, and 0 in the rows in which ``q`` excludes a token that ``p`` allows."""
    return gradient.masked_fill(lost(floored(logq) - floored(logp)).unsqueeze(-1), 0.0)


GRADIENTS: dict[str, tuple[Gradient, Gradient]] = {
    "kl": (kl_grad_p, kl_grad_q),
    "reverse_kl": (swapped(kl_grad_q), swapped(kl_grad_p)),
    "jeffreys": (jeffreys_grad_p, swapped(jeffreys_grad_p)),
    "js": (generalised_jensen_shannon_grad_p, generalised_jensen_shannon_grad_q),
    "generalised_js": (generalised_jensen_shannon_grad_p, generalised_jensen_shannon_grad_q),
    "skew_kl": (skew_kl_grad_p, skew_kl_grad_q),
    "skew_reverse_kl": (swapped(skew_kl_grad_q), swapped(skew_kl_grad_p)),
    "total_variation": (total_variation_grad_p, swapped(total_variation_grad_p)),
    "squared_hellinger": (squared_hellinger_grad_p, swapped(squared_hellinger_grad_p)),
    "alpha_divergence": (alpha_divergence_grad_p, alpha_divergence_grad_q),
}
"""Gradients in the logits of ``p`` and of ``q``, by the keys of ``klkit.divergences.DIVERGENCES``."""
