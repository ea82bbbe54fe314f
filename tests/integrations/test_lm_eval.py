"""Benchmark files in the form that lm-evaluation-harness writes, beside divergences."""

import json
import math

import numpy as np
import pytest
from tests.test_frames import automata, compared

import klkit
from klkit.integrations.lm_eval import beside
from klkit.rng import numpy_stream
from klkit.stats.mcnemar import mcnemar_p
from klkit.stats.paired import holm, paired_difference

DATE = "2026-02-03T04-05-06.789012"


@pytest.fixture(scope="module")
def ranking():
    return compared()


def write(folder, scores, *, keep=True, versions=1.0, shots=0, docs=None):
    """The files of one model: ``scores`` has a list of numbers a document for each task and metric."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"results": {}, "versions": {}, "n-shot": {}, "higher_is_better": {}, "group_subtasks": {}, "config": {}}
    for task, metrics in scores.items():
        found["results"][task] = {"alias": task}
        found["versions"][task], found["n-shot"][task], found["group_subtasks"][task] = versions, shots, []
        found["higher_is_better"][task] = {name: name != "perplexity" for name in metrics}
        for name, values in metrics.items():
            found["results"][task][f"{name},none"] = float(np.mean(values))
            found["results"][task][f"{name}_stderr,none"] = "N/A"
        if keep:
            lines = []
            for i in range(len(next(iter(metrics.values())))):
                doc = {"question": f"{task} {i}", "passage": i // 4} if docs is None else docs[i]
                line = {"doc_id": i, "doc": doc, "filter": "none", "metrics": list(metrics), "doc_hash": f"{task}{i}"}
                lines.append(line | {name: float(values[i]) for name, values in metrics.items()})
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / f"samples_{task}_{DATE}.jsonl").write_text(text)
    path = folder / f"results_{DATE}.json"
    path.write_text(json.dumps(found))
    return path


def answers(name, n=200, share=0.7):
    return (numpy_stream(0, "answers", name).random(n) < share).astype(float)


def worse(values, changed):
    """The same answers but for the first right ones, which are wrong."""
    found = values.copy()
    found[np.flatnonzero(values)[:changed]] = 0.0
    return found


@pytest.fixture
def files(tmp_path):
    easy, hard = answers("easy"), answers("hard", share=0.4)
    return {
        "p": write(tmp_path / "p", {"easy": {"acc": easy}, "hard": {"acc": hard}}),
        "a": write(tmp_path / "a", {"easy": {"acc": worse(easy, 12)}, "hard": {"acc": hard}}),
        "b": write(tmp_path / "b", {"easy": {"acc": worse(easy, 2)}, "hard": {"acc": 1 - hard}}),
    }


def test_each_candidate_stands_beside_its_divergence_and_its_paired_difference(ranking, files):
    table = beside(ranking, files)
    found = {(row.candidate, row.task): row for row in table.rows}
    assert len(found) == len(table.rows) == 4
    for (name, _), row in found.items():
        entry = next(e for e in ranking.entries if e.name == name)
        assert row.kl == entry.result.headline.to_dict()
        assert row.difference == row.value - row.reference
    row = found["a", "easy"]
    assert (row.p, row.method, row.documents) == (mcnemar_p(0, 12), "exact McNemar", 200)
    assert row.difference == pytest.approx(-12 / 200)
    assert row.lower < row.difference < row.upper < 0
    assert row.stderr == pytest.approx(np.std([-1.0] * 12 + [0.0] * 188, ddof=1) / math.sqrt(200))
    assert (found["a", "hard"].p, found["a", "hard"].difference) == (1.0, 0.0)
    assert [row.adjusted for row in table.rows] == holm([row.p for row in table.rows])
    verdicts = {key: row.verdict for key, row in found.items()}
    assert verdicts == {
        ("a", "easy"): "worse",
        ("a", "hard"): "not resolved",
        ("b", "easy"): "not resolved",
        ("b", "hard"): "better",
    }


def test_pairing_finds_what_two_error_bars_hide(ranking, files):
    """12 documents of 200, all in one direction: certain, though the accuracies are within their standard errors."""
    row = next(row for row in beside(ranking, files).rows if (row.candidate, row.task) == ("a", "easy"))
    errors = [math.sqrt(x * (1 - x) / 200) for x in (row.value, row.reference)]
    assert abs(row.difference) / math.hypot(*errors) < 1.96
    assert row.adjusted < 0.01


def test_numbers_are_compared_by_a_paired_t(ranking, tmp_path):
    one = numpy_stream(0, "scores").gamma(2.0, size=60)
    two = one + numpy_stream(1, "scores").normal(0.1, 0.2, size=60)
    files = {"p": write(tmp_path / "p", {"task": {"perplexity": one}})}
    files["b"] = write(tmp_path / "b", {"task": {"perplexity": two}})
    (row,) = beside(ranking, files).rows
    wanted = paired_difference(two, one)
    assert (row.p, row.stderr) == (pytest.approx(wanted.p), pytest.approx(wanted.stderr))
    assert (row.method, row.verdict) == ("paired t", "worse")  # a higher perplexity


def test_documents_that_belong_together_count_once(ranking, files):
    alone, together = (
        next(row for row in beside(ranking, files, cluster=c).rows if (row.candidate, row.task) == ("a", "easy"))
        for c in (None, "passage")
    )
    assert (together.difference, together.method) == (alone.difference, "paired t")
    assert together.stderr > 1.5 * alone.stderr  # the changed answers are neighbours
    with pytest.raises(ValueError, match=r"the field 'book' in every document of easy, .* one of question, passage"):
        beside(ranking, files, cluster="book")


def test_without_samples_there_is_a_difference_and_no_test(ranking, files, tmp_path):
    files["a"] = write(tmp_path / "c", {"easy": {"acc": worse(answers("easy"), 12)}}, keep=False)
    rows = [row for row in beside(ranking, files).rows if row.candidate == "a"]
    assert [row.task for row in rows] == ["easy"]
    assert rows[0].difference == pytest.approx(-0.06)
    assert math.isnan(rows[0].p)
    assert "--log_samples" in rows[0].verdict


def test_what_is_no_mean_over_documents_is_not_tested(ranking, files):
    content = json.loads(files["a"].read_text())
    content["results"]["easy"]["acc,none"] += 0.1
    content["results"]["easy"] |= {"f1,none": 0.5, "f1_stderr,none": 0.1}
    content["group_subtasks"]["hard"] = ["other"]
    files["a"].write_text(json.dumps(content))
    rows = [row for row in beside(ranking, files).rows if row.candidate == "a"]
    assert [row.verdict for row in rows] == [
        "not tested: the metric is no mean over documents",
        "not tested: a group of tasks",
    ]


def test_a_single_result_and_its_models_by_letter(files):
    result = klkit.estimate(*automata("p", "q"), samples=30, max_tokens=20)
    given = {"p": files["p"], "q": files["a"]}
    by_letter, from_json = beside(result, given), beside(json.loads(json.dumps(result.to_dict())), given)
    assert by_letter == from_json
    assert {row.candidate for row in by_letter.rows} == {"q"}


def test_the_table_says_what_was_tested(ranking, files):
    text = beside(ranking, files).markdown()
    assert "4 tests, Holm-adjusted together at 5%" in text
    assert "| a | " in text
    assert "| easy | acc | " in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 6
    assert len({line.count("|") for line in rows}) == 1


def test_files_that_do_not_belong_together_are_refused(ranking, files, tmp_path):
    easy = answers("easy")
    with pytest.raises(ValueError, match=r"reference 'p' \(or 'p'\) and of at least one of .*, got those of a"):
        beside(ranking, {"a": files["a"]})
    with pytest.raises(ValueError, match="got 'd', which was not measured"):
        beside(ranking, {**files, "d": files["a"]})
    for options, message in (({"versions": 2.0}, "versions 1.0 in"), ({"shots": 5}, "n-shot 0 in")):
        other = write(tmp_path / "other", {"easy": {"acc": easy}}, **options)
        with pytest.raises(ValueError, match=message):
            beside(ranking, {"p": files["p"], "a": other})
    short = write(tmp_path / "short", {"easy": {"acc": easy[:150]}})
    with pytest.raises(ValueError, match="the same documents of easy for both models, got 200 and 150"):
        beside(ranking, {"p": files["p"], "a": short})
    with pytest.raises(ValueError, match=r"expected results of lm-evaluation-harness in .*absent"):
        beside(ranking, {"p": files["p"], "a": tmp_path / "absent.json"})
    (tmp_path / "list.json").write_text('{"a": 1}')
    with pytest.raises(ValueError, match="got JSON without 'results'"):
        beside(ranking, {"p": files["p"], "a": tmp_path / "list.json"})
    samples = files["a"].with_name(f"samples_easy_{DATE}.jsonl")
    samples.write_text(samples.read_text() * 2)
    with pytest.raises(ValueError, match="got document 0 twice"):
        beside(ranking, files)
