"""``klkit cache``: built, looked at, asked again, and refused, as a user sees it."""

import json

import pytest

TEACHER = "klkit:reviews"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [{"prompt": f"the film {i}", "response": f" was {'very ' * (i % 4)}good"} for i in range(9)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def build(run, data, *options):
    return run("cache", "build", "--teacher", TEACHER, "--data", data, *options)


KINDS = [
    (),
    ("--kind", "top-k", "--k", 8),
    ("--kind", "sampled", "--draws", 20),
    ("--kind", "hybrid", "--k", 8, "--draws", 4),
]


@pytest.mark.parametrize("options", KINDS)
def test_a_cache_is_built_looked_at_and_asked_again(run, data, options):
    code, out, err = build(run, data, "--out", "c", *options)
    assert code == 0, err
    assert "will take about" in out
    assert "in half precision would take" in out
    assert "9 examples" in out
    code, out, _ = run("cache", "inspect", "c", "--teacher", TEACHER, "--data", data)
    assert code == 0
    assert "agrees" in out
    assert all(len(line) <= 80 for line in out.splitlines())
    code, out, _ = run("cache", "inspect", "c")
    assert code == 0
    assert "asked again" not in out
    code, out, _ = build(run, data, "--out", "c", *options)
    assert code == 0


def test_a_stale_cache_fails_the_inspection(run, data):
    build(run, data, "--out", "c")
    code, out, _ = run("cache", "inspect", "c", "--teacher", "klkit:reviews-positive")
    assert code == 1
    assert "STALE" in out
    assert "other weights" in " ".join(out.split())
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join(lines[::-1]))
    code, out, _ = run("cache", "inspect", "c", "--teacher", TEACHER, "--data", data)
    assert code == 1
    assert "in another order" in " ".join(out.split())
    assert all(len(line) <= 80 for line in out.splitlines())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (("--max-size", "1KB"), "expected a cache of at most 1 KB"),
        (("--max-size", "some"), "expected a size such as 20GB"),
        (("--kind", "logits"), "expected a kind among hidden, top-k, sampled"),
        (("--kind", "top-k", "--k", 100_000), "expected k of at most"),
        (("--kind", "hybrid", "--k", 100_000), "expected k of at most"),
        (("--temperature", 2), "expected a temperature with the kind top-k only"),
        (("--response-column", "answer"), "expected a response in every example, got 9 without one"),
        (("--max-tokens", 0), "expected max_tokens of at least 1"),
    ],
)
def test_bad_input_is_refused_in_a_line_and_nothing_is_written(run, data, options, what, tmp_path):
    code, _, err = build(run, data, "--out", "c", *options)
    assert code == 2
    assert what in err
    assert not (tmp_path / "c").exists()


def test_empty_responses_are_refused_or_left_out(run, data):
    data.write_text(data.read_text() + json.dumps({"prompt": "the film", "response": " "}) + "\n")
    code, _, err = build(run, data, "--out", "c")
    assert code == 2
    assert "--skip-empty" in err
    code, out, _ = build(run, data, "--out", "c", "--skip-empty")
    assert code == 0
    assert "9 examples" in out
    data.write_text(json.dumps({"prompt": "the film", "response": ""}) + "\n")
    code, _, err = build(run, data, "--out", "d", "--skip-empty")
    assert code == 2
    assert "expected an example with a response" in err


def test_another_cache_in_the_folder_is_kept(run, data):
    build(run, data, "--out", "c")
    code, _, err = build(run, data, "--out", "c", "--kind", "top-k")
    assert code == 2
    assert "kind: 'hidden' then, 'top-k' now" in err
    code, _, err = run("cache", "inspect", "c", "--data", data)
    assert code == 2
    assert "add --teacher" in err


def test_an_interrupted_build_says_how_to_go_on(run, data, monkeypatch):
    from klkit.caches import build as building

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(building, "_ask", interrupt)
        code, _, err = build(run, data, "--out", "c")
    assert code == 130
    assert "repeat the command" in err
    assert run("cache", "inspect", "c")[0] == 2
    assert build(run, data, "--out", "c")[0] == 0
