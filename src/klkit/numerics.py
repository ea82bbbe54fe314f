"""The few numerical forms that everything else is built from.

Three rules live here and nowhere else: logits are widened before any softmax, a token that both
models exclude contributes nothing (in value and in gradient), and a token that only ``q`` excludes
makes the divergence infinite.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

LN2 = 0.6931471805599453


def widen(x: Tensor) -> Tensor:
    """Return ``x`` in at least single precision: half formats become fp32, fp32 and fp64 stay.

    Example:
        >>> import torch
        >>> widen(torch.zeros(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def log_softmax(logits: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"]:
    """Log-probabilities ``z - log Σ exp z`` over the last axis, never computed below fp32.

    Shapes: logits ``(*b, v)`` to nats ``(*b, v)``. ``-inf`` logits (masked tokens) stay ``-inf``.

    Raises:
        ValueError: a logit is NaN or ``+inf``, or a row is ``-inf`` throughout.

    Example:
        >>> import torch
        >>> log_softmax(torch.tensor([0.0, 0.0], dtype=torch.float16)).exp().tolist()
        [0.5, 0.5]
    """
    logp = torch.log_softmax(widen(logits), dim=-1)
    # A NaN anywhere, a +inf, or an empty row all surface as NaN here, at the price of one sum.
    if torch.isnan(logp.sum()):
        bad = torch.isnan(logp).any(-1).reshape(-1).nonzero().reshape(-1)
        if len(bad):
            raise ValueError(
                f"expected logits that are finite or -inf, with one finite entry in each row; "
                f"row {int(bad[0])} of {logp[..., 0].numel()} is not ({len(bad)} such rows). "
                f"A NaN usually means an overflow in half precision: load the model with dtype=float32."
            )
    return logp


def masked_difference(
    a: Float[Tensor, "*b v"], b: Float[Tensor, "*b v"], support: Float[Tensor, "*b v"]
) -> Float[Tensor, "*b v"]:
    """``a - b`` where ``support`` is above ``-inf``, and 0 elsewhere, clean in value and gradient.

    Both operands are replaced *before* the subtraction: ``-inf - -inf`` is never formed, so no NaN
    can leak back through the unselected branch.

    Shapes: three of ``(*b, v)`` to ``(*b, v)``.
    """
    absent = support == -torch.inf
    return a.masked_fill(absent, 0.0) - b.masked_fill(absent, 0.0)


def excess(d: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"]:
    """``exp(d) - 1 - d``: non-negative for every ``d``, and accurate for tiny ones.

    ``expm1(d) - d`` cancels for small ``d`` (its leading term is ``d²/2``), so below 0.1 a series
    takes over; the first term left out is ``d⁸/8!``, a relative error under 1e-11.

    Example:
        >>> import torch
        >>> float(excess(torch.tensor(1e-6, dtype=torch.float64)))
        5.000001666667083e-13
    """
    small = d.abs() < 0.1
    near = torch.where(small, d, 0.0)
    series = near * near * (0.5 + near * (1 / 6 + near * (1 / 24 + near * (1 / 120 + near * (1 / 720 + near / 5040)))))
    far = torch.where(small, 0.0, d)
    return torch.where(small, series, torch.expm1(far) - far)


def log1mexp(x: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """``log(1 - exp(x))`` for ``x <= 0`` without cancellation (M. Mächler, 2012).

    Example:
        >>> import torch
        >>> round(float(log1mexp(torch.tensor(-1e-8, dtype=torch.float64))), 6)
        -18.420681
    """
    return torch.where(x > -LN2, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def rows_per_chunk(width: int, *, bytes_per_value: int = 4, budget: int = 2 << 20) -> int:
    """How many rows of ``width`` values fit in ``budget`` bytes, and at least one.

    Work over the vocabulary goes through in chunks of this many rows: small enough to stay in a
    core's cache, which is also why nothing of the size of all the logits is ever held.

    Example:
        >>> rows_per_chunk(50257)
        10
    """
    return max(1, budget // (width * bytes_per_value))
