"""Commands that cannot be carried out: one message that says what to do, exit code 2, nothing on disk, no traceback."""

import json
from pathlib import Path

import pytest
from tests.tiny import folder

PAIR = ["klkit:docs", "klkit:docs-int8"]
FEW = ["--samples", "4", "--max-tokens", "2"]


def files(path):
    return {file: file.stat().st_mtime_ns for file in path.rglob("*")}


@pytest.fixture
def refused(run, tmp_path):
    """Runs a command that must be refused, in a folder with a text and prompts; returns the message."""
    Path("text.txt").write_text("The value of a name is looked up in the namespace of the module.\n" * 4)
    Path("empty.txt").write_text("\n")

    def command(*arguments):
        before = files(tmp_path)
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), err
        assert "Traceback" not in err
        assert err.startswith("klkit: expected")
        assert err.count("klkit: ") == 1
        assert files(tmp_path) == before
        return err

    return command


COMPARE = [
    (["klkit:docs"], "a reference and at least one candidate, as in: klkit compare klkit:docs klkit:docs-int8"),
    ([], "a reference and at least one candidate"),
    ([*PAIR, "klkit:docs-int8"], "at least one candidate, each once, got klkit:docs-int8 twice"),
    ([*PAIR, "klkit:docs,colour=red"], "got 'colour'"),
    ([*PAIR, "colour=red"], "one of the options revision, dtype,"),
    ([*PAIR, "temprature=0.9"], "did you mean temperature?"),
    ([*PAIR, "temperature=0"], "expected temperature to be a positive finite number, got '0'"),
    ([*PAIR, "round=int3"], "expected round to be one of int4, int8"),
    ([*PAIR, "./absent"], "got './absent', which is not there"),
    ([*PAIR, "klkit:absent"], "klkit:docs"),
    ([*PAIR, "klkit:reviews"], "got klkit:reviews with other strings for 253 ids"),
    ([*PAIR, "--resume"], "--resume alone; add --out FOLDER"),
    ([*PAIR, "--both", "--text", "text.txt"], "--both where strings are sampled, got it with a fixed text"),
    ([*PAIR, "--text", "text.txt", "--samples", "4"], "every token of the text is scored once"),
    ([*PAIR, "--text", "absent.txt"], "got nothing there"),
    ([*PAIR, "--prompts", "empty.txt"], "at least one prompt"),
    ([*PAIR, "--column", "text"], "fields are read from the files of --prompts and --text; leave it out"),
    ([*PAIR, "--context", "64"], "windows are cut from --text only; leave it out"),
    ([*PAIR, "--samples", "0"], "at least 1 for samples"),
    ([*PAIR, "--batch-size", "many"], "'auto' or a whole number for --batch-size"),
    (["klkit:docs", "cache:./kept"], "a cache can stand for p alone"),
    (["cache:./absent", "klkit:docs-int8"], "the folder of a cache at"),
    (["cache:.", "klkit:docs-int8"], "got no manifest.json in it"),
    (["cache:.", "klkit:docs-int8", "--samples", "4"], "got samples, but the strings of"),
    (["cache:.", "klkit:docs-int8", "--prompts", "text.txt", "--seed", "1"], "got prompts, seed, but the strings of"),
    (["cache:.", "klkit:docs-int8", "--temperature", "0.9"], "got temperature, but the strings of"),
    (["cache:.", "klkit:docs-int8", "--both"], "got both, but the strings of"),
    (["cache:.", "klkit:docs-int8", "--floor", "noise"], "its model is not there to be asked again"),
]


@pytest.mark.parametrize(("arguments", "expected"), COMPARE)
def test_comparisons_that_cannot_be(refused, arguments, expected):
    assert expected in refused("compare", *arguments)


GATE = [
    (PAIR, "got --max None; name the largest divergence that is acceptable"),
    ([*PAIR, "--max", "0"], "a positive finite limit, got --max 0.0"),
    ([*PAIR, "--max", "-1"], "a positive finite limit, got --max -1.0"),
    ([*PAIR, "--max", "inf"], "a positive finite limit, got --max inf"),
    ([*PAIR, "--max", "nan"], "a positive finite limit, got --max nan"),
    ([*PAIR, "--max", "0.1", "--per", "word"], "--per response or token"),
    ([*PAIR, "--max", "0.1", "--level", "1"], "a --level between 0.5 and 1"),
    (
        [*PAIR, "--max", "0.1", "--per", "token", "--text", "text.txt"],
        "a fixed text, where all is per token; leave --per out",
    ),
    ([*PAIR, "--max", "0.1", "--per", "token", "--divergence", "js"], "got it with js, which is not per token"),
    ([*PAIR, "--max", "0.1", "--resume"], "--resume alone; add --out FOLDER"),
    (["klkit:docs", "--max", "0.1"], "two models, as in: klkit gate"),
    (["klkit:docs", "klkit:reviews", "--max", "0.1"], "id 257 is 'Ġt' in klkit:docs and 'th' in klkit:reviews"),
    ([*PAIR, "--max", "0.1", "--rtol", "0.1", "--until-halfwidth", "0.1"], "rtol or halfwidth, got both"),
]


