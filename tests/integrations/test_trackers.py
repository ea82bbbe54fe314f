"""What trackers are told, with stand-ins that record it."""

import sys
from types import SimpleNamespace

import pytest

from klkit.integrations.trackers import open_tracker


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
