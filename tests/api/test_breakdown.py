from dataclasses import replace

import numpy as np
import pytest
import torch

from klkit.api.breakdown import PositionSums, TokenSums, breakdown, by_position, by_token, position_bins
from klkit.api.facets import FacetSums
from klkit.api.plan import Plan
from klkit.api.strings import run_strings
from klkit.estimators.statistics import TokenStatistics
from klkit.models.automaton import random_automaton
from klkit.rng import numpy_stream, stream
from klkit.stats.intervals import cluster_totals, ratio_interval, ratio_stderr


@pytest.fixture(scope="module")
def run():
    generator = stream(4, "breakdown")
    p, q = (random_automaton(3, 5, generator=generator) for _ in range(2))
    context = p.context(None)
    batches = []
    run_strings(p, q, Plan([context], [context], 200, 60, seed=0), keep=batches.append)
    return p, TokenStatistics.cat([batch.statistics for batch in batches])


def tokens_of(statistics):
    kl, ratio = statistics.rows.kl.double().numpy(), statistics.log_ratio.double().numpy()
    return TokenSums.of(statistics.x.targets().numpy(), kl, ratio)


def test_parts_add_up_to_the_whole(run):
    p, statistics = run
    facets = FacetSums.of(statistics)
    parts = breakdown(statistics.strings(), PositionSums.of(statistics), tokens_of(statistics), facets, p.pieces)
    total = float(statistics.rows.kl.sum()) / len(statistics.x)
    assert sum(part["nats_per_response"] for part in parts["by_position"]) == pytest.approx(total)
    assert sum(part["decisions"] for part in parts["by_position"]) == statistics.x.decisions
    assert parts["end"]["end_share"] + parts["end"]["content_share"] == pytest.approx(1)
    assert sum(parts["strings"]["rb"]) == 200
    assert sum(row["share"] for row in parts["tokens"]) <= 1 + 1e-12


def test_bins_cover_every_position_once():
    for longest in (1, 5, 33, 200):
        covered = [i for start, stop in position_bins(longest) for i in range(start, stop)]
        assert covered == list(range(longest))


@pytest.mark.parametrize("clusters", [200, 12])
def test_batches_add_up_to_the_whole_however_strings_are_cut(run, clusters):
    p, statistics = run
    cluster = torch.arange(200) % clusters
    statistics = replace(statistics, x=replace(statistics.x, cluster=cluster))
    few = [statistics.select(rows) for rows in torch.arange(200).split(9)]
    positions = PositionSums.cat([PositionSums.of(part) for part in few])
    one, other = by_position(positions, 200), by_position(PositionSums.of(statistics), 200)
    for a, b in zip(one, other, strict=True):
        assert a.pop("method") == b.pop("method")
        assert a.keys() == b.keys()
        for name, value in a.items():  # ends are of resamples: sums of more terms
            rel = 1e-9 if name in ("lower", "upper") else 1e-12
            assert float(value) == pytest.approx(float(b[name]), rel=rel, nan_ok=True), name
    # Against the definition: clusters' totals over their decisions.
    assert positions.longest > 34
    for start, stop in position_bins(positions.longest):
        inside = (statistics.x.position() >= start) & (statistics.x.position() < stop)
        kl, unit = statistics.rows.kl[inside].double().numpy(), cluster[statistics.x.row()][inside].numpy()
        part = next(part for part in one if part["start"] == start)
        assert part["kl"] == pytest.approx(kl.mean())
        error = ratio_stderr(*cluster_totals(kl, np.ones(len(kl)), unit))
        assert float(part["stderr"]) == pytest.approx(error, nan_ok=True)
        wanted = ratio_interval(*cluster_totals(kl, np.ones(len(kl)), unit))
        assert [float(part[name]) for name in ("lower", "upper")] == pytest.approx(
            [wanted.lower, wanted.upper], nan_ok=True
        )
    together = TokenSums.cat([tokens_of(part) for part in few])
    for a, b in zip(by_token(together, p.pieces), by_token(tokens_of(statistics), p.pieces), strict=True):
        assert a.pop("text") == b.pop("text")
        assert a == pytest.approx(b, rel=1e-10)


def test_means_and_squares_of_a_token_are_those_of_its_decisions():
    """The mean is far larger than the spread: squares less squared means would have no digit left."""
    kl = 1e8 + np.arange(6.0)
    sums = TokenSums.cat([TokenSums.of(np.full(3, 5), kl[:3], kl[:3]), TokenSums.of(np.full(3, 5), kl[3:], kl[3:])])
    assert sums.token.tolist() == [5]
    assert sums.count.tolist() == [6]
    assert sums.mean.tolist() == [1e8 + 2.5]
    assert sums.squares.tolist() == [17.5]


def test_a_lucky_rare_token_does_not_lead():
    generator = numpy_stream(0, "lucky")
    tokens = np.repeat(np.arange(40), 50)
    kl = generator.exponential(1.0, len(tokens)) * (1 + 0.3 * (tokens == 7))
    tokens, kl = np.append(tokens, [99, 99, 99]), np.append(kl, [3.0, 3.2, 2.9])
    rows = by_token(TokenSums.of(tokens, kl, kl), lambda ids: [str(i) for i in ids])
    raw = max(rows, key=lambda row: row["kl"])
    assert raw["token"] == 99
    assert next(row for row in rows if row["token"] == 99)["kl_shrunk"] < 2.0


def test_looks_fall_on_whole_rounds():
    context = torch.tensor([0])
    plan = Plan([context] * 48, [context] * 48, 100, 10, seed=0)
    looks = [plan.next_look(0)]
    for _ in range(5):
        looks.append(plan.next_look(looks[-1]))
    assert all(look % 48 == 0 for look in looks)
    many = Plan([context] * 1000, [context] * 1000, 2, 10, seed=0)
    assert many.next_look(0) == 64
    assert sorted(p for p, _ in many.slice(0, 1000)) == list(range(1000))
    assert [p for p, _ in many.slice(0, 1000)] != list(range(1000))
