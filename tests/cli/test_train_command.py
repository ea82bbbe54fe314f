"""``klkit train rl`` as a user meets it."""

import json
import re
from pathlib import Path

import pytest

from klkit.cli.train import progress

RL = ["train", "rl", "klkit:reviews", "--reward", "klkit:reviews", "--prompts", "klkit:reviews"]
SMALL = ["--batch", "4", "--max-tokens", "8", "--evaluate", "1", "--learning-rate", "2e-3", "--every", "2"]


def test_a_run_prints_a_sentence_a_table_and_where_the_model_is(run):
    code, out, err = run(*RL, *SMALL, "--steps", "4", "--out", "run")
    assert code == 0, err
    text = re.sub(r"\s+", " ", out)
    assert re.search(
        r"After 4 steps: mean reward .* KL\(p‖q\) = [\d.]+ nats per response, 95% interval .* \(rb_cv\)", text
    )
    assert "KL(p‖q) between the laws of whole responses" in text
    assert "run/checkpoints/step-000004" in text
    assert "13 of the 64 prompts" in text
    assert max(map(len, out.splitlines())) <= 80
    assert not [line for line in err.splitlines() if not line.startswith("step ")]  # no other library's chatter
    code, out, err = run(*RL, *SMALL, "--steps", "6", "--out", "run", "--resume")
    assert code == 0, err
    assert "After 6 steps" in out
    steps = [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_biased_penalty_is_called_biased(run):
    code, out, _ = run(*RL, *SMALL, "--steps", "1", "--out", "run", "--penalty", "k3_loss")
    assert code == 0
    assert "(biased)" in re.sub(r"\s+", " ", out)


def test_a_run_that_comes_apart_says_so_and_fails(run):
    code, out, err = run(
        *RL, *SMALL, "--steps", "20", "--max-kl", "0.3", "--learning-rate", "1e-3", "--coefficient", "0",
        "--every", "1", "--out", "run",
    )  # fmt: skip
    assert code == 1
    assert not out
    assert re.search(
        r"klkit: training stopped: expected a .*KL of at most 0.3 nats .* the last checkpoint is run/", err
    )
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--penalty", "k9"], "expected a KL penalty among"),
        (["--reward", "nowhere:nothing"], "expected a function 'nothing' in the module 'nowhere'"),
        (["--reward", "failing:raises"], "got ZeroDivisionError"),
        (["--reward", "failing:nan"], "expected finite rewards from nan"),
        (["--reward", "failing:short"], "one a response, got 1"),
        (["--reference", "klkit:docs"], "expected a reference with the policy's vocabulary"),
        (["--max-tokens", "500"], "expected prompts that leave room for 500 tokens in the 128"),
        (["--prompts", "missing.txt"], "expected a file of prompts or text at missing.txt"),
        (["--samples", "1"], "expected samples of at least 2"),
        (["--lora", "2", "--lora-layers", "no_such"], "that an adapter fits on"),
        (["--resume"], "expected the folder of the run to continue"),
        (["--track", "paper"], "expected a tracker among trackio, wandb, tensorboard"),
    ],
)
def test_bad_input_is_one_clear_message(run, monkeypatch, arguments, message):
    Path("failing.py").write_text(
        "def raises(prompts, responses):\n    return 1 / 0\n"
        "def nan(prompts, responses):\n    return [float('nan')] * len(responses)\n"
        "def short(prompts, responses):\n    return [0.0]\n"
    )
    monkeypatch.syspath_prepend(".")
    monkeypatch.delitem(__import__("sys").modules, "failing", raising=False)
    code, out, err = run(*RL, *SMALL, "--steps", "2", *arguments)
    assert code == 2
    assert err.splitlines()[-1].startswith("klkit: ")
    assert message in err
    assert "Traceback" not in out + err


def test_the_live_line_fits_its_width():
    from klkit.api.train import Report
    from klkit.train.rl import Metrics

    metrics = Metrics(99999, -123.456, 0.1, 12.345, 12.0, 1000.0, 0.5, 0.05, 12.0, 1.0, 1.0, 0.5)
    assert len(progress(Report(99999, 100000, metrics, None, 12345.0, 99999))) <= 79
