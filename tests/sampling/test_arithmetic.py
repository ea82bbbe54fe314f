"""Arithmetic sampling: exact strings, evenly spread sets, codes that do not run dry."""

from collections import Counter

import pytest
import torch
from scipy import stats

from klkit.estimators.statistics import score
from klkit.models.automaton import finite, memoryless, random_automaton
from klkit.rng import stream
from klkit.sampling.ancestral import sample
from klkit.sampling.arithmetic import decode, narrow, sample_sets

LAW = {"ab": 0.3, "": 0.2, "b": 0.1, "bba": 0.25, "a": 0.15}


def strings(p, x) -> list[str]:
    return ["".join(p.pieces(x.completion(i)[:-1].tolist())) for i in range(len(x))]


def grid(n: int) -> torch.Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


@pytest.mark.parametrize("size", [1, 2, 5, 7, 16, 50])
def test_every_code_finds_its_token(size):
    # Evenly spaced codes, no randomness: an interval of mass p holds n p of them, give or take one.
    n = 10_000
    logp = torch.randn(1, size, generator=stream(0, "law", size), dtype=torch.float64).log_softmax(-1)
    logp = logp if size < 5 else logp.index_fill(1, torch.tensor([0, 3]), -torch.inf).log_softmax(-1)
    tokens, inner = decode(logp.expand(n, size), grid(n), torch.zeros(n, 2, dtype=torch.float64))
    expected = n * logp[0].exp()
    assert float((tokens.bincount(minlength=size) - expected).abs().max()) < 1
    assert bool((tokens.diff() >= 0).all())
    assert not tokens.bincount(minlength=size)[expected == 0].any()
    # Within the interval of each token the codes are evenly spread again.
    for token in range(size):
        places = inner[tokens == token].sort().values
        if len(places) > 1:
            assert float((places - grid(len(places))).abs().max()) < 1.01 / len(places)


def test_codes_at_the_edges():
    # Masses whose sums round to either side of 1, nothing at both ends, the smallest code and the largest.
    mass = torch.rand(5000, 12, generator=stream(0, "mass"), dtype=torch.float64)
    mass[:, 0] = mass[:, -1] = 0
    mass /= mass.sum(1, keepdim=True)
    for i, power in enumerate((-1.0, 0.0, 1.0)):
        mass[i] = 0
        mass[i, 5] = 2.0**power
    totals = mass.cumsum(1)[:, -1]
    assert bool((totals < 1).any())
    assert bool((totals > 1).any())
    first, last = torch.zeros(5000, dtype=torch.float64), torch.full((5000,), 1 - 2.0**-53, dtype=torch.float64)
    low, high = mass.ne(0).long().argmax(1), 11 - mass.flip(1).ne(0).long().argmax(1)
    for code, expected in ((first, low), (last, high)):
        index, inner = narrow(mass, code, last)
        assert torch.equal(index, expected)
        assert bool(((inner >= 0) & (inner < 1)).all())


def test_a_set_spreads_exactly_over_the_law():
    # The codes of a set are evenly spaced: a string of probability π gets size·π of them, give or take one.
    p = finite(LAW, symbols="ab")
    for size in (20, 64, 1000):
        x = sample_sets(p, [p.context(None)] * 3, size=size, max_tokens=10, seed=0, prompt=[0, 0, 0]).sequences
        for one in range(3):
            seen = Counter(strings(p, x.select(torch.arange(one * size, (one + 1) * size))))
            assert set(seen) <= set(LAW)
            # The margin of 1e-6 is for masses that meet the spacing exactly (20 · 0.3 = 6).
            assert all(abs(seen[y] - size * mass) < 1 + 1e-6 for y, mass in LAW.items())


def test_each_string_of_a_set_has_the_law():
    p, n, size = finite(LAW, symbols="ab"), 3000, 3
    x = sample_sets(p, [p.context(None)] * n, size=size, max_tokens=10, seed=0, prompt=[0] * n).sequences
    drawn = strings(p, x)
    for j in range(size):
        seen = Counter(drawn[j::size])
        assert stats.chisquare([seen[y] for y in LAW], [n * mass for mass in LAW.values()]).pvalue > 1e-3


def test_codes_do_not_run_dry():
    # A fair coin takes one bit a decision: a plain fp64 code is used up after 53 and repeats itself from there.
    p = memoryless([0.5, 0.5], end=1e-9)
    size, length = 400, 200
    x = sample_sets(p, [p.context(None)], size=size, max_tokens=length, seed=0).sequences
    tokens = x.tokens[:, 1:].double()
    frequency = tokens.mean(0)
    assert float(((frequency - 0.5).abs() / (0.5 / size**0.5)).max()) < 4.5
    late = tokens[:, 100:]
    assert len(late.unique(dim=0)) == size
    # Neighbouring decisions and neighbouring strings are unrelated by then.
    signs = 2 * late - 1
    assert abs(float((signs[:, 1:] * signs[:, :-1]).mean())) < 4 / signs.numel() ** 0.5
    assert abs(float((signs[1:] * signs[:-1]).mean())) < 4 / signs.numel() ** 0.5


