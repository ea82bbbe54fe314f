"""The kernels on a GPU, beside what it can do at all: to be run where there is one.

    python benchmarks/gpu.py [--rounds 20] [--json benchmarks/results/gpu.json]
    python benchmarks/gpu.py --device cpu --quick            # shows that it runs

Measured in the same run: the rate at which memory is read and copied, and that of bf16 matrix products. Then, for four
vocabularies in bf16 and fp32: all quantities from logits (the limit is to read both tensors once), forward and backward
in place (to read both twice and write one), and from hidden states and heads (the four matrix products alone). Values
are compared with double precision on a few rows. The last table says which targets are met, and whether the Triton
kernel of gpu_triton.py has earned its place: it has to beat the compiled one by more than 15 %.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from common import Table, options, report
from logits import DTYPES, klkit_gradient, naive, naive_kl, with_gradient
from torch import Tensor

from klkit.divergences.backends import eager, get
from klkit.divergences.linear import Head
from klkit.divergences.linear_loss import Weights, linear_loss
from klkit.divergences.sums import RowSums, values

VOCABULARIES = (50257, 128256, 151936, 262144)
POSITIONS = 1 << 30  # entries of one tensor of logits
WIDTH, HIDDEN_ROWS = 4096, 8192
CHECKED = 8
INDUCTOR, TRITON, NAIVE = "klkit, inductor", "Triton kernel", "naive PyTorch"
FORWARD, BACKWARD, LINEAR, MARGIN = 0.85, 0.80, 1.3, 1.15


class Clock:
    """Times work on a device: by its own events where it has them."""

    def __init__(self, device: str, rounds: int) -> None:
        self.device, self.rounds = device, rounds

    def seconds(self, work: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> list[float]:
        """Seconds of each round, after two that warm up."""
        return [self._once(work, prepare) for _ in range(self.rounds + 2)][2:]

    def _once(self, work: Callable[[], object], prepare: Callable[[], object]) -> float:
        prepare()
        if self.device == "cpu":
            began = time.perf_counter()
            work()
            return time.perf_counter() - began
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def ceilings(clock: Clock, quick: bool) -> dict[str, float]:
    """Bytes a second read, bytes a second read and written by a copy, and bf16 operations a second."""
    x = torch.ones(1 << (16 if quick else 30), device=clock.device)
    y = torch.empty_like(x)
    side = 64 if quick else 8192
    m = torch.randn(side, side, device=clock.device, dtype=torch.bfloat16)
    return {
        "read": x.nbytes / min(clock.seconds(x.amax) + clock.seconds(x.sum)),
        "copy": 2 * x.nbytes / min(clock.seconds(lambda: y.copy_(x))),
        "products": 2 * side**3 / min(clock.seconds(lambda: m @ m)),
    }


def inputs(rows: int, size: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(rows, size, generator=generator, device=device).mul_(3)
    b = torch.randn(rows, size, generator=generator, device=device).mul_(0.3).add_(a)
    return a.to(dtype), b.to(dtype)


def kernels_of(quick: bool, device: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """What makes the table of row sums."""
    found = {"klkit, eager": eager.row_sums}
    if not quick:
        found[INDUCTOR] = get("inductor").row_sums
    if device != "cpu" and find_spec("triton") is not None:
        import gpu_triton

        many = torch.cuda.get_device_properties(device).multi_processor_count
        for lanes, width, warps in ((128, 16, 4), (256, 16, 8), (256, 8, 4), (512, 8, 8)):

            def row_sums(a: Tensor, b: Tensor, lanes: int = lanes, width: int = width, warps: int = warps) -> Tensor:
                splits = max(1, 2 * many // len(a))
                return gpu_triton.row_sums(a, b, splits=splits, lanes=lanes, width=width, warps=warps)

            found[f"{TRITON}, {lanes} x {width}, {warps} warps"] = row_sums
    return found


def all_quantities(row_sums: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    return values(RowSums(*row_sums(a, b).unbind(1))).kl


def liger(device: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Liger's Triton kernel of the generalised JSD, which at beta = 0 is KL(p‖q), from log-probabilities."""
    if device == "cpu" or find_spec("liger_kernel") is None or find_spec("triton") is None:
        return {}
    from liger_kernel.transformers import LigerJSD

    loss = LigerJSD(beta=0.0)  # of (input, target): KL(target‖input)
    return {"Liger JSD (mean KL only)": lambda a, b: loss(b.log_softmax(-1), a.log_softmax(-1))}


