"""klkit compare, gate and plan as a user meets them: tables in 80 columns, exit codes, bad input without a trace."""

import json
import re
from pathlib import Path

import pytest

MODELS = ["klkit:docs", "klkit:docs-int8", "klkit:docs-int4"]
SMALL = ["--samples", "24", "--max-tokens", "8"]


def flat(text):
    return re.sub(r"\s+", " ", text)


def test_compare_prints_a_ranking_and_leaves_a_folder(run):
    code, out, err = run("compare", *MODELS, "temperature=0.8", *SMALL, "--out", "run")
    assert code == 0, err
    assert max(map(len, out.splitlines())) <= 80
    assert "klkit:docs-int8 is closest to p: KL(p‖q) = " in flat(out)
    assert "nats per response, 95% interval" in flat(out)
    assert "Holm at 5%" in flat(out)
    assert re.search(r"1 +klkit:docs-int8", out)
    assert "farther than" in out
    assert "What p says will take at most" in err
    for name in ("report.html", "table.md", "result.json", "config.yaml", "reference"):
        assert (Path("run") / name).exists()
    assert len(list(Path("run/candidates").iterdir())) == 3


def test_a_run_is_continued_from_its_config_with_another_candidate(run):
    run("compare", *MODELS, *SMALL, "--out", "run", "--json", "-")
    code, out, err = run("compare", *MODELS, "temperature=0.8", *SMALL, "--out", "run", "--resume", "--json", "-")
    assert code == 0, err
    found = json.loads(out)
    assert {row["name"] for row in found["candidates"]} == {*MODELS[1:], "temperature=0.8"}
    assert json.loads(Path("run/result.json").read_text()) == found
    code, again, err = run("compare", "--config", "run/config.yaml", "--out", "other", "--json", "-")
    assert code == 0, err
    values = [
        {row["name"]: row["result"]["headline"]["value"] for row in record["candidates"]}
        for record in (found, json.loads(again))
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_a_reference_without_its_model(run):
    run("compare", *MODELS[:2], *SMALL, "--out", "run")
    code, out, err = run("compare", "cache:run/reference", *MODELS[1:], "--out", "again")
    assert code == 0, err
    assert "p was not asked again" in flat(out)
    code, _, err = run("compare", "cache:run/reference", MODELS[1], "--samples", "3", "--out", "third")
    assert code == 2
    assert "expected only options that have an effect, got samples" in err


def test_text_and_bits(run):
    Path("text.txt").write_text("The value of a name is looked up in the namespace of the module. " * 30)
    code, out, err = run("compare", *MODELS, "--text", "text.txt", "--context", "32", "--unit", "bits", "--out", "run")
    assert code == 0, err
    assert "bits per token of the given text" in flat(out)
    assert "bits/token" in out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "at least one candidate"),
        (["klkit:docs"], "at least one candidate"),
        ([*MODELS, MODELS[1]], "twice"),
        ([*MODELS, "colour=red"], "colour"),
        ([*MODELS, "./absent"], "not there"),
        ([*MODELS, "klkit:reviews"], "other strings for"),
        ([*MODELS, "--cache-limit", "1GB"], "--cache FOLDER"),
        ([*MODELS, "--keep", "logits"], "hidden, hybrid"),
        ([*MODELS, "--batch-size", "many"], "auto"),
        (["cache:absent", MODELS[1]], "folder of a cache"),
        ([MODELS[0], "cache:absent"], "a cache can stand for p alone"),
        ([*MODELS, "--text", "absent.txt"], "nothing there"),
        ([*MODELS, "--text", "absent.txt", "--both"], "neither model wrote"),
    ],
)
def test_bad_input_to_compare(run, arguments, expected):
    code, out, err = run("compare", *arguments, "--out", "run")
    assert code == 2, (out, err)
    assert expected in err
    assert "Traceback" not in err
    assert not Path("run").exists()


def test_resume_needs_its_folder(run):
    code, _, err = run("compare", *MODELS, "--resume")
    assert code == 2
    assert "--out FOLDER" in err


@pytest.mark.parametrize(
    ("limit", "code", "word"), [("0.05", 0, "PASS"), ("0.0001", 1, "FAIL"), ("0.00035", 3, "UNDECIDED")]
)
def test_a_gate_is_an_exit_code(run, limit, code, word):
    found, out, err = run("gate", *MODELS[:2], "--max", limit, *SMALL, "--out", "run")
    assert found == code, (out, err)
    assert f"{word}: KL(p‖q) against {float(limit):.4g} nats per response" in flat(out)
    if word == "UNDECIDED":
        assert "clusters would decide" in flat(out)


def test_a_gate_in_bits_per_token_as_json(run):
    code, out, err = run(
        "gate", *MODELS[:2], "--max", "0.01", "--per", "token", "--unit", "bits", *SMALL, "--json", "-"
    )
    assert code == 0, err
    found = json.loads(out)
    assert (found["verdict"], found["estimand"], found["unit"], found["limit"]) == ("pass", "R", "bits", 0.01)
    assert found["value"] < found["upper"] < 0.01


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (MODELS[:2], "positive finite limit"),
        ([*MODELS[:2], "--max", "0"], "positive finite limit"),
        ([*MODELS[:2], "--max", "1", "--per", "word"], "response or token"),
        ([*MODELS[:2], "--max", "1", "--level", "0.2"], "between 0.5 and 1"),
        ([*MODELS[:2], "--max", "1", "--text", "t.txt", "--per", "token"], "all is per token"),
        (["--max", "1"], "two models"),
        ([*MODELS[:2], "--max", "1", "--rtol", "0.1", "--until-halfwidth", "0.1"], "leave one out"),
    ],
)
def test_bad_input_to_the_gate(run, arguments, expected):
    code, out, err = run("gate", *arguments)
    assert code == 2, (out, err)
    assert expected in err
    assert "Traceback" not in err


def test_until_halfwidth_stops_when_the_interval_is_narrow(run):
    wanted = ["--max-tokens", "4", "--until-halfwidth", "0.2", "--unit", "bits", "--out", "run", "--json", "-"]
    code, out, err = run("estimate", "klkit:docs-tuned", "klkit:docs", *wanted)
    assert code == 0, err
    head = json.loads(out)["headline"]
    assert (head["ci"]["upper"] - head["ci"]["lower"]) / 2 <= 0.2
    assert head["unit"] == "bits"
    assert head["n_sequences"] < 16384


def test_plans_speak_in_prompts_minutes_and_tokens(run):
    code, out, err = run("plan", "klkit:docs", "klkit:docs-int4", "--rtol", "0.05", "--max-tokens", "6")
    assert code == 0, err
    assert re.search(r"KL\(p‖q\) per response to ± 0.05 of it at 95 % takes about [\d,]+ responses: ", flat(out))
    assert re.search(r" here, some [\d,]+ tokens\. ", flat(out))
    code, out, err = run("plan", *MODELS, "--difference", "0.05", "--max-tokens", "6", "--json", "-")
    assert code == 0, err
    found = json.loads(out)
    assert found["schema"] == "klkit.plan/1"
    assert "telling klkit:docs-int8 from klkit:docs-int4" in found["sentence"]
    assert found["prompts"] >= 10


@pytest.mark.parametrize(
    "arguments", [MODELS[:2], [*MODELS, "--rtol", "0.1"], [*MODELS[:2], "--rtol", "0.1", "--halfwidth", "1"]]
)
def test_a_plan_has_one_target(run, arguments):
    code, _, err = run("plan", *arguments)
    assert code == 2
    assert "expected one candidate with rtol or halfwidth" in err
