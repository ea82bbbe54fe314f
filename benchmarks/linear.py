"""KL(p‖q) and its gradient from hidden states and output heads: klkit beside the usual ways.

    python benchmarks/linear.py [--threads 2] [--json PATH]

512 rows, width 768, vocabulary 50,257, float32; the gradient in the hidden states and the head of p. The least work
is four matrix products: both logits, the gradient of the hidden states and that of the head. They are timed alone as
torch multiplies, and with oneDNN for the three that gain by it (klkit.numerics.linear, which klkit uses).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from common import Table, begin, milliseconds, options, peak_memory, peak_of, ratio, report, side_by_side
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from klkit.divergences import backends
from klkit.divergences.linear import Head
from klkit.divergences.linear_loss import Weights, linear_loss
from klkit.numerics import linear

LIMIT, NAIVE = "four matrix products, torch", "naive, all logits"
PRODUCTS = "four matrix products, oneDNN"
LIGER, CHUNK = "Liger chunked_loss", 128
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(rows: int, width: int, size: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """Hidden states and head of p, to be trained, and of a q near it."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(rows, width, generator=generator)
    w = torch.randn(size, width, generator=generator).mul_(3 / width**0.5)
    near_h, near_w = (x + 0.05 * x.std() * torch.randn(x.shape, generator=generator) for x in (h, w))
    return h.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), near_h.to(dtype), near_w.to(dtype)


def kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    log_p, log_q = logits_p.float().log_softmax(-1), logits_q.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def naive(h: Tensor, w: Tensor, h_q: Tensor, w_q: Tensor) -> None:
    (kl(h @ w.t(), h_q @ w_q.t()) / len(h)).backward()


def checkpointed(h: Tensor, w: Tensor, h_q: Tensor, w_q: Tensor) -> None:
    """Chunks of rows whose logits are computed again in the backward pass."""

    def part(h: Tensor, w: Tensor, h_q: Tensor) -> Tensor:
        return kl(h @ w.t(), h_q @ w_q.t())

    chunks = zip(h.split(CHUNK), h_q.split(CHUNK), strict=True)
    (sum(checkpoint(part, a, w, b, use_reentrant=False) for a, b in chunks) / len(h)).backward()


def klkit_loss(backend: str, h: Tensor, w: Tensor, h_q: Tensor, w_q: Tensor) -> None:
    weights = Weights(kl=torch.full((len(h),), 1 / len(h)))
    linear_loss(h, Head(w), h_q, Head(w_q), None, weights, backend=backend)[0].backward()


def liger(compiled: bool, h: Tensor, w: Tensor, h_q: Tensor, w_q: Tensor) -> None:
    """Its generalised JSD at beta = 1 is KL(student‖teacher), the student being p."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=compiled, chunk_size=CHUNK
    )
    loss(h, w, h_q, w_q, torch.zeros(len(h), dtype=torch.long)).backward()


def trl(h: Tensor, w: Tensor, h_q: Tensor, w_q: Tensor) -> None:
    """Its chunked divergence at beta = 1, as its trainers call it."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(h, w, None, h_q, w_q, None, 1.0)
    divergence.mean().backward()


@torch.no_grad()
def products(multiply: Callable[[Tensor, Tensor], Tensor], h: Tensor, w: Tensor, h_q: Tensor, w_q: Tensor) -> Tensor:
    """The products alone, on logits that are thrown away."""
    multiply(h, w)
    slopes = multiply(h_q, w_q)
    multiply(slopes, w.t())
    return slopes.t() @ h


def available(quick: bool) -> list[str]:
    """The backends that this machine can run; with ``quick`` those that compile nothing."""
    names = [name for name in backends.BACKENDS if name != "native" or find_spec("numba") is not None]
    return [name for name in names if name == "eager" or not quick]


def work_on(x: Inputs, quick: bool) -> dict[str, Callable[[], object]]:
    work: dict[str, Callable[[], object]] = {
        LIMIT: partial(products, torch.nn.functional.linear, *x),
        PRODUCTS: partial(products, linear, *x),
        NAIVE: partial(naive, *x),
        "checkpointed chunks": partial(checkpointed, *x),
    }
    if find_spec("liger_kernel") is not None:
        work[f"{LIGER}, eager"] = partial(liger, False, *x)
        if not quick:
            work[f"{LIGER}, compiled"] = partial(liger, True, *x)
    if find_spec("trl") is not None:
        work["TRL chunked divergence"] = partial(trl, *x)
    return work | {f"klkit, {name}": partial(klkit_loss, name, *x) for name in available(quick)}


def half_precision(rows: int, width: int, size: int) -> Table:
    """Error of the gradients from bf16 weights, against double precision on the same weights."""
    h, w, h_q, w_q = inputs(rows, width, size, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (h, w)]
    log_p = (exact[0] @ exact[1].t()).log_softmax(-1)
    log_q = (h_q.double() @ w_q.double().t()).log_softmax(-1)
    ((log_p.exp() * (log_p - log_q)).sum() / rows).backward()
    lines = []
    for name, function in ((NAIVE, naive), ("klkit", partial(klkit_loss, "eager"))):
        h.grad = w.grad = None
        function(h, w, h_q, w_q)
        errors = [(x.grad.double() - e.grad).norm() / e.grad.norm() for x, e in zip((h, w), exact, strict=True)]
        lines.append([name, *(f"{100 * float(error):.2f} %" for error in errors)])
    title = f"Relative error of the gradient, bf16 weights and hidden states, {rows} x {width} x {size}"
    return Table(title, ["", "in the hidden states", "in the head"], lines)


def main() -> None:
    arguments = options(__doc__, rounds=7).parse_args()
    begin(arguments)
    shape = (8, 16, 300) if arguments.quick else (512, 768, 50257)
    if arguments.peak:
        work_on(inputs(2 * CHUNK, 16, 300), False)[arguments.peak]()  # compiles, and loads what is loaded once
        torch._dynamo.reset()
        x = inputs(*shape)
        print(peak_of(work_on(x, False)[arguments.peak]))
        return
    x = inputs(*shape)
    work = work_on(x, arguments.quick)

    def forget() -> None:
        x[0].grad = x[1].grad = None

    seconds = side_by_side({name: (forget, run) for name, run in work.items()}, arguments.rounds)
    memory = {}
    if not arguments.quick:
        memory = {
            n: peak_memory(__file__, n, ["--threads", str(arguments.threads)]) for n in work if "product" not in n
        }
    rows = [
        [
            name,
            milliseconds(taken),
            f"{ratio(seconds, name, LIMIT):.2f}",
            f"{ratio(seconds, name, PRODUCTS):.2f}",
            f"{memory[name]:.0f}" if name in memory else "",
            f"{100 * memory[name] / memory[NAIVE]:.0f} %" if name in memory else "",
        ]
        for name, taken in seconds.items()
    ]
    title = "KL and its gradient from hidden states and heads, {} x {} x {}, fp32".format(*shape)
    columns = ["", "ms (least)", "x torch's", "x oneDNN's", "peak MiB", "of naive"]
    error = half_precision(*((8, 16, 300) if arguments.quick else (128, 512, 50257)))
    report([Table(title, columns, rows), error], seconds, arguments)


if __name__ == "__main__":
    sys.exit(main())
