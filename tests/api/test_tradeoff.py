import csv
import json
import math

import numpy as np
import pytest

from klkit.api.reproduce_report import rlhf_markdown, rlhf_words, save_rlhf
from klkit.api.reproduce_rlhf import SMOKE, Point, Study, fixed_prompts_error, held_out_prompts
from klkit.api.tradeoff import ExactFrontier, analyse, exact_frontier
from klkit.cli import main
from klkit.rng import numpy_stream
from klkit.stats.pareto import hypervolume

STUDY = Study(arms=("mc", "rb", "k3_loss"), coefficients=(0.5, 1.0), seeds=4)
EXACT = ExactFrontier((0.0, 1.0, 2.0, 4.0), (0.0, 2.0, 3.0, 4.0), (0.0, 1.0, 2.0, 6.0))


def point(arm, coefficient, seed, reward, kl, final=True, stopped=""):
    return Point(arm, coefficient, seed, 10, final, reward, 0.01, kl, 0.01, 20.0, stopped)


def made_up(lift):
    """Runs of known scatter: rb a tenth of mc's and ``lift`` more reward; k3_loss as mc, with twice the KL."""
    points = []
    for c in STUDY.coefficients:
        for s in range(STUDY.seeds):
            e, f = numpy_stream(1, "made up", str(c), s).normal(size=2).tolist()
            points += [
                point("mc", c, s, 1 / c + 0.1 * e, 0.8 / c + 0.1 * f),
                point("rb", c, s, 1 / c + 0.01 * e + lift, 0.8 / c + 0.01 * f),
                point("k3_loss", c, s, 1 / c + 0.1 * e, 1.6 / c + 0.1 * f, stopped="came apart" if s == 0 else ""),
                point("rb", c, s, 0.0, 3.0, final=False),
            ]
    return points


def test_scatters_shares_and_areas_are_those_of_the_runs():
    points = made_up(lift=0.5)
    found = analyse(STUDY, points, EXACT)
    mc, rb, k3 = found.arms
    finals = {a: [p for p in points if p.arm == a and p.final] for a in STUDY.arms}
    variances = [np.var([p.kl for p in finals["mc"] if p.coefficient == c], ddof=1) for c in STUDY.coefficients]
    assert mc.kl_scatter.value == pytest.approx(math.sqrt(np.mean(variances)))
    assert (rb.kl_ratio.value, rb.reward_ratio.value) == pytest.approx((0.1, 0.1))
    assert rb.kl_ratio.upper < 1
    assert k3.kl_ratio.value == pytest.approx(1.0)
    assert found.worst == (1.5 * 2.0, 0.0)
    areas = []
    for seed in range(STUDY.seeds):
        mine = [p for p in finals["rb"] if p.seed == seed]
        kl, reward = (np.array([getattr(p, name) for p in mine]) for name in ("kl", "reward"))
        areas.append(hypervolume(kl, reward, worst_cost=3.0, worst_gain=0.0))
    assert rb.area == pytest.approx(np.mean(areas))
    assert rb.versus.area == pytest.approx(rb.area - mc.area)
    assert mc.share + rb.share + k3.share == pytest.approx(1)
    assert rb.share > 0.5
    assert (mc.stopped, k3.stopped, k3.runs) == (0, 2, 8)
    assert mc.versus is None
    objective = np.mean([p.reward - p.coefficient * p.kl for p in finals["rb"]])
    assert rb.objective == pytest.approx(objective)
    assert rb.versus.objective == pytest.approx(rb.objective - mc.objective)
    # Eight blocks of two: every block favours rb, as only one other of 2^8 arrangements does (all turned round).
    assert rb.versus.objective_p == pytest.approx(2 / 2**8)


def test_words_say_better_worse_and_not_resolved():
    said = {line.split(" against")[0]: line for line in rlhf_words(analyse(STUDY, made_up(lift=0.5), EXACT))}
    assert "scatter of reward smaller" in said["rb"]
    assert "KL smaller" in said["rb"]
    assert "objective better (+0.5" in said["rb"]
    assert "scatter of reward not resolved" in said["k3_loss"]
    assert "objective worse (-0.8" in said["k3_loss"]
    assert "2 of 8 runs came apart" in said["k3_loss"]
    none = {line.split(" against")[0]: line for line in rlhf_words(analyse(STUDY, made_up(lift=0.0), EXACT))}
    assert "objective not resolved" in none["rb"]


def test_points_above_the_exact_frontier_are_counted():
    points = [*made_up(lift=0.0), point("mc", 0.5, 9, 5.0, 1.0, final=False)]
    assert any(
        line.startswith(f"1 of {len(points)} points lie above") for line in rlhf_words(analyse(STUDY, points, EXACT))
    )


def test_tables_and_figures_are_written(tmp_path):
    found = analyse(STUDY, made_up(lift=0.5), EXACT)
    assert save_rlhf(found, tmp_path) == (tmp_path / "rlhf.md").read_text() == rlhf_markdown(found)
    assert len(list(csv.DictReader((tmp_path / "points.csv").open()))) == len(found.points)
    rows = list(csv.DictReader((tmp_path / "penalties.csv").open()))
    assert [row["name"] for row in rows] == list(STUDY.arms)
    assert float(rows[1]["versus_objective_p"]) == pytest.approx(2 / 2**8)
    assert rows[0]["versus_objective_p"] == "nan"
    stored = json.loads((tmp_path / "rlhf.json").read_text())
    assert stored["arms"][1]["versus"]["objective_p"] == pytest.approx(2 / 2**8)
    for name in ("frontier.png", "scatter.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    (tmp_path / "taken").touch()
    with pytest.raises(ValueError, match="choose another --out"):
        save_rlhf(found, tmp_path / "taken")


def test_the_exact_frontier_holds_the_studys_coefficients():
    exact = exact_frontier(SMOKE, held_out_prompts(SMOKE))
    assert exact.divergences[0] == 0.0
    for c in SMOKE.coefficients:
        assert 1 / c in exact.strengths
    best = [r - k / s for s, r, k in zip(exact.strengths, exact.rewards, exact.divergences, strict=True) if s]
    assert best == sorted(best)  # a cheaper nat never leaves one worse off


def test_errors_for_fixed_prompts_leave_the_prompts_spread_out():
    values = numpy_stream(0, "errors").normal(size=(50, 40)) + 100 * np.arange(50)[:, None]
    assert fixed_prompts_error(values) == pytest.approx(1 / math.sqrt(50 * 40), rel=0.1)


def test_the_smoke_run_trains_measures_and_goes_on_where_it_stopped(tmp_path, capsys):
    command = ["reproduce", "rlhf", "--smoke", "--steps", "2", "--workers", "1", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code in (0, None), capsys.readouterr().err
    first = capsys.readouterr().out
    points = [Point(**p) for p in json.loads((tmp_path / "rlhf.json").read_text())["points"]]
    assert len(points) == 2 * len(list((tmp_path / "runs").glob("*.json"))) == 2 * 6
    assert all(p.kl > 0 and p.step == (2 if p.final else 1) for p in points)
    # One step from the same weights on the same strings: only then have penalties begun to differ.
    half = {(p.arm, p.coefficient, p.seed): (p.reward, p.kl) for p in points if not p.final}
    assert half["mc", 0.5, 0] == half["rb", 0.5, 0] != half["rb", 0.5, 1]
    with pytest.raises(SystemExit):
        main(command)
    assert capsys.readouterr().out == first
