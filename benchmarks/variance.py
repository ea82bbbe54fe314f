"""Variance of the estimators over many independent estimates, from one pool of strings of a pair of models.

    python benchmarks/variance.py                                   # the packaged pair
    python benchmarks/variance.py --p ORG/MODEL --q ORG/OTHER --sizes 32 --estimates 100

Every estimate has strings of its own. Prints a Markdown table; errors are bootstrap standard errors over estimates.
``--json FILE`` writes the same numbers, ``--pool FILE`` keeps the scored strings for the next time.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from klkit.estimators.martingale import fit
from klkit.estimators.monte_carlo import monte_carlo
from klkit.estimators.rao_blackwell import rao_blackwell
from klkit.estimators.statistics import TokenStatistics, collect
from klkit.estimators.variates import token_features
from klkit.models.spec import load_pair
from klkit.rng import numpy_stream
from klkit.sampling.ancestral import sample

METHODS = ("mc", "rb", "rb_cv")


def draw_pool(p: str, q: str, strings: int, max_tokens: int, prompt: str | None, features: int, seed: int):
    """Scores of ``strings`` responses of ``p``."""
    model, other = load_pair(p, q)
    embedding = model.embedding()
    table = None if embedding is None else token_features(embedding, features)
    parts = []
    for first in range(0, strings, 512):
        names = range(first, min(first + 512, strings))
        draw = sample(
            model,
            [model.context(prompt)] * len(names),
            max_tokens=max_tokens,
            seed=seed,
            prompt=[0] * len(names),
            replicate=names,
            cluster=names,
        )
        x = draw.sequences
        parts.append(collect(model, draw.hidden, other, other.encode(x), x, features=table))
    return TokenStatistics.cat(parts)


def replay(pool: TokenStatistics, size: int, estimates: int) -> dict[str, object]:
    """``estimates`` estimates by each method from disjoint sets of ``size`` strings."""
    values = np.empty((estimates, len(METHODS)))
    stderr, chosen, seconds = np.empty(estimates), {}, 0.0
    for i in range(estimates):
        part = pool.select(torch.arange(i * size, (i + 1) * size))
        began = time.perf_counter()
        fitted = fit(part)
        seconds += time.perf_counter() - began
        values[i] = [monte_carlo(part).mean(), rao_blackwell(part).mean(), fitted.contributions.mean()]
        stderr[i] = fitted.contributions.std(ddof=1) / size**0.5
        for name in fitted.chosen:
            chosen[name] = chosen.get(name, 0) + 1
    rng = numpy_stream(0, "variance", size)
    again = values[rng.integers(0, estimates, (2000, estimates))].var(1, ddof=1)
    variance = values.var(0, ddof=1)
    reference = float(rao_blackwell(pool).mean())

    def ratio(a: int, b: int) -> tuple[float, float]:
        return float(variance[a] / variance[b]), float((again[:, a] / again[:, b]).std())

    return {
        "strings": size,
        "estimates": estimates,
        "rb/mc": ratio(1, 0),
        "rb_cv/mc": ratio(2, 0),
        "rb_cv/rb": ratio(2, 1),
        "rb closer": float(np.mean(abs(values[:, 2] - reference) > abs(values[:, 1] - reference))),
        "mean rb_cv": (float(values[:, 2].mean()), float((variance[2] / estimates) ** 0.5)),
        "stderr reported/realised": float(np.sqrt(np.mean(stderr**2) / variance[2])),
        "fit ms": 1e3 * seconds / estimates,
        "chosen": {name: count / sum(chosen.values()) for name, count in sorted(chosen.items())},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--p", default="klkit:docs-tuned")
    parser.add_argument("--q", default="klkit:docs")
    parser.add_argument("--prompt")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--estimates", type=int, default=200, help="of the largest size; four times as many of others")
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--pool", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)

    strings = max(options.sizes) * options.estimates
    if options.pool is not None and options.pool.is_file():
        pool = torch.load(options.pool, weights_only=False)
    else:
        pool = draw_pool(
            options.p, options.q, strings, options.max_tokens, options.prompt, options.features, options.seed
        )
        if options.pool is not None:
            torch.save(pool, options.pool)
    plain, crude = rao_blackwell(pool), monte_carlo(pool)
    n = len(pool.x)
    summary = {
        "p": options.p,
        "q": options.q,
        "max_tokens": options.max_tokens,
        "strings": n,
        "mean length": float(pool.x.lengths.double().mean()),
        "ended": float(pool.x.finished.double().mean()),
        "mean mc": (float(crude.mean()), float(crude.std() / n**0.5)),
        "mean rb": (float(plain.mean()), float(plain.std() / n**0.5)),
        "rb/mc, one string": float(plain.var() / crude.var()),
    }
    print(
        f"KL({options.p} ‖ {options.q}), up to {options.max_tokens} tokens (mean {summary['mean length']:.1f}, "
        f"{100 * summary['ended']:.0f}% ended); {n} strings: mc {crude.mean():.4f} ± {crude.std() / n**0.5:.4f}, "
        f"rb {plain.mean():.4f} ± {plain.std() / n**0.5:.4f} nats; variance of one string rb/mc "
        f"{summary['rb/mc, one string']:.3f}\n"
    )
    print("| strings | estimates | rb/mc | rb_cv/mc | rb_cv/rb | rb closer | mean rb_cv | stderr said/real | fit ms |")
    print("|---|---|---|---|---|---|---|---|---|")
    results = []
    for size in options.sizes:
        r = replay(pool, size, min(n // size, options.estimates * (1 if size == max(options.sizes) else 4)))
        results.append(r)
        ratios = " | ".join(f"{r[k][0]:.3f} ± {r[k][1]:.3f}" for k in ("rb/mc", "rb_cv/mc", "rb_cv/rb"))
        print(
            f"| {size} | {r['estimates']} | {ratios} | {r['rb closer']:.2f} | "
            f"{r['mean rb_cv'][0]:.4f} ± {r['mean rb_cv'][1]:.4f} | {r['stderr reported/realised']:.2f} | "
            f"{r['fit ms']:.0f} |",
            flush=True,
        )
    if options.json is not None:
        options.json.write_text(json.dumps({**summary, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
