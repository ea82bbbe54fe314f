"""``klkit report`` and ``klkit schema`` as a user meets them."""

import json
from pathlib import Path

import pytest
import yaml
from tests.integrations.test_lm_eval import answers, worse, write
from tests.test_frames import automata, compared

import klkit
from klkit.api.candidates import folder_of
from klkit.report import badge, card, markdown, ranking


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    klkit.estimate(*automata("p", "q"), samples=40, max_tokens=20, out=root / "pair")
    compared(out=root / "many")
    return root


def result_of(path):
    return json.loads((path / "result.json").read_text())


def test_a_run_in_every_form(run, folders):
    pair = folders / "pair"
    result = result_of(pair)
    assert run("report", pair, "--format", "md")[1] == markdown.markdown(result)
    assert json.loads(run("report", pair, "--format", "json")[1]) == result
    assert run("report", pair, "--format", "card")[1] == card.model_card(result)
    assert json.loads(run("report", pair, "--format", "badge")[1]) == badge.badge(result)
    before = (pair / "report.html").read_text()
    (pair / "report.html").unlink()
    assert run("report", pair)[:2] == (0, f"{pair}/report.html\n")
    assert (pair / "report.html").read_text() == before


def test_a_comparison_in_every_form(run, folders):
    many = folders / "many"
    result = result_of(many)
    assert run("report", many, "--format", "md")[1] == ranking.markdown(result)
    assert json.loads(run("report", many, "--format", "json")[1]) == result
    written = {name: (many / name).read_text() for name in ("report.html", "table.md", "result.json")}
    (many / "report.html").unlink()
    assert run("report", many)[:2] == (0, f"{many}/report.html\n")
    assert {name: (many / name).read_text() for name in written} == written


def test_one_candidate_of_a_comparison(run, folders):
    many = folders / "many"
    result = result_of(many)
    own = next(entry["result"] for entry in result["candidates"] if entry["name"] == "b")
    assert json.loads(run("report", many, "--format", "json", "--candidate", "b")[1]) == own
    assert run("report", many, "--format", "md", "--candidate", "b")[1] == markdown.markdown(own)
    text = run("report", many, "--format", "card", "--candidate", "b")[1]
    assert yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))["model-index"][0]["name"] == "b"
    assert json.loads(run("report", many, "--format", "badge", "--candidate", "b")[1]) == badge.badge(own)
    path = folder_of(many, "b") / "report.html"
    path.unlink()
    assert run("report", many, "--candidate", "b")[:2] == (0, f"{path}\n")
    assert path.is_file()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["pair", "--format", "pdf"], "one of html, md, json, card, badge, got 'pdf'"),
        (["pair", "--format", "md", "--candidate", "b"], "got a run of one pair"),
        (["pair", "--candidate", "b"], "got a run of one pair"),
        (["many", "--format", "card"], "expected --candidate with --format card"),
        (["many", "--format", "badge"], "choose one of"),
        (["many", "--format", "json", "--candidate", "d"], "got 'd'; it has"),
        (["absent", "--format", "json"], "no run at all"),
        (["pair", "--lm-eval", "p=a.json"], "with --format md"),
        (["pair", "--format", "md", "--lm-eval", "a.json"], "MODEL=FILE"),
        (["pair", "--format", "md", "--lm-eval", "p=absent.json"], "at least one of q"),
    ],
)
def test_what_cannot_be_shown_is_said_in_one_message(run, folders, arguments, expected):
    code, out, err = run("report", folders / arguments[0], *arguments[1:])
    assert (code, out) == (2, "")
    assert expected in err


def test_a_distillation_has_a_page_only(run):
    Path("distilled").mkdir()
    Path("distilled/evaluations.jsonl").write_text("")
    code, _, err = run("report", "distilled", "--format", "card")
    assert code == 2
    assert "expected a run of estimate or compare for --format card, got the distillation" in err


def test_tasks_beside_the_divergence(run, folders):
    easy = answers("easy")
    given = [f"{name}={write(Path(name), {'easy': {'acc': x}})}" for name, x in (("p", easy), ("a", worse(easy, 12)))]
    code, out, err = run("report", folders / "many", "--format", "md", "--lm-eval", given[0], "--lm-eval", given[1])
    assert code == 0, err
    assert out.startswith(ranking.markdown(result_of(folders / "many")))
    assert "| easy | acc | " in out


def test_schemas_are_printed(run):
    for name in ("result", "ranking"):
        code, out, _ = run("schema", name)
        assert (code, json.loads(out)["title"]) == (0, f"klkit.{name}/1")
    assert run("schema", "page")[0] == 2
