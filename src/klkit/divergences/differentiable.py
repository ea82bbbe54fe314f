"""Divergences, entropies and log-probabilities of rows of raw logits, with gradients in closed form.

Nothing of the logits' size is kept for the backward pass but the logits themselves: it works from them
and a dozen numbers a row, and may write the gradient where they are.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from klkit.divergences import backends
from klkit.divergences.adaptive import HeadRule, share
from klkit.divergences.fused import require_same_shape
from klkit.divergences.sums import RowSums, RowValues, Slopes, norms_of, values
from klkit.numerics import wide_dtype


class Divergences(NamedTuple):
    """Quantities of each row, ``(*b)``, in nats and at least single precision.

    Attributes:
        kl: ``Σ p (log p − log q)``.
        reverse_kl: ``Σ q (log q − log p)``.
        entropy_p: ``−Σ p log p``.
        entropy_q: ``−Σ q log q``.
        logp: ``log p(y)`` of the given tokens; None without tokens.
        logq: ``log q(y)`` of the given tokens; None without tokens.
        js: ``½ Σ p log(p/m) + ½ Σ q log(q/m)``, ``m = ½p + ½q``; None unless asked for.
        head_weight: :func:`klkit.divergences.adaptive.head_weight`, without gradient; None unless asked for.
    """

    kl: Tensor
    reverse_kl: Tensor
    entropy_p: Tensor
    entropy_q: Tensor
    logp: Tensor | None
    logq: Tensor | None
    js: Tensor | None
    head_weight: Tensor | None = None


def divergences(
    logits_p: Float[Tensor, "*b v"],
    logits_q: Float[Tensor, "*b _"],
    tokens: Int[Tensor, "*b"] | None = None,
    *,
    js: bool = False,
    head: HeadRule | None = None,
    overwrite: bool = False,
    backend: str | None = None,
) -> Divergences:
    """``Σ p (log p − log q)``, its reverse, entropies and log-probabilities of rows of logits, all at once.

    Every field is differentiable in both arguments, and any combination of them costs one forward and
    one backward visit to the logits. The gradients are those of :mod:`klkit.divergences.gradients`; a token
    that both laws exclude has gradient 0, and so does the whole of a quantity in a row where it is infinite.

    Shapes: logits ``(*b, v)``, tokens ``(*b)``; each field ``(*b)``, in nats.

    Args:
        logits_p: logits of ``p``, normalised or not, in any floating format; gradients come in the same.
        logits_q: logits of ``q``.
        tokens: tokens whose log-probabilities are wanted.
        js: also the Jensen-Shannon divergence, for another visit.
        head: also how much of the difference is in the head that this gives ``p``, the weight in
            :func:`klkit.divergences.adaptive.adaptive_kl`; for another visit, a short one where the laws are peaked.
        overwrite: let the backward pass write gradients where the logits are, so that it needs no memory;
            the logits must be contiguous, and are lost. Autograd refuses the pass if it needs them elsewhere.
        backend: by default the one that :func:`klkit.divergences.backends.choose` names for this much work.

    Raises:
        ValueError: shapes differ, a logit is NaN or ``+inf``, a row excludes every token, or logits to be
            overwritten are not contiguous.
        RuntimeError: a second derivative is asked for.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 1.0]], requires_grad=True)
        >>> found = divergences(logits, torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
        >>> round(float(found.kl), 6), round(float(found.logp), 6)
        (0.462117, -0.313262)
        >>> found.kl.sum().backward()
        >>> [round(x, 6) for x in logits.grad[0].tolist()]
        [-0.393224, 0.393224]
    """
    require_same_shape(logits_p, logits_q)
    shape, size = logits_p.shape[:-1], logits_p.shape[-1]
    if overwrite and not (logits_p.is_contiguous() and logits_q.is_contiguous()):
        raise ValueError(
            f"expected contiguous logits to overwrite, got strides {logits_p.stride()} and {logits_q.stride()} for "
            f"shape {tuple(logits_p.shape)}; pass overwrite=False, or logits.contiguous()"
        )
    name = backend or backends.choose(logits_p.numel(), logits_p.device, wide_dtype(logits_p))
    backends.get(name, logits_p, logits_q)  # refuses an unknown one here rather than inside autograd
    drawn = torch.zeros(shape, dtype=torch.long, device=logits_p.device) if tokens is None else tokens
    flat = logits_p.reshape(-1, size), logits_q.reshape(-1, size), drawn.reshape(-1)
    found = _Divergences.apply(*flat, js, head, overwrite, name)  # type: ignore[no-untyped-call]
    kl, reverse_kl, entropy_p, entropy_q, logp, logq, mixed, weight = (x.reshape(shape) for x in found)
    return Divergences(
        kl,
        reverse_kl,
        entropy_p,
        entropy_q,
        None if tokens is None else logp,
        None if tokens is None else logq,
        mixed if js else None,
        None if head is None else weight,
    )


class _Divergences(torch.autograd.Function):
    """The quantities of :class:`Divergences` for flat rows, in that order."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, tokens: Tensor, js: bool, head: HeadRule | None, overwrite: bool, name: str
    ) -> Any:
        kernels = backends.get(name, a, b)
        table, weight = sums_and_weight(kernels, a, b, head)
        sums = RowSums(*table.unbind(1))
        found = values(sums)
        norms = norms_of(sums, found)
        mixed = kernels.second_sweep(a, b, norms)[:, :2] if js else torch.zeros_like(norms[:, :2])
        drawn = tokens[:, None]
        logp = a.gather(1, drawn)[:, 0].double() - sums.reference - found.log_mass_p
        logq = b.gather(1, drawn)[:, 0].double() - sums.greatest - found.log_mass_q
        ctx.save_for_backward(a, b, tokens, norms, torch.stack([*row_terms(found), *mixed.unbind(1)]))
        ctx.overwrite, ctx.backend = overwrite, name
        dtype = wide_dtype(a, b)
        wanted = found.kl, found.reverse_kl, found.entropy_p, found.entropy_q, logp, logq, mixed[:, 0]
        weight = weight.to(dtype)
        ctx.mark_non_differentiable(weight)
        return *(x.to(dtype) for x in wanted), weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "expected one derivative of klkit.divergences.differentiable, got create_graph=True; its gradients are "
                "closed forms without a graph: use klkit.divergences on log_softmax(logits) for second derivatives"
            )
        a, b, tokens, norms, terms = ctx.saved_tensors
        slopes = torch.stack(slopes_of(grads[:7], terms), 1)
        outs: list[Tensor | None] = [None, None]
        for i, x in enumerate((a, b)):
            if ctx.needs_input_grad[i]:
                outs[i] = x.detach() if ctx.overwrite else torch.empty_like(x, memory_format=torch.contiguous_format)
        backends.get(ctx.backend, a, b).gradients(a.detach(), b.detach(), tokens, norms, slopes, *outs)
        if ctx.overwrite:
            # Compiled kernels write behind autograd's back, which has to know.
            torch.autograd.graph.increment_version([x for x in outs if x is not None])
        return (*outs, None, None, None, None, None)