@pytest.mark.parametrize(("arguments", "expected"), GATE)
def test_gates_that_cannot_be(refused, arguments, expected):
    assert expected in refused("gate", *arguments)


PLAN = [
    (PAIR, "one candidate with rtol or halfwidth, or two with a difference to resolve"),
    ([*PAIR, "--rtol", "0.1", "--halfwidth", "0.1"], "got 1 with rtol=0.1, halfwidth=0.1"),
    ([*PAIR, "klkit:docs-int4", "--rtol", "0.1"], "got 2 with rtol=0.1"),
    ([*PAIR, "klkit:docs-int4", "klkit:docs-tuned"], "got 3 with"),
    ([*PAIR, "--rtol", "0"], "a positive finite target, got rtol=0.0"),
    ([*PAIR, "--halfwidth", "nan"], "a positive finite target, got halfwidth=nan"),
    ([*PAIR, "klkit:docs-int4", "--difference", "-1"], "a positive finite target, got difference=-1.0"),
    (["klkit:docs", "klkit:reviews", "--rtol", "0.1"], "ids with different strings"),
    (["klkit:docs", "klkit:docs", "--rtol", "0.1", "--max-tokens", "2"], "got 0; give a half-width instead"),
    (["klkit:docs", "klkit:docs,top_k=5", "--rtol", "0.1", "--max-tokens", "2"], "a finite divergence to plan for"),
    ([*PAIR, "--rtol", "0.1", "--prompts", "absent.txt"], "got nothing there"),
]


@pytest.mark.parametrize(("arguments", "expected"), PLAN)
def test_plans_that_cannot_be(refused, arguments, expected):
    assert expected in refused("plan", *arguments)


FLOOR = [
    (["./absent"], "got './absent', which is not there"),
    (["klkit:docs,colour=red"], "got 'colour'"),
    (["klkit:docs", "--samples", "0"], "at least 1 for samples"),
    (["klkit:docs", "--max-tokens", "0"], "at least 1 for max_tokens"),
    (["klkit:docs", "--seed", "-1"], "a seed of at least 0"),
    (["klkit:docs", "--dtype", "int3"], "one of float32, float64, bfloat16"),
    (["klkit:docs", "--prompts", "absent.txt"], "got nothing there"),
]


@pytest.mark.parametrize(("arguments", "expected"), FLOOR)
def test_floors_that_cannot_be(refused, arguments, expected):
    assert expected in refused("floor", *arguments)


CACHE = [
    (["inspect", "./absent"], "the folder of a cache at absent, got nothing there"),
    (["inspect", "."], "got no manifest.json in it"),
    (["build", "--teacher", "klkit:docs", "--data", "absent.jsonl", "--out", "c"], "got nothing there"),
    (["build", "--teacher", "./absent", "--data", "text.txt", "--out", "c"], "got './absent', which is not there"),
    (["build", "--teacher", "klkit:docs", "--data", "text.txt", "--kind", "most", "--out", "c"], "got 'most'"),
    (["build", "--teacher", "klkit:docs", "--data", "text.txt", "--max-size", "many", "--out", "c"], "20GB"),
]


@pytest.mark.parametrize(("arguments", "expected"), CACHE)
def test_caches_that_cannot_be(refused, arguments, expected):
    assert expected in refused("cache", *arguments)


def test_a_missing_argument_is_named(run):
    for command in ("plan", "floor", "import-llamacpp"):
        code, out, err = run(command)
        assert (code, out) == (2, "")
        assert "Missing argument" in err


def test_a_candidate_with_a_short_window_is_named(run):
    wide, short = str(folder("gpt2")), str(folder("gpt2", seed=1, n_positions=16))
    code, out, err = run("compare", wide, short, "--samples", "2", "--max-tokens", "32", "--out", "r")
    assert (code, out) == (2, "")
    assert f"got {short} with a window of 16; lower --max-tokens to 15, or leave it out" in err
    assert "Traceback" not in err


def test_strings_that_were_drawn_serve_again_and_refuse_to_be_drawn_otherwise(refused, run):
    base, other = str(folder("gpt2")), str(folder("gpt2", seed=1))
    code, _, err = run("compare", base, other, *FEW, "--out", "one", "--json", "one.json")
    assert code == 0, err
    code, _, err = run("compare", "cache:one/reference", other, "--out", "two", "--json", "two.json")
    assert code == 0, err
    one, two = (json.loads(Path(name).read_text())["candidates"][0] for name in ("one.json", "two.json"))
    assert one["result"]["headline"]["value"] == pytest.approx(two["result"]["headline"]["value"], rel=1e-6)
    assert "got max_tokens, but the strings of" in refused(
        "compare", "cache:one/reference", other, "--max-tokens", "4", "--out", "three"
    )
    assert "holds files" in refused("compare", base, other, *FEW, "--out", "one")
