import json
import math
from dataclasses import replace

import numpy as np
import pytest

from klkit.results import NATS_PER_BIT, Comparison, Estimate, jsonable, plain
from klkit.stats.intervals import ratio_interval


def estimate(n=40, seed=0, **changes):
    generator = np.random.default_rng(seed)
    lengths = generator.geometric(0.1, size=n).astype(float)
    base = Estimate(
        method="rb",
        divergence="kl",
        direction="KL(p‖q)",
        estimand="R",
        contributions=generator.gamma(lengths),
        weights=lengths,
        cluster=np.arange(n) // 2,
        truncated=0.25,
    )
    return replace(base, **changes)


def comparison(**changes):
    e = estimate(estimand="S", weights=np.ones(40))
    base = Comparison(
        headline=e,
        estimates=(replace(e, method="mc", contributions=2 * e.contributions), e, estimate()),
        audit={"passed": True, "checks": {"ratio": {"value": math.nan}}},
        floor={"kind": "fp32", "value": 0.0, "stderr": math.inf},
        lower_bound={},
        tail={"khat": math.inf},
        companions={"entropy": [1.0, -math.inf]},
        breakdown={},
        settings={},
        provenance={"p": "<b>p</b>"},
        lines={},
        sentence="KL(p‖q) is <3 nats>.",
    )
    return replace(base, **changes)


def test_an_estimate_is_a_ratio_over_clusters():
    e = estimate()
    assert e.value == pytest.approx(e.contributions.sum() / e.weights.sum())
    assert (e.n, e.clusters) == (40, 20)
    totals, weights = e.contributions.reshape(20, 2).sum(1), e.weights.reshape(20, 2).sum(1)
    assert e.interval(0.9) == ratio_interval(totals, weights, level=0.9)


def test_shards_merge_to_the_whole():
    """A prompt's strings may lie in different shards: their cluster is the same, and counts once."""
    whole = estimate(infinite=3, notes=("a", "b"))
    rows = np.random.default_rng(0).permutation(40)
    parts = [
        replace(
            whole,
            contributions=whole.contributions[i],
            weights=whole.weights[i],
            cluster=whole.cluster[i],
            infinite=k,
            truncated=t,
            notes=notes,
        )
        for i, k, t, notes in (
            (rows[:10], 1, 1.0, ("a",)),
            (rows[10:], 2, 0.0, ("a", "b")),
        )
    ]
    merged = parts[0].merge(parts[1])
    assert merged.value == pytest.approx(whole.value, rel=1e-14)
    assert merged.stderr == pytest.approx(whole.stderr, rel=1e-12)
    assert merged.interval().lower == pytest.approx(whole.interval().lower, rel=1e-9)
    assert (merged.n, merged.clusters, merged.truncated) == (40, 20, 0.25)
    assert (merged.infinite, merged.notes) == (3, ("a", "b"))
    assert whole.merge().value == whole.value


@pytest.mark.parametrize(
    "change", [{"method": "mc"}, {"estimand": "S"}, {"direction": "KL(q‖p)"}, {"divergence": "js"}]
)
def test_different_quantities_do_not_merge(change):
    with pytest.raises(ValueError, match="merge like with like"):
        estimate().merge(estimate(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": np.ones(39)}, "one contribution, weight and cluster"),
        ({"contributions": np.ones(0), "weights": np.ones(0), "cluster": np.ones(0, dtype=np.int64)}, "at least one"),
        ({"contributions": np.full(40, math.nan)}, "NaN for 40 of 40"),
        ({"weights": np.zeros(40)}, "not all zero"),
        ({"unit": "bit"}, "nats or bits"),
        ({"estimand": "Q"}, "estimand among S, R, F"),
    ],
)
def test_what_is_not_an_estimate_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        estimate(**change)


def test_bits_are_for_printing_only():
    nats, bits = estimate(), estimate(unit="bits")
    assert bits.value == nats.value
    assert bits.to_dict()["value"] == pytest.approx(nats.value / NATS_PER_BIT)
    assert bits.to_dict()["ci"]["upper"] == pytest.approx(nats.interval().upper / math.log(2))
    assert f"{nats.value / math.log(2):.6g} bits per token" in str(bits)


def test_json_round_trip():
    read = json.loads(json.dumps(estimate().to_dict(0.9), allow_nan=False))
    assert read == estimate().to_dict(0.9)
    assert read["ci"]["level"] == 0.9
    assert read["value"] == estimate().value
    assert (read["n_sequences"], read["n_prompts"]) == (40, 20)


def test_an_infinite_estimate_prints_and_serialises():
    e = estimate(contributions=np.r_[np.ones(39), math.inf], infinite=1)
    read = json.loads(json.dumps(e.to_dict(), allow_nan=False))
    assert (read["value"], read["stderr"], read["ci"]["lower"], read["ci"]["upper"]) == ("inf", "nan", "inf", "inf")
    assert "= inf nats" in str(e)
    assert "infinite contribution" in str(e)


def test_one_string_has_a_value_and_no_error():
    e = Estimate("mc", "kl", "KL(p‖q)", "S", np.array([-0.5]), np.ones(1), np.zeros(1, dtype=np.int64))
    assert e.value == -0.5
    assert math.isnan(e.stderr)
    assert "no 95% interval (fewer than 10 clusters)" in str(e)
    assert json.dumps(e.to_dict(), allow_nan=False)


def test_estimates_compare_by_identity():
    """Arrays have no single truth value: equality of fields would raise, also inside a tuple."""
    a, b = estimate(), estimate()
    assert a != b
    assert len({a, b, a}) == 2


def test_jsonable_and_plain():
    assert [jsonable(x) for x in (0.5, math.inf, -math.inf, math.nan)] == [0.5, "inf", "-inf", "nan"]
    assert plain({"a": [1, {"b": (math.inf, None, True, "c")}]}) == {"a": [1, {"b": ["inf", None, True, "c"]}]}
    assert plain(np.float64(math.nan)) == "nan"


def test_a_comparison_serialises_whatever_it_holds():
    read = json.loads(json.dumps(comparison().to_dict(), allow_nan=False))
    assert read["floor"]["stderr"] == read["tail"]["khat"] == "inf"
    assert read["companions"]["entropy"] == [1.0, "-inf"]
    assert read["audit"]["checks"]["ratio"]["value"] == "nan"
    assert read["headline"] == comparison().headline.to_dict()
    assert [e["method"] for e in read["estimates"]] == ["mc", "rb", "rb"]
    assert read["variance_ratio_vs_mc"] == {"mc": 1.0, "rb": pytest.approx(0.25)}


def test_a_failed_audit_is_said_first():
    failed = comparison(audit={"passed": False})
    assert failed.failed
    assert not comparison().failed
    assert str(failed).startswith("THE SELF-AUDIT FAILED")
    assert "THE SELF-AUDIT FAILED" in failed._repr_html_()


def test_notebook_reprs_are_escaped():
    shown = comparison()._repr_html_()
    assert "is &lt;3 nats&gt;." in shown
    assert shown.count("<tr>") == 4
    assert shown.count("<td>") == 20
    assert "<b>" not in estimate(method="<b>")._repr_html_()


def test_no_variance_ratio_without_monte_carlo():
    assert comparison(estimates=(estimate(),)).variance_ratio_vs_mc == {}
