"""Wall clock and memory of ``klkit estimate`` against the passes it cannot do without.

    python benchmarks/wallclock.py [--p SPEC --q SPEC] [--rounds 7]

In one process, in turn: the whole run (draw, score, reduce, estimate, audit, assemble), its own sampling pass
alone, and one teacher-forced pass of q over the same strings. The ratio of the first to the sum of the others is
what the exact divergence, the variates and the checks cost. Medians over rounds.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable

import torch

import klkit
from klkit.api.run import load_models, make_plan, measure, prepare
from klkit.api.settings import Settings
from klkit.api.strings import batches_of, resolve_batch_size
from klkit.models.base import log_probs
from klkit.sampling.ancestral import sample
from klkit.sequences import Sequences


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--p", default="klkit:docs-tuned")
    parser.add_argument("--q", default="klkit:docs")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = Settings(p=options.p, q=options.q, samples=options.samples, max_tokens=options.max_tokens, floor="none")
    p, q = load_models(settings)
    pair = prepare(p, q, settings)
    plan, _ = make_plan(pair, settings, None)
    size = resolve_batch_size(pair.p, plan, "auto")
    parts: list[Sequences] = []

    def sampling() -> None:
        parts.clear()
        for rows in batches_of(plan.total, size):
            draw = sample(
                pair.p,
                [plan.contexts_p[0]] * len(rows),
                max_tokens=plan.max_tokens,
                seed=plan.seed,
                prompt=[0] * len(rows),
                replicate=rows.tolist(),
            )
            parts.append(draw.sequences)

    def scoring() -> None:
        for x in parts:
            for _ in log_probs(pair.q, x):
                pass

    def whole() -> None:
        measure(p, q, settings)

    work = {"sampling pass": sampling, "teacher-forced pass of q": scoring, "klkit estimate": whole}
    times: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(options.rounds + 1):
        for name, function in work.items():
            taken = seconds(function)
            if turn:  # the first round warms up
                times[name].append(taken)
    ratios = [
        whole / (drawn + scored)
        for whole, drawn, scored in zip(
            times["klkit estimate"], times["sampling pass"], times["teacher-forced pass of q"], strict=True
        )
    ]
    memory = {}
    for samples in (64, 512):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        measure(p, q, Settings(**{**settings.to_dict(), "samples": samples}))
        memory[samples] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    result = {
        "klkit": klkit.__version__,
        "torch": torch.__version__,
        "threads": options.threads,
        "strings": options.samples,
        "medians_s": {name: statistics.median(values) for name, values in times.items()},
        "ratio": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "peak_memory_growth_mib": memory,
    }
    for name, value in result["medians_s"].items():
        print(f"{name:28s} {value:8.3f} s")
    ratio = result["ratio"]
    print(
        f"{'ratio of the last to the rest':28s} {ratio['median']:.3f}  (from {ratio['min']:.3f} to {ratio['max']:.3f})"
    )
    print("growth of peak memory: " + ", ".join(f"{n} strings {m:.1f} MiB" for n, m in memory.items()))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)


if __name__ == "__main__":
    main()
