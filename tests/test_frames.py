"""Results as rows: every number where its column says it is, in nats, and pandas only where it is asked for."""

import json
import math
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

import klkit
from klkit.api.candidates import Candidate
from klkit.api.compare import compare_models
from klkit.api.compare_settings import CompareSettings
from klkit.frames import candidate_rows, difference, estimator_rows, frame, result_row
from klkit.models.automaton import random_automaton
from klkit.ranking import gaps
from klkit.rng import stream


def automata(*names):
    return [random_automaton(3, 3, generator=stream(1, "frames", name), name=name) for name in names]


def compared(out=None, **options):
    p, *candidates = automata("p", "a", "b", "c")
    given = {"p": "p", "candidates": [q.name for q in candidates], "samples": 60, "max_tokens": 20, **options}
    sizes = [{"file_bytes": 10 * (i + 1), "parameters": 7, "bits_per_weight": 4.0} for i in range(3)]
    made = [
        Candidate(q.name, lambda q=q: nullcontext(q), lambda _, size=size: size)
        for q, size in zip(candidates, sizes, strict=True)
    ]
    return compare_models(p, made, CompareSettings.from_mapping(given), out=out)


@pytest.fixture(scope="module")
def ranking():
    return compared(both=True)


@pytest.fixture(scope="module")
def result():
    return klkit.estimate(*automata("p", "q"), samples=40, max_tokens=20)


@pytest.fixture
def pandas(monkeypatch):
    """A stand-in that keeps what it is given."""
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda rows: ("frame", rows)))


def test_one_row_an_estimator(result, pandas):
    kind, rows = result.to_dataframe()
    assert kind == "frame"
    assert [(row["method"], row["estimand"]) for row in rows] == [(e.method, e.estimand) for e in result.estimates]
    for row, e in zip(rows, result.estimates, strict=True):
        interval = e.interval()
        found = row["nats"], row["nats_stderr"], row["nats_lower"], row["nats_upper"]
        assert found == (e.value, e.stderr, interval.lower, interval.upper)
        assert (row["n_strings"], row["n_clusters"], row["per"]) == (
            e.n, e.clusters, {"S": "response", "R": "token"}[e.estimand]
        )  # fmt: skip
    ratios = {row["method"]: row["variance_ratio_vs_mc"] for row in rows if row["estimand"] == "S"}
    assert ratios == result.variance_ratio_vs_mc
    assert math.isnan(rows[-1]["variance_ratio_vs_mc"])  # per token nothing is compared with Monte Carlo


def test_bits_become_nats():
    p, q = automata("p", "q")
    nats, bits = (klkit.estimate(p, q, samples=40, max_tokens=20, unit=unit).to_dict() for unit in ("nats", "bits"))
    assert nats["headline"]["value"] != pytest.approx(bits["headline"]["value"])
    for one, two in (
        (result_row(nats), result_row(bits)),
        *zip(estimator_rows(nats), estimator_rows(bits), strict=True),
    ):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert value == two[name] or value == pytest.approx(two[name], rel=1e-12, nan_ok=True), name


def test_a_result_in_one_row(result):
    row = result_row(json.loads(json.dumps(result.to_dict())))
    head, rate = result.headline, result.estimates[-1]
    assert row["kl_nats_per_response"] == head.value
    assert (row["kl_nats_per_response_lower"], row["kl_nats_per_token"]) == (head.interval().lower, rate.value)
    assert row["same_top_share"] == result.companions["same_top"]["value"]
    assert row["entropy_q_nats_per_token_stderr"] == result.companions["entropy_q"]["stderr"]
    assert row["lower_bound_nats_per_response"] == result.lower_bound["value"]
    assert row["audit_passed"] is True


def test_a_reverse_and_a_symmetric_result_name_their_quantity():
    p, q = automata("p", "q")
    reverse, symmetric = (
        result_row(klkit.estimate(p, q, samples=30, max_tokens=20, divergence=name).to_dict())
        for name in ("reverse_kl", "js")
    )
    assert {"reverse_kl_nats_per_response", "reverse_kl_nats_per_token", "reverse_kl_at_q_nats_per_token"} < set(
        reverse
    )
    assert "js_nats_per_response" in symmetric
    assert not any(name.startswith("kl_") for name in (*reverse, *symmetric))


def test_one_row_a_candidate(ranking, pandas):
    _, rows = ranking.to_dataframe()
    assert [row["candidate"] for row in rows] == [ranking.entries[i].name for i in ranking.ranked]
    values = [row["kl_nats_per_response"] for row in rows]
    assert values == sorted(values)
    best = ranking.entries[ranking.ranked[0]].result.headline
    for row, i in zip(rows, ranking.ranked, strict=True):
        entry = ranking.entries[i]
        assert (row["rank_first"], row["rank_last"]) == ranking.rank(i)
        assert (row["file_bytes"], row["bits_per_weight"]) == (10 * (i + 1), 4.0)
        assert row["on_frontier"] == (entry.name in ranking.frontier())
        assert row["reverse_kl_nats_per_response"] == entry.reverse.headline.value
        gap = entry.result.headline.value - best.value
        assert row["less_closest_nats_per_response"] == pytest.approx(gap, abs=1e-12)
        assert row["less_closest_nats_per_response_lower"] <= gap <= row["less_closest_nats_per_response_upper"]


def test_differences_change_their_sign_with_their_order(ranking):
    result = ranking.to_dict()
    one, two = gaps(result, "b")["a"], gaps(result, "a")["b"]
    assert one.difference == -two.difference != 0
    assert (one.lower, one.upper) == (-two.upper, -two.lower)
    assert one.stderr == two.stderr > 0
    assert (one.adjusted, one.tied) == (two.adjusted, two.tied)
    assert difference(one, "nats", "d") == dict(zip(("d", "d_stderr", "d_lower", "d_upper"), one[:4], strict=True))
    assert difference(one, "bits", "d")["d"] == pytest.approx(one.difference * math.log(2))
    assert set(difference(None, "nats", "d").values()) == {0.0}


def test_of_a_text_there_is_one_quantity(tmp_path):
    (tmp_path / "text.txt").write_text("The value of a name is looked up in the namespace of the module. " * 20)
    found = klkit.estimate("klkit:docs-tuned", "klkit:docs", text=str(tmp_path / "text.txt"), context=64)
    row = result_row(found.to_dict())
    assert row["kl_nats_per_text_token"] == found.headline.value
    assert "kl_nats_per_token" not in row


def test_without_pandas_one_is_told_what_to_do(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"expected pandas for a data frame, got: .*; pip install pandas, or"):
        result.to_dataframe()


def test_pandas_itself_takes_the_rows(ranking, result):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed: pip install pandas")
    table = ranking.to_dataframe()
    assert isinstance(table, pandas.DataFrame)
    assert table.shape == (3, len(candidate_rows(ranking.to_dict())[0]))
    assert table["kl_nats_per_response"].dtype == np.float64
    assert table["rank_first"].dtype == np.int64
    assert len(result.to_dataframe()) == len(result.estimates)
    assert frame({"a": np.arange(3)})["a"].tolist() == [0, 1, 2]
