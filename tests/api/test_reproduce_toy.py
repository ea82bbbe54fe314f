import csv
import json
import math

import pytest
import torch

from klkit.api.reproduce_toy import (
    CLAIMS,
    FAR,
    OBJECTIVES,
    SMOKE,
    ToyCount,
    ToyStudy,
    bells,
    conditions,
    long_tail,
    measure,
    reproduce_toy,
)
from klkit.api.reproduce_toy_report import toy_blocks, toy_words
from klkit.report.pages import plain_text

REDUCED = ToyStudy(draws=3, steps_2=2, steps_3=20)


@pytest.fixture(scope="module")
def toy():
    return reproduce_toy(REDUCED)


def test_the_targets_are_the_papers():
    two = bells(25.0, 75.0, 10.0).exp()
    assert two[37:39].max() == two.max()  # 5 parts of the bell at 75, between the points 74 and 76
    assert float(two[:25].sum()) == pytest.approx(3 / 8, abs=0.01)
    tail = long_tail(ToyStudy(draws=4)).exp()
    assert tail.shape == (4, 80)
    assert (tail[:, FAR:].sum(1) - 0.0042).abs().max() < 1e-4
    smooth = torch.exp(-0.5 * (torch.arange(0, 100, 1.25, dtype=torch.float64) / 16) ** 2)
    ratio = tail / (smooth / smooth.sum())
    assert 0.99 < float(ratio.min()) < float(ratio.max()) < 1.01
    assert not torch.equal(tail[0], tail[1])


def test_the_measures_by_hand():
    logp = long_tail(ToyStudy(draws=1))
    logq = torch.zeros_like(logp).log_softmax(-1)
    p, q = logp.exp()[0], logq.exp()[0]
    found = {name: float(x[0]) for name, x in measure(logp, logq, far=True).items()}
    order = p.argsort(descending=True)
    count = int((p[order].cumsum(0) < 0.5).sum()) + 1
    gap = (p - q).abs()
    assert found["head_gap"] == pytest.approx(float(gap[order[:count]].sum()))
    assert found["tail_gap"] == pytest.approx(float(gap[order[count:]].sum()))
    assert found["far_mass"] == pytest.approx((80 - FAR) / 80)
    far = sorted((logq - logp)[0, FAR:].abs().tolist())
    assert found["far_ratio"] == pytest.approx(far[len(far) // 2])


def test_all_objectives_end_at_the_teacher(monkeypatch):
    """In the setting of Figure 2 that is quickest; the others take the 200 steps of the full run."""
    monkeypatch.setattr("klkit.api.reproduce_toy.SETTINGS", ((25.0, 74.0, 15.0),))
    monkeypatch.setattr("klkit.api.reproduce_toy.OPTIMISERS", ("adam",))
    toy = reproduce_toy(ToyStudy(draws=2, steps_2=80, steps_3=1))
    ends = [row for row in toy.rows if (row.figure, row.step) == (2, 80)]
    assert [row.objective for row in ends] == list(OBJECTIVES)
    assert max(row.worst_kl for row in ends) < 1e-3


def test_what_separates_the_two_directions_in_every_draw(toy):
    assert len(conditions(toy)) == 4  # the fifth needs 800 steps of Figure 3
    for words, held in conditions(toy):
        assert held, words


def test_the_claim_about_the_tail_fails_under_adam(toy):
    """At half of the mass as head, the paper's tail claim is false in every draw of Figure 3 up to step 15."""
    for step in range(1, 16):
        assert toy.count("tail gap", "adam", step).held == 0
        assert toy.count("tail gap", "sgd", step).held == REDUCED.draws


def test_words_follow_from_the_counts(toy):
    said = toy_words(toy)
    assert any("outside the head (adam, steps 1 to 20): DOES NOT HOLD" in line for line in said)
    assert any("outside the head (sgd, steps 1 to 20): HOLDS, in every draw" in line for line in said)
    reversed_counts = [
        ToyCount(c.claim, c.optimiser, c.step, c.draws - c.held, c.draws, c.fkl, c.rkl) for c in toy.counts
    ]
    toy.counts[:], original = reversed_counts, list(toy.counts)
    try:
        assert not any(held for _, held in conditions(toy))
        assert sum("NOT HELD" in line for line in plain_text(toy_blocks(toy)).splitlines()) == 4
        assert any("outside the head (sgd, steps 1 to 20): DOES NOT HOLD" in line for line in toy_words(toy))
    finally:
        toy.counts[:] = original


def test_the_command_writes_page_tables_and_figures(tmp_path, run):
    code, text, _ = run("reproduce", "toy", "--smoke", "--out", str(tmp_path))
    assert code == 0
    assert max(map(len, text.splitlines()[:-2])) <= 80
    assert (tmp_path / "toy.txt").read_text() in text
    record = json.loads((tmp_path / "toy.json").read_text())
    assert record["study"]["draws"] == SMOKE.draws
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert {row["objective"] for row in rows} == set(OBJECTIVES)
    assert all(math.isfinite(float(row["forward_kl"])) for row in rows)
    assert {row["claim"] for row in csv.DictReader((tmp_path / "counts.csv").open())} == set(CLAIMS)
    page = (tmp_path / "toy.html").read_text()
    assert page.count("<img src=") == 3
    assert "https://" not in page
    for name in ("figure2", "figure3", "curves"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