def forward(clock: Clock, a: Tensor, b: Tensor, read: float, quick: bool) -> dict[str, tuple[float, float, float]]:
    """Seconds, share of the limit, and relative error of KL of each form."""
    tokens = torch.zeros(len(a), dtype=torch.long, device=a.device)
    forms = {NAIVE: lambda a, b: naive(a, b, tokens[: len(a)])[0]}
    if not quick:
        compiled = torch.compile(naive, dynamic=True)
        forms["torch.compile of the naive"] = lambda a, b: compiled(a, b, tokens[: len(a)])[0]
    forms |= {name: partial(all_quantities, kernel) for name, kernel in kernels_of(quick, clock.device).items()}
    few = a[:CHECKED], b[:CHECKED]
    exact = all_quantities(eager.row_sums, *(x.double() for x in few))
    found = {}
    for name, form in (forms | liger(clock.device)).items():
        try:
            seconds = statistics.median(clock.seconds(partial(form, a, b)))
        except Exception as problem:  # out of memory, or a kernel that does not compile here: the others go on
            print(f"{name} left out: {problem}", file=sys.stderr)
            continue
        value, true = form(*few).double(), exact
        error = float(((value - (true if value.ndim else true.mean())) / true.mean()).abs().max())
        found[name] = seconds, (a.nbytes + b.nbytes) / read / seconds, error
    return found


def backward(clock: Clock, a: Tensor, b: Tensor, rates: dict[str, float], quick: bool) -> dict[str, tuple[float, ...]]:
    """Seconds, share of the limit, and relative error of the gradient of KL in the logits of p."""
    kept = a.clone()
    names = ["eager"] if quick else ["eager", "inductor"]
    forms: dict[str, Callable[[Tensor, Tensor], Tensor | None]] = {
        NAIVE: lambda a, b: with_gradient(naive_kl, a, b),
        **{f"klkit, {name}": partial(klkit_gradient, name) for name in names},
    }
    limit = (a.nbytes + b.nbytes) / rates["read"] + (a.nbytes + b.nbytes + a.nbytes) / rates["copy"]
    exact = with_gradient(naive_kl_double, a[:CHECKED].double(), b[:CHECKED].double())
    found = {}
    for name, form in forms.items():
        try:
            seconds = statistics.median(clock.seconds(partial(form, a, b), lambda: a.copy_(kept)))
        except Exception as problem:
            print(f"{name} left out: {problem}", file=sys.stderr)
            continue
        gradient = form(kept[:CHECKED].clone(), b[:CHECKED])
        found[name] = seconds, limit / seconds, float((gradient.double() - exact).norm() / exact.norm())
    a.copy_(kept)
    return found


def naive_kl_double(a: Tensor, b: Tensor) -> Tensor:
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def linear(clock: Clock, size: int, quick: bool) -> dict[str, tuple[float, float]]:
    """Seconds from bf16 hidden states and heads, forward and backward, and how many times the four products that is."""
    rows, width = (8, 16) if quick else (HIDDEN_ROWS, WIDTH)
    generator = torch.Generator(clock.device).manual_seed(0)
    make = partial(torch.randn, generator=generator, device=clock.device, dtype=torch.bfloat16)
    h, w = make(rows, width), make(size, width).div_(width**0.5)
    h_q, w_q = (x + 0.05 * make(x.shape) * x.std() for x in (h, w))
    trained = [x.requires_grad_() for x in (h, w)]
    weights = Weights(kl=torch.full((rows,), 1 / rows, device=clock.device))

    @torch.no_grad()
    def products() -> None:
        for part, other in zip(h.split(4096), h_q.split(4096), strict=True):
            part @ w.t()
            slopes = other @ w_q.t()
            slopes @ w
            slopes.t() @ part

    def loss(backend: str) -> None:
        linear_loss(h, Head(w), h_q, Head(w_q), None, weights, backend=backend)[0].backward()

    work: dict[str, Callable[[], object]] = {"four matrix products": products}
    work |= {f"klkit, {name}": partial(loss, name) for name in (["eager"] if quick else ["eager", "inductor"])}

    def forget() -> None:
        for x in trained:
            x.grad = None

    seconds = {name: statistics.median(clock.seconds(function, forget)) for name, function in work.items()}
    return {name: (taken, taken / seconds["four matrix products"]) for name, taken in seconds.items()}


