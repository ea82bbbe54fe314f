"""A finished run read back: every decision and every string, and their sums."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from tests.test_frames import automata, compared

import klkit
from klkit.api.candidates import folder_of
from klkit.models.automaton import random_automaton
from klkit.report.record import RunFolder, RunFolderError
from klkit.rng import stream


@pytest.fixture(autouse=True)
def pandas(monkeypatch):
    """A stand-in that keeps the columns it is given."""
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda columns: columns))


@pytest.fixture(scope="module")
def models():
    return automata("p", "q")


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl"])
def test_decisions_and_strings_add_up_to_the_result(models, tmp_path, divergence):
    result = klkit.estimate(*models, samples=50, max_tokens=20, divergence=divergence, out=tmp_path / "run")
    run = klkit.read_run(tmp_path / "run")
    decisions, strings = run.decisions(), run.strings()
    assert len({len(column) for column in decisions.values()}) == len({len(column) for column in strings.values()}) == 1
    assert strings["kl_nats"].mean() == pytest.approx(next(e.value for e in result.estimates if e.method == "rb"))
    assert strings["log_ratio_nats"].mean() == pytest.approx(
        next(e.value for e in result.estimates if e.method == "mc")
    )
    for name in ("kl_nats", "log_ratio_nats", "reverse_kl_nats", "entropy_p_nats", "entropy_q_nats", "log_p", "log_q"):
        sums = np.bincount(decisions["string"], decisions[name], minlength=50)
        assert sums == pytest.approx(strings[name], rel=1e-12), name
    assert np.bincount(decisions["string"]).tolist() == strings["tokens"].tolist()
    last = np.flatnonzero(np.diff(decisions["string"], append=50))
    assert (decisions["position"][last] + 1).tolist() == strings["tokens"].tolist()
    assert strings["text"] == [line["text"] for line in run.samples()]
    entropy = decisions["entropy_p_nats"].mean()
    assert entropy == pytest.approx(result.companions["entropy_p"]["value"])


def test_columns_are_of_the_models_as_the_run_calls_them(models, tmp_path):
    """Strings of q: the log-probability under p is that of p, whichever of the two was sampled."""
    p, q = models
    klkit.estimate(p, q, samples=30, max_tokens=20, divergence="reverse_kl", out=tmp_path / "run")
    columns = klkit.read_run(tmp_path / "run").decisions()
    first = columns["position"] == 0
    for model, name in ((p, "log_p"), (q, "log_q")):
        law = model.log_probabilities[0].double().numpy()
        assert columns[name][first] == pytest.approx(law[columns["token"][first]])


def test_the_half_that_q_wrote_is_of_q(models, tmp_path):
    klkit.estimate(*models, samples=30, max_tokens=20, divergence="js", out=tmp_path / "run")
    whole, half = (RunFolder.open(tmp_path / "run" / name) for name in ("", "from_q"))
    assert (whole.roles(), half.roles()) == (("p", "q"), ("q", "p"))
    columns = half.decisions()
    first = columns["position"] == 0
    law = models[1].log_probabilities[0].double().numpy()
    assert columns["log_q"][first] == pytest.approx(law[columns["token"][first]])
    assert "kl_to_mixture_nats" in columns


def test_lost_lines_cost_the_texts_only(models, tmp_path):
    klkit.estimate(*models, samples=30, max_tokens=20, out=tmp_path / "run")
    path = tmp_path / "run" / "samples.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert "text" not in klkit.read_run(tmp_path / "run").strings()


def test_a_candidate_of_a_comparison(tmp_path):
    ranking = compared(out=tmp_path / "run")
    run = klkit.read_run(tmp_path / "run", "b")
    assert run.path == folder_of(tmp_path / "run", "b")
    entry = next(e for e in ranking.entries if e.name == "b")
    rb = next(e for e in entry.result.estimates if e.method == "rb")
    assert run.strings()["kl_nats"].mean() == pytest.approx(rb.value)
    with pytest.raises(RunFolderError, match="got 'd'; it has"):
        klkit.read_run(tmp_path / "run", "d")
    with pytest.raises(RunFolderError, match=r"many models; choose one: klkit.read_run"):
        klkit.read_run(tmp_path / "run").decisions()
    with pytest.raises(RunFolderError, match="got a run of one pair"):
        klkit.read_run(run.path, "b")


def test_an_unfinished_run_has_no_tables(tmp_path):
    RunFolder.create(tmp_path / "run", {}, {})
    with pytest.raises(RunFolderError, match="unfinished"):
        klkit.read_run(tmp_path / "run")
    p, q = (random_automaton(2, 2, generator=stream(0, name)) for name in "pq")
    klkit.estimate(p, q, samples=12, max_tokens=9, out=tmp_path / "other")
    (tmp_path / "other" / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(RunFolderError, match="readable tensors"):
        klkit.read_run(tmp_path / "other").strings()
