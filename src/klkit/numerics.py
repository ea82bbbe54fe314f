"""The few numerical forms that everything else is built from.

Three rules live here and nowhere else: logits are widened before any softmax, a token that both
models exclude contributes nothing (in value and in gradient), and a token that only ``q`` excludes
makes the divergence infinite.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

LN2 = 0.6931471805599453

FLOOR = -1e18
"""Stands in for ``-inf`` inside a computation: differences and squares of it stay finite in fp32."""

NEAR = 0.25
"""Log-ratios up to this size go through the series of ``exp(d) - 1 - d``, larger ones through ``exp``."""

MASS_TOLERANCE = 0.05
"""How far a row of probabilities may sum from 1: wide enough for log-probabilities rounded to bf16."""

PRODUCT_WORK = 1 << 24
"""Multiplications from which it pays that oneDNN takes milliseconds to generate the code for a new shape."""

_onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

# By default glibc returns every large block to the system when it is freed, so that each temporary of
# the chunked loops is paid for in page faults: several times the arithmetic. Once a block of this size
# has been freed it keeps those up to this size for reuse. Nothing is touched, so nothing is occupied.
torch.empty(31 << 20, dtype=torch.uint8)


def give_back_memory() -> None:
    """Return what freed blocks still occupy to the system, and large ones from now on at once, where glibc rules.

    The opposite of the setting above, for runs so long that its cost in holes, left by blocks of many sizes freed in
    another order than they were taken, outgrows what it saves. A millisecond or so.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        library.mallopt(-3, 512 << 10)  # M_MMAP_THRESHOLD
        library.malloc_trim(0)


def widen(x: Tensor) -> Tensor:
    """Return ``x`` in at least single precision: half formats become fp32, fp32 and fp64 stay.

    Example:
        >>> import torch
        >>> widen(torch.zeros(2, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The precision in which ``tensors`` are computed with together: single, or what any of them has above it.

    Example:
        >>> import torch
        >>> wide_dtype(torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float16))
        torch.float32
    """
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def linear(
    x: Float[Tensor, "m d"],
    weight: Float[Tensor, "v d"],
    bias: Float[Tensor, " v"] | None = None,
    *,
    out: Float[Tensor, "m v"] | None = None,
) -> Float[Tensor, "m v"]:
    """``x Wᵀ + b``; in single precision on a CPU, and where no gradient is wanted, by oneDNN if torch has it.

    torch leaves such products to its BLAS (MKL), which on other makes of processor runs at a half to a third of their
    rate. oneDNN, which torch carries for half precision, generates code for the processor at hand.

    Args:
        out: where to write the product, if no gradient is wanted.

    Example:
        >>> import torch
        >>> linear(torch.tensor([[1.0, 2.0]]), torch.eye(3, 2)).tolist()
        [[1.0, 2.0, 0.0]]
    """
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    plain = all(t is None or (t.dtype == torch.float32 and t.device.type == "cpu") for t in (x, weight, bias))
    large = x.shape[0] * weight.numel() >= PRODUCT_WORK
    if _onednn_linear is not None and plain and large and not trained and not torch.is_autocast_enabled("cpu"):
        product: Tensor = _onednn_linear(x, weight, bias, "none", [], "")
        return product if out is None else out.copy_(product)
    if out is None:
        return torch.nn.functional.linear(x, weight, bias)
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


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


def paired(logp: Float[Tensor, ...], logq: Float[Tensor, ...]) -> tuple[Float[Tensor, "*b v"], Float[Tensor, "*b v"]]:
    """Two arrays of log-probabilities, checked and brought to one precision of at least fp32.

    Raises:
        ValueError: the shapes differ, or a row does not sum to one (logits, probabilities, NaN).

    Example:
        >>> import torch
        >>> paired(torch.zeros(1), torch.zeros(2))
        Traceback (most recent call last):
        ...
        ValueError: expected log-probabilities of one shape, got (1,) and (2,); divergences do not broadcast
    """
    if logp.shape != logq.shape or logp.ndim == 0:
        raise ValueError(
            f"expected log-probabilities of one shape, got {tuple(logp.shape)} and {tuple(logq.shape)}; "
            f"divergences do not broadcast"
        )
    dtype = torch.promote_types(widen(logp).dtype, widen(logq).dtype)
    logp, logq = logp.to(dtype), logq.to(dtype)
    require_mass(by_rows(mass, logp.detach()), "p")
    require_mass(by_rows(mass, logq.detach()), "q")
    return logp, logq


def mass(logp: Float[Tensor, "*b v"]) -> Float[Tensor, "*b"]:
    """``Σ p`` over the last axis."""
    return logp.exp().sum(-1)


def require_mass(total: Float[Tensor, "*b"], name: str) -> None:
    """Refuse rows whose probabilities do not sum to one; NaN does not either.

    Raises:
        ValueError: a sum is further than ``MASS_TOLERANCE`` from 1.
    """
    wrong = ~((total - 1).abs() <= MASS_TOLERANCE)
    if bool(wrong.any()):
        raise ValueError(
            f"expected log-probabilities whose exponentials sum to 1 in each row, got {float(total[wrong][0]):.6g} "
            f"in a row of {name} ({int(wrong.sum())} such rows of {wrong.numel()}); "
            f"pass klkit.numerics.log_softmax(logits), not logits or probabilities"
        )