def test_long_skewed_strings_keep_their_law():
    p = memoryless([0.9, 0.1 - 1e-5, 1e-5], end=1e-9)
    x = sample_sets(p, [p.context(None)], size=300, max_tokens=300, seed=1).sequences
    seen = x.targets().bincount(minlength=4)[:3]
    expected = torch.tensor([0.9, 0.1 - 1e-5, 1e-5]) * x.decisions
    assert float(((seen - expected) / expected.sqrt()).abs().max()) < 4


def test_variance_falls_at_an_equal_number_of_strings():
    size, sets = 16, 200
    p = finite(LAW, symbols="ab")
    q = finite({"ab": 0.1, "": 0.4, "b": 0.2, "bba": 0.05, "a": 0.25}, symbols="ab")
    contexts = [p.context(None)]
    spread = sample_sets(p, contexts * sets, size=size, max_tokens=8, seed=0, prompt=[0] * sets).sequences
    plain = sample(p, contexts * sets * size, max_tokens=8, seed=0, prompt=[0] * sets * size).sequences
    variance: dict[tuple[str, str], float] = {}
    for name, x in (("spread", spread), ("plain", plain)):
        statistics = score(p, q, x)
        for estimator, values in (("mc", statistics.log_ratio), ("rb", statistics.rows.kl)):
            means = statistics.per_string(values).reshape(sets, size).mean(1)
            variance[name, estimator] = float(means.var())
            if estimator == "rb":
                variance[name, "mean"] = float(means.mean())
    assert variance["spread", "mc"] < 0.2 * variance["plain", "mc"]
    assert variance["spread", "rb"] < 0.2 * variance["plain", "rb"]
    error = (variance["plain", "rb"] / sets + variance["spread", "rb"] / sets) ** 0.5
    assert abs(variance["spread", "mean"] - variance["plain", "mean"]) < 4 * error


def test_sets_are_clusters_unless_there_are_several_prompts():
    p = finite(LAW, symbols="ab")

    def names(**given: list[int]) -> tuple[list[int], list[int]]:
        x = sample_sets(p, [p.context(None)] * 2, size=3, max_tokens=5, seed=0, **given).sequences
        return x.prompt.tolist(), x.cluster.tolist()

    assert names(prompt=[4, 4]) == ([4] * 6, [0, 0, 0, 1, 1, 1])
    assert names(prompt=[4, 9]) == ([4, 4, 4, 9, 9, 9], [4, 4, 4, 9, 9, 9])
    assert names(prompt=[4, 9], cluster=[0, 1]) == ([4, 4, 4, 9, 9, 9], [0, 0, 0, 1, 1, 1])


def test_a_set_does_not_depend_on_the_other_sets():
    p = random_automaton(4, 6, generator=stream(0, "machine"))
    together = sample_sets(p, [p.context(None)] * 5, size=4, max_tokens=30, seed=3, prompt=[0] * 5).sequences
    alone = sample_sets(p, [p.context(None)], size=4, max_tokens=30, seed=3, prompt=[0], replicate=[2]).sequences
    for j in range(4):
        assert together.completion(8 + j).tolist() == alone.completion(j).tolist()
    other = sample_sets(p, [p.context(None)], size=4, max_tokens=30, seed=4, prompt=[0], replicate=[2]).sequences
    assert [other.completion(j).tolist() for j in range(4)] != [alone.completion(j).tolist() for j in range(4)]


def test_hidden_vectors_belong_to_the_strings():
    p = random_automaton(4, 6, generator=stream(0, "machine"))
    draw = sample_sets(p, [p.context(None)] * 5, size=4, max_tokens=30, seed=3)
    assert torch.equal(draw.hidden, p.encode(draw.sequences))
    torch.testing.assert_close(draw.logp, score(p, p, draw.sequences).rows.logp, rtol=1e-13, atol=1e-14)


def test_empty_sets_are_refused():
    p = finite(LAW, symbols="ab")
    with pytest.raises(ValueError, match="at least one string, got size 0"):
        sample_sets(p, [p.context(None)], size=0, max_tokens=5, seed=0)
    with pytest.raises(ValueError, match="got 0 contexts"):
        sample_sets(p, [], size=2, max_tokens=5, seed=0)
