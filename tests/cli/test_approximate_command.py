"""``klkit estimate --approximate`` as a user meets it."""

import json
import re
from pathlib import Path

PAIR = ["klkit:docs", "klkit:reviews"]
SMALL = ["--samples", "8", "--max-tokens", "16"]


def test_it_prints_within_80_columns_and_keeps_nothing(run):
    code, out, err = run("estimate", *PAIR, "--approximate", *SMALL)
    assert code == 0, err
    text = re.sub(r"\s+", " ", out)
    assert re.search(r"Approximately [\d.]+ nats per response, [\d.]+ per byte, sampling error ±", text)
    assert "two errors of opposite sign" in text
    assert "± sampling only" in text
    assert "interval" not in text
    assert max(map(len, out.splitlines())) <= 80
    assert not list(Path().iterdir())


def test_json_and_config(run):
    Path("a.yaml").write_text("p: klkit:docs\nq: klkit:reviews\napproximate: true\nsamples: 8\nmax_tokens: 16\n")
    code, out, err = run("run", "a.yaml", "--json", "-")
    assert code == 0, err
    found = json.loads(out)
    assert found["schema"] == "klkit.approximation/1"
    assert found["settings"]["samples"] == 8
    assert run("estimate", *PAIR, "--approximate", *SMALL, "--unit", "bits", "--json", "b.json")[0] == 0
    other = json.loads(Path("b.json").read_text())
    assert other["approximate"]["per_byte"]["value"] > found["approximate"]["per_byte"]["value"]
    assert other["bits_per_byte"] == found["bits_per_byte"]


def test_bad_combinations_are_said_without_a_traceback(run):
    for more, said in (
        (["--out", "x"], "keeps nothing"),
        (["--track", "tensorboard"], "got track"),
        (["--method", "mc"], "method='mc'"),
        (["--bytes"], "bytes=True"),
    ):
        code, out, err = run("estimate", *PAIR, "--approximate", *more)
        assert (code, out) == (2, "")
        assert said in err
        assert "Traceback" not in err
    code, _, err = run("estimate", "klkit:docs", "klkit:docs-tuned", "--approximate", *SMALL)
    assert code == 2
    assert "the exact divergence exists" in err


def test_a_refusal_is_one_message_with_what_can_be_compared(run):
    code, out, err = run("estimate", *PAIR, "--max-tokens", "16")
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) == 1
    assert "bits per byte" in err
    assert "--approximate" in err


def test_help_says_what_is_kept(run):
    code, out, _ = run("estimate", "--help")
    assert code == 0
    assert "--approximate" in out
    assert "Keeps nothing but" in re.sub(r"[\s│]+", " ", out)
