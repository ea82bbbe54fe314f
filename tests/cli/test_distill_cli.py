"""``klkit distill`` as a user meets it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from klkit.cli.distill import progress

TEACHER, STUDENT = ["--teacher", "klkit:reviews-positive"], ["--student", "klkit:reviews"]
SMALL = ["--batch", "4", "--max-tokens", "8", "--evaluate", "1", "--learning-rate", "2e-3", "--warmup", "1"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    words = ("thin", "superb", "lovely", "great")
    records = [
        {"prompt": f"the {thing} was", "response": f" {w} ."} for w in words for thing in ("plot", "music", "cast")
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records * 2))
    return str(path)


def plain(text):
    return re.sub(r"\s+", " ", text)


def test_a_run_says_what_it_optimises_prints_a_table_and_where_the_student_is(run, data):
    command = ["distill", *TEACHER, *STUDENT, "--data", data, *SMALL, "--every", "2", "--schedule", "constant"]
    code, out, err = run(*command, "--steps", "4", "--out", "run", "--save", "kept")
    assert code == 0, err
    text = plain(out)
    assert "adaptive_kl: w KL(p‖q) + (1 − w) KL(q‖p)" in text
    assert "optimises mean adaptive_kl of next-token laws along the given texts" in text
    assert "evaluated on 10 of the 24 examples" in text
    assert re.search(r"After 4 steps: KL\(teacher‖student\) = [\d.e-]+ nats per response", text)
    assert text.index("optimises") < text.index("After 4 steps")
    assert "student kept" in text
    assert max(map(len, out.splitlines())) <= 80
    assert not [line for line in err.splitlines() if not line.startswith("step ")]
    code, out, err = run(*command, "--steps", "6", "--out", "run", "--resume")
    assert code == 0, err
    steps = [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]
    code, out, err = run("estimate", "kept", "klkit:reviews-positive", "--samples", "16", "--max-tokens", "4")
    assert code == 0, err


def test_a_gradient_that_is_not_the_objective_s_is_called_so(run, data):
    code, out, _ = run(
        "distill", *TEACHER, *STUDENT, "--data", data, *SMALL, "--steps", "1", "--evaluate", "0", "--on-policy", "1",
        "--temperature", "2", "--out", "run",
    )  # fmt: skip
    assert code == 0
    assert "gradient NOT that quantity's" in plain(out)
    assert "temperature 2, and the divergence times its square, 4" in plain(out)


def test_a_self_check_trains_nothing_and_tells_what_holds(run, data):
    code, out, err = run("distill", *TEACHER, *STUDENT, "--data", data, *SMALL, "--selfcheck")
    assert code == 0, err
    assert re.search(r"All \d+ checks hold", out)
    assert "accumulation" in out
    assert max(map(len, out.splitlines())) <= 80
    assert [path.name for path in Path().iterdir()] == ["data.jsonl"]


@pytest.mark.parametrize("text", [["--text", "teacher"], ["--on-policy", "1"]])
def test_a_self_check_of_prompts_alone_reads_what_the_models_write(run, text):
    code, out, err = run(
        "distill", *TEACHER, *STUDENT, "--data", "klkit:reviews", *text, "--max-tokens", "24", "--selfcheck"
    )
    assert code == 0, err + out
    assert re.search(r"All \d+ checks hold", out)


def test_a_run_that_comes_apart_says_so_and_fails(run, data):
    code, _out, err = run(
        "distill", *TEACHER, *STUDENT, "--data", data, *SMALL, "--steps", "2", "--max-loss", "1e-4", "--out", "run"
    )
    assert code == 1
    assert re.search(r"klkit: training stopped: expected a mean divergence of at most 0.0001 nats a token", err)
    assert "there was no checkpoint yet" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TEACHER, "--loss", "k9"], "expected a loss among"),
        ([*TEACHER, "--loss", "adaptive_kl,mu=0.5"], "expected options of adaptive_kl among: mass=0.5, head=cover"),
        (["--teacher", "klkit:docs"], "ids with different strings"),
        ([], "expected a teacher, got none; name one with --teacher, or a cache of one with --cache"),
        ([*TEACHER, "--data", "missing.jsonl"], "expected a file of prompts or text at missing.jsonl"),
        (
            [*TEACHER, "--prompt-column", "question", "--response-column", "answer"],
            "name the right ones with --prompt-",
        ),
        ([*TEACHER, "--data", "empty.jsonl"], "1 without one, the first of them example 2; mend"),
        ([*TEACHER, "--objective", "sequence-fkl", "--loss", "reverse_kl"], "expected only options that go with"),
        ([*TEACHER, "--lora", "2", "--lora-layers", "no_such"], "that an adapter fits on"),
        ([*TEACHER, "--cache", "nowhere"], "nowhere"),
        ([*TEACHER, "--track", "paper"], "expected a tracker among trackio, wandb, tensorboard"),
        ([*TEACHER, "--resume"], "expected the folder of the run to continue"),
        ([*TEACHER, "--text", "teacher", "--max-tokens", "500"], "expected examples of at most 128 tokens"),
    ],
)
def test_bad_input_is_one_clear_message_and_nothing_is_written(run, data, arguments, message):
    good = [{"prompt": "the plot", "response": " was thin ."}]
    Path("empty.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*good, {"prompt": "a", "response": ""}]))
    before = sorted(path.name for path in Path().iterdir())
    out = [] if "--resume" in arguments else ["--out", "run"]
    code, printed, err = run("distill", *STUDENT, "--data", data, *SMALL, "--steps", "1", *arguments, *out)
    assert code == 2
    assert err.splitlines()[-1].startswith("klkit: ")
    assert message in err
    assert "Traceback" not in printed + err
    assert sorted(path.name for path in Path().iterdir()) == before


def test_help_needs_neither_torch_nor_transformers():
    code = (
        "import sys\nfrom klkit.cli import main\n"
        "try:\n    main(['distill', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--on-policy" in done.stdout


def test_the_live_line_fits_its_width():
    from klkit.api.distill_plan import DistillReport
    from klkit.train.distill import DistillMetrics

    metrics = DistillMetrics(
        99999, 123.456, 1.0, 1.0, 1.0, 0.5, 1.0, 1234567, 512, 0.5, 1.0, 1e-4, 12.0, "exact", 1.0, 0.5
    )
    assert len(progress(DistillReport(99999, 100000, metrics, None, 12345.0, 99999))) <= 79