def mass_slack(dtype: torch.dtype) -> float:
    """By how much a sum of rounded probabilities may miss a round number."""
    return 1e-12 if dtype == torch.float64 else 1e-6


def floored(logp: Float[Tensor, "*b v"]) -> Float[Tensor, "*b v"]:
    """``logp`` with ``-inf`` replaced by ``FLOOR``, through which no gradient passes.

    Afterwards the difference of two excluded tokens is 0, of an excluded and a possible one about
    ``±FLOOR``, and zero probability times either is 0: no NaN can be formed, neither in a value nor in
    a gradient, and no mask is needed. An infinite divergence is put back by :func:`lost`.
    """
    return logp.clamp(min=FLOOR)


def lost(d: Float[Tensor, "*b v"]) -> Bool[Tensor, "*b"]:
    """Rows of ``d = log q - log p``, both floored, in which ``q`` excludes a token that ``p`` allows."""
    return d.amin(-1) < FLOOR / 2


def split(d: Float[Tensor, "*b"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """``d`` as ``near + far``, one of them 0 and the other ``d``, cut at ``NEAR``; ``d`` must be finite.

    Arithmetic on the two parts replaces selection by a mask, which costs many times as much on a CPU.

    Example:
        >>> import torch
        >>> [part.tolist() for part in split(torch.tensor([0.125, -2.0]))]
        [[0.125, 0.0], [0.0, -2.0]]
    """
    far = torch.nn.functional.hardshrink(d, NEAR)
    return d - far, far


def excess_series(d: Float[Tensor, "*b"]) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
    """Even and odd part of ``exp(d) - 1 - d`` for ``|d| <= NEAR``, to full precision.

    Their sum belongs to ``KL(p‖q)`` and their difference to ``KL(q‖p)``.
    """
    square = d * d
    if d.dtype == torch.float64:
        even = (square / 3628800).add_(1 / 40320).mul(square).add_(1 / 720).mul(square)
        odd = (square / 39916800).add_(1 / 362880).mul(square).add_(1 / 5040).mul(square)
    else:
        even, odd = square / 720, square / 5040
    even = even.add_(1 / 24).mul(square).add_(1 / 2).mul(square)
    odd = odd.add_(1 / 120).mul(square).add_(1 / 6).mul(square).mul(d)
    return even, odd


def excess(d: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """``exp(d) - 1 - d``: non-negative for every ``d``, and accurate for tiny ones.

    ``expm1(d) - d`` cancels for small ``d`` (its leading term is ``d²/2``), so up to ``NEAR`` a series
    takes over. ``-inf`` gives ``+inf``.

    Example:
        >>> import torch
        >>> float(excess(torch.tensor(1e-6, dtype=torch.float64)))
        5.000001666667083e-13
    """
    small = d.abs() <= NEAR
    even, odd = excess_series(torch.where(small, d, 0.0))
    far = torch.where(small, 0.0, d)
    return even + odd + (torch.expm1(far) - far)


def divergence_terms(
    p: Float[Tensor, "*b v"], q: Float[Tensor, "*b v"], d: Float[Tensor, "*b v"]
) -> Float[Tensor, "*b v"]:
    """``q - p - p d = p (exp(d) - 1 - d)`` of each token, with ``d = log q - log p``, both floored.

    No term is negative, and the sum over a row is ``Σ p (log p - log q)`` when both rows sum to one. A
    rounding error of the normalisers enters it squared, while it enters the plain form as it is: that
    is why this form still has five digits where the plain one has none.
    """
    near, far = split(d)
    even, odd = excess_series(near)
    # Where p underflows, p * d is 0 and the term is q, as it is where p is zero.
    return p * (even + odd) + far.sign().square() * (q - p - p * far).clamp(min=0.0)


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


def by_rows(function: Callable[..., Tensor], first: Float[Tensor, "*b v"], *others: Float[Tensor, "*b _"]) -> Tensor:
    """``function`` of the same rows of each tensor, one chunk after another, put together again.

    Large tensors never have a temporary of their own size, and on a CPU the temporaries stay in cache.

    Example:
        >>> import torch
        >>> by_rows(lambda x: x.sum(-1), torch.ones(2, 3, 4)).shape
        torch.Size([2, 3])
    """
    budget = 2 << 20 if first.device.type == "cpu" else 256 << 20
    rows = rows_per_chunk(first.shape[-1], bytes_per_value=first.element_size(), budget=budget)
    chunks = [torch.split(x.reshape(-1, x.shape[-1]), rows) for x in (first, *others)]
    whole = torch.cat([function(*chunk) for chunk in zip(*chunks, strict=True)])
    return whole.reshape((*first.shape[:-1], *whole.shape[1:]))
