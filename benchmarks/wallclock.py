"""Wall clock and memory of ``klkit.estimate`` against the passes it cannot do without.

    python benchmarks/wallclock.py [--p SPEC --q SPEC] [--rounds 7]

Time: in one process, in turn, the sampling pass of p alone, one teacher-forced pass of q over the same strings, and
``klkit.estimate`` twice as its users call it: in memory, and with a run folder and its report. The ratio of each of
the latter to the sum of the former is what the exact divergence, the variates, the numerical floor, the checks and
the disk cost. Models are loaded beforehand. Medians over rounds.

Memory: the peak of a fresh process for each number of strings, loading included, and what a further token adds,
beside what one float32 tensor of the logits of all those tokens would take.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import peak_bytes

import klkit
from klkit.api.batches import batches_of
from klkit.api.plan import Plan
from klkit.api.strings import resolve_batch_size
from klkit.models.base import log_probs
from klkit.sampling.ancestral import sample
from klkit.sequences import Sequences

MEBI = 1 << 20
STRINGS = (256, 1024, 4096)  # at which the peak of memory is taken
SAMPLING, SCORING, IN_MEMORY, ON_DISK = (
    "sampling pass of p",
    "teacher-forced pass of q",
    "klkit.estimate, in memory",
    "klkit.estimate, with folder and report",
)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def time_passes(options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each piece of work in each round."""
    p, q = klkit.load(options.p), klkit.load(options.q)
    context = p.context(None)
    plan = Plan([context], [context], options.samples, options.max_tokens, seed=0)
    size = resolve_batch_size(p, plan, "auto")
    wanted = {"samples": options.samples, "max_tokens": options.max_tokens}
    parts: list[Sequences] = []

    def sampling() -> None:
        parts.clear()
        for rows in batches_of(plan.total, size):
            contexts, prompt = [context] * len(rows), [0] * len(rows)
            draw = sample(p, contexts, max_tokens=plan.max_tokens, seed=0, prompt=prompt, replicate=rows.tolist())
            parts.append(draw.sequences)

    def scoring() -> None:
        for x in parts:
            for _ in log_probs(q, x):
                pass

    def in_memory() -> None:
        klkit.estimate(p, q, **wanted)

    def on_disk() -> None:
        with tempfile.TemporaryDirectory() as folder:
            klkit.estimate(p, q, out=Path(folder) / "run", **wanted)

    work = {SAMPLING: sampling, SCORING: scoring, IN_MEMORY: in_memory, ON_DISK: on_disk}
    times: dict[str, list[float]] = {name: [] for name in work}
    for function in work.values():  # warms up, and imports what the report needs
        function()
    gc.collect()
    gc.freeze()  # as the command line does: a collection of all imported objects costs 0.1 s wherever it falls
    for _ in range(options.rounds):
        for name, function in work.items():
            times[name].append(seconds(function))
    return times


def report_peak(options: argparse.Namespace) -> None:
    """One run in this process, and its peak of memory so far."""
    result = klkit.estimate(options.p, options.q, samples=options.peak, max_tokens=options.max_tokens)
    tokens = round(result.companions["mean_length"]["value"] * options.peak)
    vocabulary = result.provenance["models"]["p"]["vocabulary_size"]
    print(json.dumps({"strings": options.peak, "tokens": tokens, "vocabulary": vocabulary, "bytes": peak_bytes()}))


def measure_peaks(options: argparse.Namespace) -> list[dict[str, float]]:
    """The peak for each number of strings, each in a process of its own, and what a token adds to the smallest."""
    rows = []
    for strings in STRINGS:
        command = [sys.executable, __file__, "--p", options.p, "--q", options.q, "--peak", str(strings)]
        command += ["--max-tokens", str(options.max_tokens), "--threads", str(options.threads)]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        row["logits_bytes"] = row["tokens"] * row["vocabulary"] * 4
        if rows:
            row["bytes_per_token"] = (row["bytes"] - rows[0]["bytes"]) / (row["tokens"] - rows[0]["tokens"])
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--p", default="klkit:docs-tuned")
    parser.add_argument("--q", default="klkit:docs")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", type=int, default=None, metavar="STRINGS", help=argparse.SUPPRESS)
    parser.add_argument("--json", default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak is not None:
        report_peak(options)
        return
    times = time_passes(options)
    ratios = {
        name: [whole / sum(passes) for whole, *passes in zip(times[name], times[SAMPLING], times[SCORING], strict=True)]
        for name in (IN_MEMORY, ON_DISK)
    }
    for name, values in times.items():
        print(f"{name:40s} {statistics.median(values):8.3f} s")
    for name, values in ratios.items():
        median, least, most = statistics.median(values), min(values), max(values)
        print(f"{name}: {median:.3f} times both passes ({least:.3f} to {most:.3f})")
    peaks = measure_peaks(options)
    for row in peaks:
        print(
            f"peak memory, {row['strings']:5d} strings of {row['tokens']:7d} tokens: {row['bytes'] / MEBI:7.1f} MiB"
            + (f", {row['bytes_per_token']:.0f} bytes for each further token" if "bytes_per_token" in row else "")
            + f"; logits of one model: {row['logits_bytes'] / MEBI:.1f} MiB, {4 * row['vocabulary']} bytes a token"
        )
    if options.json:
        result = {
            "klkit": klkit.__version__,
            "torch": torch.__version__,
            "threads": options.threads,
            "strings": options.samples,
            "medians_s": {name: statistics.median(values) for name, values in times.items()},
            "ratios": {
                name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
                for name, values in ratios.items()
            },
            "peak_memory": peaks,
        }
        Path(options.json).write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
