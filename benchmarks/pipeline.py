"""A whole estimate by klkit, and the same estimate as it is usually written with transformers.

    python benchmarks/pipeline.py [--threads 2] [--json PATH]

The usual way: ``generate`` from p, one full pass of each model over the strings with all logits, two log-softmaxes,
and Σ p (log p − log q) summed over the tokens of each string. klkit's: ``klkit.estimate``, which also audits the run,
computes the other divergences, variates and intervals, and keeps the details of the report. Both estimate KL per
response, from strings of their own; the table shows that they agree within their errors. Models: random GPT-2s of
4 layers and width 256, vocabulary 50,257; 4 responses of up to 64 tokens to each of 8 prompts of 8 tokens.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
from functools import partial
from importlib.util import find_spec

import torch
from common import Table, begin, milliseconds, options, peak_memory, peak_of, ratio, report, side_by_side
from pair import pair

import klkit
from klkit.divergences import backends
from klkit.models.hf import HuggingFaceModel
from sampling import generate

USUAL = "generate, two passes, naive KL"
SAMPLES = 4  # responses to a prompt


@torch.inference_mode()
def usual(p: HuggingFaceModel, q: HuggingFaceModel, prompts: torch.Tensor, new: int) -> list[float]:
    """KL of each string, the usual way."""
    start, end = prompts.shape[1], p.vocabulary.ends[0]
    tokens = generate(p, prompts, new)
    log_p = p.model(tokens).logits[:, start - 1 : -1].log_softmax(-1)
    log_q = q.model(tokens).logits[:, start - 1 : -1].log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    before = (tokens[:, start:] == end).int().cumsum(1).roll(1, 1)
    before[:, 0] = 0
    return (kl * (before == 0)).sum(1).tolist()


def main() -> None:
    arguments = options(__doc__, rounds=7).parse_args()
    begin(arguments)
    size, new, count = (300, 4, 2) if arguments.quick else (50257, 64, 8)
    p, q = pair(size)
    each = torch.randint(size - 1, (count, 8), generator=torch.Generator().manual_seed(0))
    prompts = each.repeat_interleave(SAMPLES, 0)
    torch.manual_seed(0)  # generate draws from the global generator
    seeds = iter(range(1 << 30))
    kernels = ("eager", "native") if find_spec("numba") is not None and not arguments.quick else ("eager",)
    values: dict[str, list[float]] = {USUAL: []} | {f"klkit.estimate, {name} kernels": [] for name in kernels}

    def theirs() -> None:
        values[USUAL].extend(usual(p, q, prompts, new))

    def ours(name: str) -> None:
        os.environ[backends.VARIABLE] = name
        result = klkit.estimate(p, q, list(each), samples=SAMPLES, max_tokens=new, seed=next(seeds))
        values[f"klkit.estimate, {name} kernels"].append(result.headline.value)

    work = {USUAL: theirs} | {f"klkit.estimate, {name} kernels": partial(ours, name) for name in kernels}
    if arguments.peak:
        tiny = pair(300)
        usual(*tiny, prompts[:2] % 300, 4)
        klkit.estimate(*tiny, samples=8, max_tokens=4)
        print(peak_of(work[arguments.peak]))
        return
    seconds = side_by_side(work, arguments.rounds)
    rows = []
    for name, taken in seconds.items():
        memory = "" if arguments.quick else f"{peak_memory(__file__, name, ['--threads', str(arguments.threads)]):.0f}"
        mean, error = statistics.fmean(values[name]), statistics.stdev(values[name]) / math.sqrt(len(values[name]))
        found = f"{1e3 * mean:.3f} ± {1e3 * error:.3f}"
        rows.append([name, milliseconds(taken), f"{ratio(seconds, USUAL, name):.2f}", memory, found])
    title = f"One estimate from {len(prompts)} responses of up to {new} tokens, V = {size:,}"
    columns = ["", "ms (least)", "x faster", "peak MiB", "mean of all, millinats"]
    report([Table(title, columns, rows)], seconds, arguments)


if __name__ == "__main__":
    sys.exit(main())
