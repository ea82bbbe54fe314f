import numpy as np
import pytest
import torch

from klkit.api.breakdown import breakdown, by_token, position_bins
from klkit.api.strings import Plan, run_strings
from klkit.models.automaton import random_automaton
from klkit.rng import numpy_stream, stream


@pytest.fixture(scope="module")
def run():
    generator = stream(4, "breakdown")
    p, q = (random_automaton(3, 5, generator=generator) for _ in range(2))
    context = p.context(None)
    return p, run_strings(p, q, Plan([context], [context], 200, 60, seed=0)).statistics


def test_parts_add_up_to_the_whole(run):
    p, statistics = run
    parts = breakdown(statistics, p.pieces)
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


def test_a_lucky_rare_token_does_not_lead():
    generator = numpy_stream(0, "lucky")
    tokens = np.repeat(np.arange(40), 50)
    kl = generator.exponential(1.0, len(tokens)) * (1 + 0.3 * (tokens == 7))
    tokens, kl = np.append(tokens, [99, 99, 99]), np.append(kl, [3.0, 3.2, 2.9])
    rows = by_token(kl, kl, tokens, lambda ids: [str(i) for i in ids])
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