def sums_and_weight(
    kernels: ModuleType, a: Float[Tensor, "m v"], b: Float[Tensor, "m v"], head: HeadRule | None
) -> tuple[Float[Tensor, "m _"], Float[Tensor, " m"]]:
    """A backend's table of sums, and the head's weight of each row, 0 where it is not asked for."""
    if head is None:
        table: Tensor = kernels.row_sums(a, b)
        return table, torch.zeros_like(table[:, 0])
    table, gaps = kernels.sums_and_gaps(a, b, head)
    return table, share(gaps)


def row_terms(found: RowValues) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What :func:`slopes_of` needs of the forward pass beside the mixture's terms."""
    return found.kl, found.reverse_kl, found.entropy_p, found.entropy_q


def slopes_of(grads: tuple[Tensor, ...], terms: Float[Tensor, "6 m"]) -> Slopes:
    """The coefficients of the logits' gradients, from those of the seven quantities of :class:`Divergences`.

    Args:
        grads: one ``(m,)`` a quantity, in their order.
        terms: ``KL``, its reverse, both entropies, the Jensen-Shannon divergence and ``KL(p‖½p + ½q)`` of each row.
    """
    kl, reverse_kl, entropy_p, entropy_q, js, kl_p = terms
    k, r, h, g, u, v, j = (grad.double() for grad in grads)
    # An infinite row stays infinite under any small step.
    k, kl = k.masked_fill(kl == torch.inf, 0.0), kl.masked_fill(kl == torch.inf, 0.0)
    r, reverse_kl = r.masked_fill(reverse_kl == torch.inf, 0.0), reverse_kl.masked_fill(reverse_kl == torch.inf, 0.0)
    kl_q = 2 * js - kl_p
    return Slopes(
        constant_p=-k * kl - h * entropy_p - u - 0.5 * j * kl_p,
        level_p=-h,
        drift_p=-k,
        gap_p=-r,
        mixed_p=0.5 * j,
        drawn_p=u,
        constant_q=-r * reverse_kl - g * entropy_q - v - 0.5 * j * kl_q,
        level_q=-g,
        drift_q=r,
        gap_q=k,
        mixed_q=0.5 * j,
        drawn_q=v,
    )
