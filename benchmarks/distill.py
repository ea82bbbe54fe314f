"""Memory and time of one distillation step's loss and gradient: all logits at once, in chunks, and what others offer.

    python benchmarks/distill.py [--threads 2] [--json PATH]

4,096 positions, width 1,024, vocabulary 128,256, float32; teacher and student enter as hidden states and heads, and
the gradient is wanted in the student's. Each line runs once, in a process of its own, and the memory is what it holds
at most above these inputs. *All logits* is PyTorch's autograd through log-softmax and klkit's functions, which keep
only their arguments; with the formulas as they are written down it would not fit, so that line has 1,024 positions.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from common import Table, begin, options, peak_of, report
from linear import Inputs, inputs
from torch import Tensor

from klkit.divergences.adaptive import adaptive_kl, head_weight
from klkit.divergences.linear import Head
from klkit.divergences.partial import Hidden, Logits
from klkit.objectives.distill import distillation_loss

SHAPE, QUICK = (4096, 1024, 128256), (64, 16, 300)
DENSE, WRITTEN = "adaptive, all logits", "adaptive, formulas as written, a quarter"


def dense(h: Tensor, w: Tensor, h_p: Tensor, w_p: Tensor) -> None:
    """The loss from log-probabilities that exist all at once."""
    with torch.no_grad():
        logp = (h_p @ w_p.t()).log_softmax(-1)
    adaptive_kl(logp, (h @ w.t()).log_softmax(-1)).mean().backward()


def written(h: Tensor, w: Tensor, h_p: Tensor, w_p: Tensor) -> None:
    """The loss as it is written down, on a quarter of the positions."""
    few = len(h) // 4
    with torch.no_grad():
        logp = (h_p[:few] @ w_p.t()).log_softmax(-1)
    logq = (h[:few] @ w.t()).log_softmax(-1)
    weight = head_weight(logp, logq.detach())
    forward = (logp.exp() * (logp - logq)).sum(-1)
    reverse = (logq.exp() * (logq - logp)).sum(-1)
    (weight * forward + (1 - weight) * reverse).mean().backward()


def all_logits(h: Tensor, w: Tensor, h_p: Tensor, w_p: Tensor) -> None:
    """klkit's fused loss from logits that exist all at once."""
    with torch.no_grad():
        teacher = Logits(h_p @ w_p.t())
    distillation_loss(teacher, Logits(h @ w.t()), None, "adaptive_kl").loss.backward()


def chunked(loss: str, h: Tensor, w: Tensor, h_p: Tensor, w_p: Tensor) -> None:
    """klkit's loss from hidden states."""
    distillation_loss(Hidden(h_p, Head(w_p)), Hidden(h, Head(w)), None, loss).loss.backward()


def liger(h: Tensor, w: Tensor, h_p: Tensor, w_p: Tensor) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False)
    loss(h, w, h_p, w_p, torch.zeros(len(h), dtype=torch.long)).backward()


def trl(h: Tensor, w: Tensor, h_p: Tensor, w_p: Tensor) -> None:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    ChunkedDivergenceFunction.apply(h, w, None, h_p, w_p, None, 0.5)[0].mean().backward()


def work_on(x: Inputs) -> dict[str, Callable[[], object]]:
    """Every line; the student is the model that the inputs name first."""
    work: dict[str, Callable[[], object]] = {
        WRITTEN: partial(written, *x),
        DENSE: partial(dense, *x),
        "adaptive, all logits, fused": partial(all_logits, *x),
        "adaptive, in chunks, klkit": partial(chunked, "adaptive_kl", *x),
        "JS, in chunks, klkit": partial(chunked, "generalised_js", *x),
    }
    if find_spec("liger_kernel") is not None:
        work["JS, in chunks, Liger"] = partial(liger, *x)
    if find_spec("trl") is not None:
        work["JS, in tiles, TRL"] = partial(trl, *x)
    return work


def measured(name: str, flags: list[str]) -> tuple[float, float]:
    """Seconds and MiB of a line, in a process of its own."""
    command = [sys.executable, __file__, "--peak", name, *flags]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    taken, peak = map(float, output.split()[-2:])
    return taken, peak


def main() -> None:
    arguments = options(__doc__, rounds=1).parse_args()
    begin(arguments)
    shape = QUICK if arguments.quick else SHAPE
    if arguments.peak:
        work_on(inputs(*QUICK))[arguments.peak]()  # loads what is loaded once
        work = work_on(inputs(*shape))[arguments.peak]
        began = time.perf_counter()
        peak = peak_of(work)
        print(time.perf_counter() - began, peak)
        return
    flags = ["--threads", str(arguments.threads), *(["--quick"] if arguments.quick else [])]
    found = {name: measured(name, flags) for name in work_on(inputs(*QUICK))}
    rows = [
        [
            name,
            f"{taken:.1f}",
            f"{peak:.0f}",
            f"{100 * peak / max(found[DENSE][1], 1e-9):.1f} %" if name != WRITTEN else "",
        ]
        for name, (taken, peak) in found.items()
    ]
    title = "Loss and gradient of one step, {} positions x {} x {}, fp32".format(*shape)
    report([Table(title, ["", "s", "peak MiB", "of all logits"], rows)], found, arguments)


if __name__ == "__main__":
    sys.exit(main())