def table(title: str, found: dict[str, tuple[float, float, float]]) -> Table:
    rows = [[name, f"{s * 1e3:.3f}", f"{100 * share:.0f} %", f"{e:.0e}"] for name, (s, share, e) in found.items()]
    return Table(title, ["", "ms", "of the limit", "relative error"], rows)


def verdicts(kept: dict[str, dict[str, tuple[float, ...]]]) -> Table:
    """Whether each target is met, by the worst of its cases."""

    def worst(kind: str, name: str, column: int, least: bool) -> float:
        cases = [found[name][column] for title, found in kept.items() if title.startswith(kind) and name in found]
        return (min if least else max)(cases) if cases else float("nan")

    ahead = []
    for title, found in kept.items():
        own = [taken[0] for name, taken in found.items() if name.startswith(TRITON)]
        if title.startswith("forward") and own and INDUCTOR in found:
            ahead.append(found[INDUCTOR][0] / min(own))
    gain = min(ahead) if ahead else float("nan")
    cases = [
        ("forward, inductor", worst("forward", INDUCTOR, 1, True), f">= {FORWARD}", lambda x: x >= FORWARD),
        (
            "forward and backward, inductor",
            worst("backward", INDUCTOR, 1, True),
            f">= {BACKWARD}",
            lambda x: x >= BACKWARD,
        ),
        (
            "hidden states and heads, inductor",
            worst("linear", INDUCTOR, 1, False),
            f"<= {LINEAR}",
            lambda x: x <= LINEAR,
        ),
        ("Triton kernel against inductor", gain, f"> {MARGIN}: enters the package", lambda x: x > MARGIN),
    ]
    rows = [
        [name, "not measured" if x != x else f"{x:.2f}", wanted, "" if x != x else "yes" if met(x) else "no"]
        for name, x, wanted, met in cases
    ]
    return Table("Targets, by the worst case of each", ["", "measured", "wanted", "met"], rows)


def main() -> None:
    parser = options(__doc__, rounds=20)
    parser.add_argument("--device", default="cuda")
    arguments: argparse.Namespace = parser.parse_args()
    if arguments.device != "cpu" and not torch.cuda.is_available():
        parser.error("expected a GPU, got none; run with --device cpu --quick to see that the script works")
    torch.set_num_threads(arguments.threads)
    clock = Clock(arguments.device, arguments.rounds)
    rates = ceilings(clock, arguments.quick)
    name = "a CPU" if arguments.device == "cpu" else torch.cuda.get_device_name()
    tables = [
        Table(
            f"What {name} does at most",
            ["", "measured"],
            [
                ["reading", f"{rates['read'] / 1e12:.3f} TB/s"],
                ["copying, both directions", f"{rates['copy'] / 1e12:.3f} TB/s"],
                ["bf16 matrix products", f"{rates['products'] / 1e12:.3f} TFLOP/s"],
            ],
        )
    ]
    kept: dict[str, dict[str, tuple[float, ...]]] = {}
    for size in (300,) if arguments.quick else VOCABULARIES:
        for precision, dtype in DTYPES.items():
            rows = 4 if arguments.quick else max(2, POSITIONS // size)
            a, b = inputs(rows, size, dtype, arguments.device)
            shape = f"{precision}, {rows} x {size}"
            with torch.no_grad():
                kept[f"forward, {shape}"] = forward(clock, a, b, rates["read"], arguments.quick)
            kept[f"backward, {shape}"] = backward(clock, a, b, rates, arguments.quick)
            tables.append(table(f"All quantities, {shape}", kept[f"forward, {shape}"]))
            tables.append(table(f"KL and its gradient, in place, {shape}", kept[f"backward, {shape}"]))
            del a, b
        kept[f"linear, {size}"] = linear(clock, size, arguments.quick)
        rows = [[name, f"{s * 1e3:.3f}", f"{x:.2f}"] for name, (s, x) in kept[f"linear, {size}"].items()]
        tables.append(
            Table(f"KL and gradients from hidden states and heads, bf16, {size}", ["", "ms", "x the products"], rows)
        )
    report([*tables, verdicts(kept)], kept | {"rates": rates}, arguments)


if __name__ == "__main__":
    sys.exit(main())
