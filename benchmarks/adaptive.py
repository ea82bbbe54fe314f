"""Adaptive KL and its gradient beside the plain sum of both directions, and beside the form that sorts every row.

    python benchmarks/adaptive.py [--threads 2] [--json PATH]

Logits of p and q are normal with standard deviation 4 (peaked: a head of about ten tokens) or 2 (flat: hundreds to
thousands); *q near p* adds noise of standard deviation 1 to p's instead. Every line takes the gradient in what belongs
to q. A ratio compares the adaptive KL with ½ KL(p‖q) + ½ KL(q‖p) computed in the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from common import MEBI, Table, Work, begin, milliseconds, options, peak_memory, peak_of, ratio, report, side_by_side
from linear import available
from torch import Tensor

from klkit.divergences.adaptive import HeadRule, adaptive_kl
from klkit.divergences.differentiable import Divergences, divergences
from klkit.divergences.kl import jeffreys, kl, reverse_kl
from klkit.divergences.linear import Head
from klkit.divergences.linear_loss import Weights, linear_loss

SIZES = (32000, 128256)
LAWS = {"peaked": (4.0, None), "peaked, q near p": (4.0, 1.0), "flat": (2.0, None)}
SUM, ADAPTIVE, SORTED = "sum of both", "adaptive", "adaptive, full sort"
Form = Callable[[Tensor, Tensor], Tensor]


def inputs(rows: int, size: int, law: str) -> tuple[Tensor, Tensor]:
    """Logits of p and of q."""
    spread, noise = LAWS[law]
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, rows, size, generator=generator).unbind()
    a.mul_(spread)
    return a, (b.mul_(spread) if noise is None else b.mul_(noise).add_(a))


def by_sorting(logp: Tensor, logq: Tensor) -> Tensor:
    """The adaptive KL with the weight as it is usually computed."""
    with torch.no_grad():
        p = logp.exp()
        gap = (p - logq.exp()).abs()
        likely, token = p.sort(-1, descending=True)
        in_head = likely.cumsum(-1) - likely < 0.5
        weight = (gap.gather(-1, token) * in_head).sum(-1) / gap.sum(-1)
    return weight * kl(logp, logq) + (1 - weight) * reverse_kl(logp, logq)


def from_log_probabilities(form: Form, a: Tensor, b: Tensor) -> Tensor | None:
    """Gradient by automatic differentiation of a function of log-probabilities."""
    leaf = b.detach().requires_grad_()
    form(a.log_softmax(-1), leaf.log_softmax(-1)).sum().backward()
    return leaf.grad


def fused(backend: str, head: HeadRule | None, a: Tensor, b: Tensor) -> Tensor | None:
    """Gradient from one visit to raw logits, written over those of q."""
    leaf = b.detach().requires_grad_()
    found = divergences(a, leaf, head=head, overwrite=True, backend=backend)
    weight = 0.5 if found.head_weight is None else found.head_weight
    (weight * found.kl + (1 - weight) * found.reverse_kl).sum().backward()
    return leaf.grad


def hidden(rows: int, width: int, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and heads of p, and of a q to be trained, with peaked laws."""
    generator = torch.Generator().manual_seed(0)
    h, h_q = torch.randn(2, rows, width, generator=generator).unbind()
    w, w_q = torch.randn(2, size, width, generator=generator).mul_(4 / width**0.5).unbind()
    return h, w, h_q.clone().requires_grad_(), w_q.clone().requires_grad_()


def from_hidden(backend: str, head: HeadRule | None, h: Tensor, w: Tensor, h_q: Tensor, w_q: Tensor) -> None:
    """Gradients in the hidden states and the head of q."""

    def weigh(found: Divergences, rows: slice) -> Weights:
        weight = torch.full_like(found.kl, 0.5) if found.head_weight is None else found.head_weight
        return Weights(kl=weight / len(h), reverse_kl=(1 - weight) / len(h))

    h_q.grad = w_q.grad = None
    linear_loss(h, Head(w), h_q, Head(w_q), None, weigh, head=head, backend=backend)[0].backward()


def fused_work(a: Tensor, b: Tensor, quick: bool) -> dict[str, Work]:
    kept = b.clone()
    rules = {SUM: None, ADAPTIVE: HeadRule()}
    return {
        f"{name}, {what}": (partial(b.copy_, kept), partial(fused, name, rule, a, b))
        for name in available(quick)
        if name != "inductor"
        for what, rule in rules.items()
    }


def plain_work(a: Tensor, b: Tensor) -> dict[str, Work]:
    forms: dict[str, Form] = {SUM: lambda p, q: 0.5 * jeffreys(p, q), ADAPTIVE: adaptive_kl, SORTED: by_sorting}
    return {f"functions, {what}": partial(from_log_probabilities, form, a, b) for what, form in forms.items()}


def compared(title: str, seconds: dict[str, list[float]], memory: dict[str, float], unit: float) -> Table:
    """Times, and each beside the sum of both directions by the same means."""
    rows = [
        [
            name,
            milliseconds(taken),
            f"{ratio(seconds, name, name.split(', ', 1)[0] + ', ' + SUM):.2f}",
            f"{memory[name] / unit:.2f}" if name in memory else "",
        ]
        for name, taken in seconds.items()
    ]
    return Table(title, ["", "ms (least)", "x sum of both", "extra memory"], rows)


def report_peak(name: str) -> None:
    """Extra memory of one piece of work at the larger vocabulary, in this process."""

    def one(rows: int) -> Callable[[], object]:
        a, b = inputs(rows, SIZES[-1], "peaked")
        work = (plain_work(a, b) if name.startswith("functions") else fused_work(a, b, False))[name]
        return work[1] if isinstance(work, tuple) else work

    one(2)()  # compiles, and loads what is loaded once
    print(peak_of(one(16)))


def main() -> None:
    arguments = options(__doc__, rounds=7).parse_args()
    begin(arguments)
    if arguments.peak:
        report_peak(arguments.peak)
        return
    tables, kept = [], {}
    for size in (300,) if arguments.quick else SIZES:
        rows = 4 if arguments.quick else 64 * SIZES[-1] // size
        few = max(1, rows // 8)
        for law in LAWS:
            a, b = inputs(rows, size, law)
            seconds = side_by_side(fused_work(a, b, arguments.quick), arguments.rounds)
            seconds |= side_by_side(plain_work(a[:few], b[:few]), max(1, arguments.rounds // 2))
            memory = {}
            if (size, law) == (SIZES[-1], "peaked"):
                flags = ["--threads", str(arguments.threads)]
                memory = {name: peak_memory(__file__, name, flags) for name in seconds}
            title = f"{law.capitalize()}, {rows} x {size} (functions: {few} rows), fp32"
            tables.append(compared(title, seconds, memory, 16 * SIZES[-1] * 4 / MEBI))
            kept[f"{law}/{size}"] = seconds
        rows, width = (4, 16) if arguments.quick else (192, 512)
        x = hidden(rows, width, size)
        seconds = side_by_side(
            {
                f"{name}, {what}": partial(from_hidden, name, rule, *x)
                for name in available(arguments.quick)
                if name != "inductor"
                for what, rule in {SUM: None, ADAPTIVE: HeadRule()}.items()
            },
            arguments.rounds,
        )
        tables.append(compared(f"From hidden states, peaked, {rows} x {width} x {size}, fp32", seconds, {}, 1.0))
        kept[f"hidden/{size}"] = seconds
    report(tables, kept, arguments)


if __name__ == "__main__":
    sys.exit(main())
