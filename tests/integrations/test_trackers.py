"""What trackers are told, with stand-ins that record it."""

import math
import sys
from types import SimpleNamespace

import pytest
from tests.test_frames import automata, compared

import klkit
from klkit.integrations.trackers import Tracker, log_comparison, log_result, open_tracker
from klkit.models.automaton import memoryless


def test_trackio_and_wandb_get_numbers_by_step(monkeypatch, tmp_path):
    for name in ("trackio", "wandb"):
        told = []
        run = SimpleNamespace(log=lambda numbers, step, told=told: told.append((step, numbers)))
        stand_in = SimpleNamespace(
            init=lambda told=told, run=run, **options: told.append(options) or run,
            finish=lambda told=told: told.append("finished"),
        )
        monkeypatch.setitem(sys.modules, name, stand_in)
        tracker = open_tracker(name, run="first", config={"steps": 3}, folder=tmp_path)
        tracker.log({"kl": 0.5}, 3)
        tracker.close()
        opened = {"project": "klkit", "name": "first", "config": {"steps": 3}}
        assert told == [opened, (3, {"kl": 0.5}), "finished"]


def test_tensorboard_gets_scalars_in_the_run_s_folder(monkeypatch, tmp_path):
    told = []

    class SummaryWriter:
        def __init__(self, log_dir):
            told.append(log_dir)

        def add_scalar(self, name, value, step):
            told.append((name, value, step))

        def close(self):
            told.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    tracker = open_tracker("tensorboard", run="first", config={}, folder=tmp_path)
    tracker.log({"kl": 0.5, "reward": 2.0}, 7)
    tracker.close()
    assert told == [str(tmp_path / "tensorboard"), ("kl", 0.5, 7), ("reward", 2.0, 7), "closed"]


def test_a_tracker_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="expected wandb to be installed for --track wandb"):
        open_tracker("wandb", run="first", config={}, folder=tmp_path)


def stand_in(monkeypatch, name):
    """A tracker's module that records what it is told."""
    told = []
    run = SimpleNamespace(log=lambda numbers, step: told.append((step, numbers)))
    module = SimpleNamespace(init=lambda **options: told.append(options) or run, finish=lambda: told.append("finished"))
    monkeypatch.setitem(sys.modules, name, module)
    return told


def test_a_result_is_logged_by_names_with_units(monkeypatch, tmp_path):
    told = stand_in(monkeypatch, "wandb")
    result = klkit.estimate(*automata("p", "q"), samples=40, max_tokens=20, unit="bits")
    log_comparison("wandb", result.to_dict(), "first", tmp_path)
    opened, (step, numbers), end = told
    assert (opened["name"], opened["config"]["samples"], step, end) == ("first", 40, 0, "finished")
    assert numbers["kl_nats_per_response"] == pytest.approx(result.headline.value, rel=1e-12)
    assert numbers["kl_nats_per_response_upper"] == pytest.approx(result.headline.interval().upper, rel=1e-12)
    assert (numbers["audit_passed"], numbers["n_strings"]) == (1.0, 40.0)
    assert all(type(value) is float for value in numbers.values())


def test_a_ranking_is_logged_below_its_candidates_names(monkeypatch, tmp_path):
    told = stand_in(monkeypatch, "trackio")
    ranking = compared()
    log_comparison("trackio", ranking.to_dict(), "first", tmp_path)
    numbers = told[1][1]
    for i in ranking.ranked:
        entry = ranking.entries[i]
        assert numbers[f"{entry.name}/kl_nats_per_response"] == entry.result.headline.value
        assert numbers[f"{entry.name}/rank_first"] == ranking.rank(i)[0]


def test_what_is_infinite_is_logged_so_and_what_is_undefined_is_not():
    p, q = memoryless([0.5, 0.5], end=0.25), memoryless([1.0, 0.0], end=0.25)
    told = []
    log_result(
        Tracker(lambda numbers, step: told.append((numbers, step)), lambda: None), klkit.estimate(p, q, samples=9), 7
    )
    ((numbers, step),) = told
    assert (numbers["kl_nats_per_response"], numbers["kl_nats_per_response_upper"], step) == (math.inf, math.inf, 7)
    assert "kl_nats_per_response_stderr" not in numbers
    assert numbers["infinite_decisions"] > 0


def test_a_tracker_is_closed_whatever_happens(monkeypatch, tmp_path):
    told = stand_in(monkeypatch, "wandb")
    with pytest.raises(KeyError):
        log_comparison("wandb", {"settings": {}}, "first", tmp_path)
    assert told[-1] == "finished"
