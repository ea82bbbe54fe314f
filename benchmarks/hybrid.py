"""Noise of the divergence from known tokens and draws, with and without its control variate, on synthetic laws.

    python benchmarks/hybrid.py

Laws over 151,936 tokens with Zipf-like logits. For each: the divergence, what the tail adds to it, and the standard
deviation at one decision of the divergence from one token (plain Monte Carlo), from known tokens and draws without a
control variate, with the full one (λ = 1), and with the one in use. Prints a Markdown table; a
minute or two.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from klkit.divergences.hybrid import hybrid_kl
from klkit.divergences.partial import Hybrid
from klkit.rng import stream

SIZE, ROWS, SETS = 151_936, 4, 160
SLOPES = {"peaked": 2.5, "mid": 1.5, "diffuse": 1.05}


def normal(generator: torch.Generator) -> Tensor:
    return torch.randn(SIZE, generator=generator, dtype=torch.float64)


def noisy(spread: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    return lambda z, generator: z + spread * normal(generator)


def heavy(z: Tensor, generator: torch.Generator) -> Tensor:
    """Log-ratios with Student's law of five degrees of freedom."""
    square = torch.stack([normal(generator).square() for _ in range(5)]).mean(0)
    return z + 0.3 * normal(generator) / square.sqrt()


def elsewhere(z: Tensor, generator: torch.Generator) -> Tensor:
    """The likeliest tokens of ``q`` are in the tail of ``p``."""
    other = z + 0.3 * normal(generator)
    other[2000 + torch.randint(0, 3000, (3,), generator=generator)] = z.max() + torch.tensor([1.0, 0.0, -1.0]).double()
    return other


OTHERS = {
    "noise 0.05": noisy(0.05),
    "noise 0.3": noisy(0.3),
    "noise 1": noisy(1.0),
    "noise 2": noisy(2.0),
    "Student 0.3": heavy,
    "tops elsewhere": elsewhere,
    "temperature 1.5": lambda z, generator: z / 1.5,
}


def spread_of(logp: Tensor, value: Tensor) -> float:
    p = logp.exp() / logp.exp().sum()
    return float((p * (value - p @ value).square()).sum().sqrt())


def noise(slope: float, other: Callable[[Tensor, torch.Generator], Tensor], k: int, draws: int) -> list[float]:
    generator = stream(0, "hybrid", "laws")
    z = -slope * torch.arange(1, SIZE + 1).double().log() + 0.5 * normal(generator)
    logp, logq = z.log_softmax(0), other(z, generator).log_softmax(0)
    known = logp.topk(k)
    tail = logp.scatter(0, known.indices, -torch.inf)
    rest = tail.logsumexp(0)
    uniform = torch.rand(SETS, draws, dtype=torch.float64, generator=generator)
    ids = torch.searchsorted((tail - rest).exp().cumsum(0), uniform).clamp(max=SIZE - 1)
    found = []
    for some in ids.split(ROWS):  # that stay in cache
        row = (known.indices, known.values, rest)
        part = Hybrid(*(x.expand(ROWS, *x.shape) for x in row), some, logp[some], torch.ones(ROWS, dtype=torch.bool))
        found.append(hybrid_kl(part, logq.float().expand(ROWS, -1)).kl)
    inside = tail > -torch.inf
    ratio = (logp - logq)[inside]
    centred = ratio - rest + logq[inside].logsumexp(0)
    mass, each = float(rest.exp()), draws**0.5
    return [
        float(logp.exp() @ (logp - logq)),
        float(logp[inside].exp() @ ratio),
        spread_of(logp, logp - logq),
        mass * spread_of(tail[inside], ratio) / each,
        mass * spread_of(tail[inside], centred + (-centred).exp()) / each,
        float(torch.cat(found).std()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--k", type=int, nargs="+", default=[32, 256, 1024])
    options = parser.parse_args()
    print("| p | q | k | KL | of it, tail | one token | plain | full | in use |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, other in OTHERS.items():
        for kind, slope in SLOPES.items():
            for k in options.k if name == "noise 0.3" else [256]:
                numbers = noise(slope, other, k, options.draws)
                print(f"| {kind} | {name} | {k} | " + " | ".join(f"{x:.1e}" for x in numbers) + " |", flush=True)


if __name__ == "__main__":
    main()
