"""What the divergence over bytes costs and how it depends on the beam; python benchmarks/bytes.py

Strings of each pair's first model, drawn with the widest beam, are read with every beam, so that only the beam
differs between rows. Times are those of one core. The last lines compare with the same models over tokens: the law
of the first bytes is a function of the tokens up to the one that completes them, so it can be no further apart.
"""

from __future__ import annotations

import argparse
import time

import torch

from klkit.estimators.statistics import score
from klkit.models.base import LanguageModel
from klkit.models.byte_level import byte_level
from klkit.models.spec import load
from klkit.models.token_bytes import byte_lengths
from klkit.sampling.ancestral import sample

BEAMS = (1, 2, 4, 8, 16, 32)


def mean(values: torch.Tensor) -> str:
    """Mean and standard error."""
    return f"{float(values.mean()):.4f} ± {float(values.std() / len(values) ** 0.5):.4f}"


def by_beam(p: LanguageModel, q: LanguageModel, strings: int, length: int) -> None:
    """One row a beam: the divergence of the strings, its change from the widest beam, what was dropped, the cost."""
    widest = byte_level(p, beam=max(BEAMS))
    x = sample(widest, [widest.context(None)] * strings, max_tokens=length, seed=0, prompt=[0] * strings).sequences
    print(
        f"\nKL({p.name} ‖ {q.name}) over {x.decisions} decisions of {strings} responses of at most {length} bytes, nats"
    )
    found = {}
    for beam in reversed(BEAMS):
        one, two = byte_level(p, beam=beam), byte_level(q, beam=beam)
        began = time.process_time()
        statistics = score(one, two, x)
        spent = time.process_time() - began
        kl = statistics.per_string(statistics.rows.kl)
        found[beam] = kl
        gap = kl - found[max(BEAMS)]
        ledgers = (one.ledger, two.ledger)
        dropped = ", ".join(
            f"{ledger.discarded / ledger.decisions:.1e} ({ledger.discarded_most:.1e})" for ledger in ledgers
        )
        laws = ", ".join(f"{ledger.laws / ledger.decisions:.2f}" for ledger in ledgers)
        print(
            f"beam {beam:3d}: {mean(kl)} per response, {float(kl.sum()) / x.decisions:.5f} per byte; change "
            f"{mean(gap)}; dropped mean (most) {dropped}; laws a byte {laws}; {1e3 * spent / x.decisions:.2f} ms a byte"
        )


def by_token(p: LanguageModel, q: LanguageModel, strings: int, length: int) -> None:
    """The divergence of the tokens up to the one that completes ``length`` bytes."""
    began = time.process_time()
    x = sample(p, [p.context(None)] * strings, max_tokens=length, seed=0, prompt=[0] * strings).sequences
    statistics = score(p, q, x)
    spent = time.process_time() - began
    before = statistics.before(byte_lengths(p)[x.targets()].double())
    kl = statistics.per_string(statistics.rows.kl.double() * (before < length))
    print(f"over tokens, the first {length} bytes: {mean(kl)} per response; {1e3 * spent / x.decisions:.2f} ms a token")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strings", type=int, default=24)
    parser.add_argument("--bytes", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    docs, tuned, reviews = (load(f"klkit:{name}") for name in ("docs", "docs-tuned", "reviews"))
    by_beam(docs, reviews, options.strings, options.bytes)
    by_beam(tuned, docs, options.strings, options.bytes)
    by_token(tuned, docs, 16 * options.strings, options.bytes)
