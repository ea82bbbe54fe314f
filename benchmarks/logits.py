"""Every per-token quantity from two tensors of logits: klkit's backends beside what else can be installed.

    python benchmarks/logits.py [--threads 2] [--json PATH]

Quantities: KL(p‖q), KL(q‖p), both entropies, both log-probabilities of the drawn token, the variances of log p and of
log p − log q under p, and whether both models prefer the same token. The *limit* is the time it takes to read both
tensors once; for forward and backward together, to read both twice and write one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from common import MEBI, Table, Work, begin, milliseconds, options, peak_memory, peak_of, ratio, report, side_by_side
from torch import Tensor
from torch.nn import functional as F

from klkit.divergences import backends
from klkit.divergences.differentiable import divergences
from klkit.divergences.sums import RowSums, values

SHAPES = ((512, 50257), (256, 151936))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LIMIT, NAIVE, COMPILED = "read both once (limit)", "naive PyTorch", "torch.compile of the naive"
GRADIENT_LIMIT = "read both twice, write one (limit)"


def naive(a: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """All quantities as they are usually written."""
    log_p, log_q = F.log_softmax(a.float(), -1), F.log_softmax(b.float(), -1)
    p, q, ratio = log_p.exp(), log_q.exp(), log_p - log_q
    kl, mean = (p * ratio).sum(-1), (p * log_p).sum(-1)
    return (
        kl,
        -(q * ratio).sum(-1),
        -mean,
        -(q * log_q).sum(-1),
        log_p.gather(-1, y[:, None])[:, 0],
        log_q.gather(-1, y[:, None])[:, 0],
        (p * (log_p - mean[:, None]).square()).sum(-1),
        (p * (ratio - kl[:, None]).square()).sum(-1),
        log_p.argmax(-1) == log_q.argmax(-1),
    )


def naive_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(p‖q) alone."""
    log_p, log_q = F.log_softmax(a.float(), -1), F.log_softmax(b.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def torch_kl_div(a: Tensor, b: Tensor) -> Tensor:
    """KL(p‖q) alone by F.kl_div, whose first argument is q."""
    log_p, log_q = F.log_softmax(a.float(), -1), F.log_softmax(b.float(), -1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def torchmetrics_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(p‖q) alone by torchmetrics, from log-probabilities."""
    from torchmetrics.functional import kl_divergence

    log_p, log_q = F.log_softmax(a.float(), -1), F.log_softmax(b.float(), -1)
    return kl_divergence(log_p, log_q, log_prob=True, reduction="none")


def klkit_rows(backend: str, a: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """All quantities from one visit to the logits."""
    sums = RowSums(*backends.get(backend, a, b).row_sums(a, b).unbind(1))
    found = values(sums)
    drawn_p, drawn_q = (z.gather(-1, y[:, None])[:, 0].double() for z in (a, b))
    log_p = drawn_p - sums.reference - found.log_mass_p
    log_q = drawn_q - sums.greatest - found.log_mass_q
    return (*found, log_p, log_q, sums.top_p == sums.top_q)


def read(x: Tensor) -> Tensor:
    """Read a tensor once, whatever its format holds."""
    return x.reshape(-1).view(torch.float32).sum() if x.numel() % 2 == 0 else x.sum()


def with_gradient(function: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor | None:
    """Gradient of the summed divergence in the logits of p."""
    leaf = a.detach().requires_grad_()
    function(leaf, b).sum().backward()
    return leaf.grad


def klkit_gradient(backend: str, a: Tensor, b: Tensor) -> Tensor | None:
    """The same, written over the logits of p."""
    leaf = a.detach().requires_grad_()
    divergences(leaf, b, overwrite=True, backend=backend).kl.sum().backward()
    return leaf.grad


def available(quick: bool = False) -> list[str]:
    """The backends that this machine can run; with ``quick`` those that compile nothing."""
    names = [name for name in backends.BACKENDS if name != "native" or find_spec("numba") is not None]
    return [name for name in names if name == "eager" or not quick]


def inputs(rows: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of p and of a q near it, and drawn tokens."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, size, generator=generator).mul_(3)
    b = torch.randn(rows, size, generator=generator).mul_(0.3).add_(a)
    return a.to(dtype), b.to(dtype), torch.randint(size, (rows,), generator=generator)


def forward_work(a: Tensor, b: Tensor, y: Tensor, quick: bool) -> dict[str, Callable[[], object]]:
    work = {
        LIMIT: lambda: (read(a), read(b)),
        NAIVE: lambda: naive(a, b, y),
        "F.kl_div (KL only)": lambda: torch_kl_div(a, b),
    }
    if find_spec("torchmetrics") is not None:
        work["torchmetrics (KL only)"] = lambda: torchmetrics_kl(a, b)
    if not quick:
        work[COMPILED] = partial(torch.compile(naive, dynamic=True), a, b, y)
    return work | {f"klkit, {name}": partial(klkit_rows, name, a, b, y) for name in available(quick)}


def gradient_work(a: Tensor, b: Tensor, quick: bool) -> dict[str, Work]:
    kept, out = a.clone(), torch.empty_like(a)

    def restore() -> None:
        a.copy_(kept)

    def limit() -> None:
        read(a), read(b), torch.sub(a, b, out=out)

    work: dict[str, Work] = {GRADIENT_LIMIT: limit, NAIVE: lambda: with_gradient(naive_kl, a, b)}
    if not quick:
        work[COMPILED] = partial(with_gradient, torch.compile(naive_kl, dynamic=True), a, b)
    return work | {
        f"klkit, {name}, in place": (restore, partial(klkit_gradient, name, a, b)) for name in available(quick)
    }


def compared(title: str, seconds: dict[str, list[float]], limit: str, memory: dict[str, float], logits: float) -> Table:
    """Times beside the limit and the naive form, and extra memory in units of one tensor of logits."""
    rows = [
        [
            name,
            milliseconds(taken),
            f"{ratio(seconds, name, limit):.2f}",
            f"{ratio(seconds, NAIVE, name):.1f}",
            f"{memory[name] / logits:.2f}" if name in memory else "",
        ]
        for name, taken in seconds.items()
    ]
    return Table(title, ["", "ms (least)", "x limit", "x faster", "extra memory"], rows)


@torch.no_grad()
def curve(title: str, cases: dict[str, tuple[int, int, int]], arguments: argparse.Namespace) -> Table:
    """Nanoseconds a position (an entry of both tensors) for each case of (rows, vocabulary, threads)."""
    lines: dict[str, list[str]] = {}
    for rows, size, threads in cases.values():
        torch.set_num_threads(threads)
        seconds = side_by_side(forward_work(*inputs(rows, size, torch.float32), arguments.quick), arguments.rounds)
        for name, taken in seconds.items():
            if "only" not in name:
                position = statistics.median(taken) / (rows * size)
                lines.setdefault(name, [name]).append(f"{position * 1e9:.2f}")
    begin(arguments)
    return Table(f"All quantities, fp32: nanoseconds a position. {title}", ["", *cases], list(lines.values()))


def report_peak(arguments: argparse.Namespace) -> None:
    """Extra memory of one piece of work, ``KIND/DTYPE/ROWS/SIZE/NAME``, in this process."""
    kind, dtype, rows, size, name = arguments.peak.split("/", 4)

    def one(count: int) -> Callable[[], object]:
        a, b, y = inputs(count, int(size), DTYPES[dtype])
        if kind == "forward":
            return torch.no_grad()(forward_work(a, b, y, False)[name])
        work = gradient_work(a, b, False)[name]
        return work[1] if isinstance(work, tuple) else work

    one(8)()  # compiles, and loads what is loaded once
    print(peak_of(one(int(rows))))


def main() -> None:
    arguments = options(__doc__, rounds=7).parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        report_peak(arguments)
        return
    shapes = ((4, 300),) if arguments.quick else SHAPES
    tables, kept = [], {}
    for rows, size in shapes:
        for dtype, precision in DTYPES.items():
            a, b, y = inputs(rows, size, precision)
            with torch.no_grad():
                forward = side_by_side(forward_work(a, b, y, arguments.quick), arguments.rounds)
            gradient = side_by_side(gradient_work(a, b, arguments.quick), arguments.rounds)
            for kind, seconds, limit in (("forward", forward, LIMIT), ("gradient", gradient, GRADIENT_LIMIT)):
                where = f"{kind}/{dtype}/{rows}/{size}"
                memory = {}
                if (rows, size) == SHAPES[0]:
                    wanted = [name for name in seconds if "limit" not in name]
                    flags = ["--threads", str(arguments.threads)]
                    memory = {name: peak_memory(__file__, f"{where}/{name}", flags) for name in wanted}
                what = "All quantities" if kind == "forward" else "KL and its gradient in the logits of p"
                logits = rows * size * precision.itemsize / MEBI
                tables.append(compared(f"{what}, {rows} x {size}, {dtype}", seconds, limit, memory, logits))
                kept[where] = seconds
    sizes = (300,) if arguments.quick else (8192, 32000, 50257, 151936, 262144)
    counts = (4,) if arguments.quick else (1, 16, 64, 256, 1024)
    rows, size = shapes[0]
    some, used = min(rows, 128), arguments.threads
    for title, cases in (
        (f"Vocabulary, {some} rows", {f"V = {v}": (some, v, used) for v in sizes}),
        (f"Rows, V = {size}", {f"{n} rows": (n, size, used) for n in counts}),
        (f"Threads, {rows} x {size}", {f"{t} threads": (rows, size, t) for t in sorted({1, used})}),
    ):
        tables.append(curve(title, cases, arguments))
    report(tables, kept, arguments)


if __name__ == "__main__":
    sys.exit(main())
