"""Breakdowns by confidence, class and group against sums over all strings, and against the definitions."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

import klkit
from bank import INFINITE, short_pair
from enumeration import scores, strings
from klkit.api.facets import CONFIDENCE, FacetSums, by_class, by_confidence, by_group, end_share
from klkit.divergences.kl import kl
from klkit.estimators.statistics import TokenStatistics, score
from klkit.models.automaton import memoryless, random_automaton
from klkit.models.token_classes import DECISION_CLASSES, NAMES, decision_classes, token_classes
from klkit.rng import numpy_stream, stream
from klkit.sampling.ancestral import sample
from klkit.sequences import Prompts
from klkit.stats.intervals import cluster_totals, ratio_interval

BINS = len(CONFIDENCE) - 1
CLASSES = torch.tensor([5, 3, 2, 0])  # a word, digits, punctuation, and the end, of four tokens


@pytest.fixture(scope="module")
def drawn():
    p, q = (random_automaton(3, 3, generator=stream(11, "facets", name), spread=2.0) for name in "pq")
    x = sample(p, [p.context(None)] * 120, max_tokens=40, seed=0).sequences
    return score(p, q, x)


def clustered(statistics: TokenStatistics, clusters: int) -> TokenStatistics:
    return replace(statistics, x=replace(statistics.x, cluster=torch.arange(len(statistics.x)) % clusters))


@pytest.mark.parametrize("seed", range(3))
def test_parts_are_expectations_over_all_strings(seed):
    """Each part by its definition, and all parts together the divergence itself."""
    p, q = short_pair(seed)
    law = strings(p, 4)
    logp, logq = (scores(model, law.x)[1] for model in (p, q))
    confidence, each = logp.exp().amax(-1), kl(logp, logq)
    chance = law.probability[law.x.row()]
    sums = FacetSums.of(score(p, q, law.x), CLASSES)
    expected = law.probability.numpy() @ sums.kl
    decisions = law.probability.numpy() @ sums.decisions
    for i, (start, stop) in enumerate(pairwise(CONFIDENCE)):
        inside = (confidence >= start) & ((confidence < stop) | (stop == 1.0))
        assert expected[i] == pytest.approx(float((chance * each)[inside].sum()), abs=1e-14)
        assert decisions[i] == pytest.approx(float(chance[inside].sum()), abs=1e-14)
    drawn = CLASSES[law.x.targets()]
    for i, name in enumerate(DECISION_CLASSES):
        inside = (drawn == i) & ((law.x.position() > 0) | (name == "end"))
        if name == "first":
            inside = (law.x.position() == 0) & (drawn != 0)
        assert expected[BINS + i] == pytest.approx(float((chance * each)[inside].sum()), abs=1e-14), name
    truth = klkit.exact(p, q)
    for part in (slice(BINS), slice(BINS, None)):
        assert expected[part].sum() == pytest.approx(truth.value, rel=1e-12)
        assert decisions[part].sum() == pytest.approx(truth.decisions, rel=1e-12)
    assert law.probability.numpy() @ sums.total == pytest.approx(truth.value, rel=1e-12)


def test_a_part_is_what_a_hand_made_table_says():
    random = numpy_stream(1, "facets")
    clusters, width = 60, BINS + len(DECISION_CLASSES)
    decisions = random.poisson(1.5, (clusters, width)).astype(np.int32)
    decisions[:, BINS + 1] = 0  # no special tokens
    decisions[:, 4] = np.arange(clusters) < 9  # too few clusters with a confident decision
    totals = decisions * random.exponential(1.0, (clusters, width))
    sums = FacetSums(np.arange(clusters), totals, decisions, totals[:, 0] / 2)
    whole = totals[:, :BINS].sum(1)
    for i, row in enumerate(by_confidence(sums, 120)[:4]):
        reached = decisions[:, i] > 0
        mean = ratio_interval(totals[reached, i], decisions[reached, i].astype(float))
        part = ratio_interval(totals[:, i], whole)
        assert (row["lower"], row["upper"], row["method"]) == (mean.lower, mean.upper, mean.method)
        assert (row["share_lower"], row["share_upper"]) == (part.lower, part.upper)
        assert row["kl"] == pytest.approx(totals[:, i].sum() / decisions[:, i].sum())
        assert row["share"] == pytest.approx(totals[:, i].sum() / whole.sum())
        assert row["nats_per_response"] == pytest.approx(totals[:, i].sum() / 120)
        assert row["decision_share"] == pytest.approx(decisions[:, i].sum() / decisions[:, :BINS].sum())
        assert (row["start"], row["stop"], row["level"]) == (CONFIDENCE[i], CONFIDENCE[i + 1], 0.95)
    rare = by_confidence(sums, 120)[4]
    assert (rare["lower"], rare["share_lower"]) == ("nan", "nan")
    assert "fewer than 10" in rare["method"]
    assert "fewer than 10" in rare["share_method"]
    assert rare["share"] == pytest.approx(totals[:, 4].sum() / whole.sum())
    assert [row["class"] for row in by_class(sums, 120)] == [name for name in NAMES if name != "special"]
    end = end_share(sums)
    wanted = ratio_interval(totals[:, 0] / 2, whole)
    assert (end["end_share_lower"], end["end_share_upper"]) == (wanted.lower, wanted.upper)
    assert end["end_share"] + end["content_share"] == 1


def test_few_of_many_clusters_are_no_large_sample():
    random = numpy_stream(2, "facets")
    clusters = 500
    decisions = np.ones((clusters, BINS), np.int32)
    decisions[30:, 1] = 0
    totals = decisions * random.exponential(1.0, (clusters, BINS))
    often, rare, *_ = by_confidence(FacetSums(np.arange(clusters), totals, decisions, totals[:, 0]), clusters)
    assert (often["share_method"], rare["share_method"]) == ("t", "bootstrap-t")
    wanted = ratio_interval(totals[:, 1], totals.sum(1), method="bootstrap-t")
    assert (rare["share_lower"], rare["share_upper"]) == (wanted.lower, wanted.upper)


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        for name, value in a.items():
            if name in ("class", "method", "share_method", "level"):
                assert b[name] == value
            else:
                assert float(b[name]) == pytest.approx(float(value), rel=1e-9, abs=1e-15, nan_ok=True), name


@pytest.mark.parametrize("clusters", [120, 13])
@pytest.mark.parametrize("size", [1, 17, 60])
def test_batches_add_up_however_strings_are_cut(drawn, clusters, size):
    statistics = clustered(drawn, clusters)
    whole = FacetSums.of(statistics, CLASSES)
    order = torch.from_numpy(numpy_stream(0, "order").permutation(120))
    parts = FacetSums.cat([FacetSums.of(statistics.select(rows), CLASSES) for rows in order.split(size)])
    assert parts.cluster.tolist() == whole.cluster.tolist()
    assert (parts.decisions == whole.decisions).all()
    same(by_confidence(parts, 120), by_confidence(whole, 120))
    same(by_class(parts, 120), by_class(whole, 120))
    assert parts.end_kl == pytest.approx(whole.end_kl)
    kept = (parts.cluster, parts.kl, parts.decisions, parts.end_kl)
    assert sum(array.nbytes for array in kept) <= 200 * clusters


@pytest.mark.parametrize("clusters", [120, 13])
def test_parts_of_a_sample_add_up_to_it(drawn, clusters):
    sums = FacetSums.of(clustered(drawn, clusters), CLASSES)
    mean = float(drawn.rows.kl.sum()) / 120
    for rows in (by_confidence(sums, 120), by_class(sums, 120)):
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        assert sum(row["decision_share"] for row in rows) == pytest.approx(1)
        assert sum(row["decisions"] for row in rows) == drawn.x.decisions
        assert sum(row["nats_per_response"] for row in rows) == pytest.approx(mean)
        for row in rows:
            assert float(row["share_lower"]) <= row["share"] <= float(row["share_upper"]) or row["decisions"] < 40
    assert end_share(sums)["end_share"] == pytest.approx(float(drawn.rows.end_kl.sum() / drawn.rows.kl.sum()))


def test_buckets_are_closed_below(drawn):
    few = drawn.select(torch.arange(20))
    edges = torch.tensor([0.1, 0.25, 0.4999, 0.5, 0.75, 0.9499, 0.95, 1.0], dtype=torch.float64)
    confidence = edges[torch.arange(few.x.decisions) % 8]
    counts = FacetSums.of(replace(few, rows=replace(few.rows, confidence=confidence))).decisions.sum(0)
    bucket = [[0.1], [0.25, 0.4999], [0.5], [0.75, 0.9499], [0.95, 1.0]]
    assert counts.tolist() == [sum(int((confidence == value).sum()) for value in values) for values in bucket]


def test_strings_that_do_not_know_their_confidence_are_refused(drawn):
    rows = replace(drawn.rows, confidence=torch.full_like(drawn.rows.kl, torch.nan))
    with pytest.raises(ValueError, match="earlier version"):
        FacetSums.of(replace(drawn, rows=rows), CLASSES)


def test_a_text_has_no_first_tokens(drawn):
    sums = FacetSums.of(drawn, CLASSES, first=False)
    assert sums.decisions[:, BINS + DECISION_CLASSES.index("first")].sum() == 0
    kinds = decision_classes(drawn.x, CLASSES, first=False)
    assert torch.equal(kinds.long(), CLASSES[drawn.x.targets()])


def test_groups_are_the_divergences_of_their_responses(drawn):
    prompt = torch.arange(120) % 30
    strings = replace(drawn.strings(), prompt=prompt, cluster=prompt)
    groups = ["far" if i < 12 else "near" if i < 25 else "small" for i in range(30)] + ["never drawn"]
    rows = {row["group"]: row for row in by_group(strings, groups)}
    assert list(rows) == ["far", "near", "small", "never drawn"]
    assert [(row["prompts"], row["strings"]) for row in rows.values()] == [(12, 48), (13, 52), (5, 20), (0, 0)]
    for name, row in list(rows.items())[:3]:
        inside = torch.tensor([groups[i] == name for i in prompt.tolist()])
        mine = strings.kl[inside]
        assert row["nats_per_response"] == pytest.approx(float(mine.mean()))
        wanted = ratio_interval(*cluster_totals(mine.numpy(), np.ones(len(mine)), prompt[inside].numpy()))
        assert (float(row["lower"]), float(row["upper"])) == pytest.approx((wanted.lower, wanted.upper), nan_ok=True)
    assert "fewer than 10" in rows["small"]["method"]
    assert rows["never drawn"]["nats_per_response"] == rows["never drawn"]["lower"] == "nan"
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)


def test_models_that_are_one_differ_nowhere(drawn):
    p = memoryless([0.5, 0.5], end=0.25)
    x = sample(p, [p.context(None)] * 30, max_tokens=30, seed=0).sequences
    sums = FacetSums.of(score(p, p, x), token_classes(p))
    for row in (*by_confidence(sums, 30), *by_class(sums, 30)):
        assert (row["share"], row["share_lower"], row["share_method"]) == (0.0, "nan", "none (no divergence)")
    assert end_share(sums)["content_share"] == 0


def test_a_run_brings_its_parts():
    p, q = (random_automaton(3, 5, generator=stream(3, "parts", name)) for name in "pq")
    groups = tuple("ab"[i % 2] for i in range(24))
    prompts = Prompts(tuple(torch.tensor([5, i % 5]) for i in range(24)), groups)
    result = klkit.estimate(p, q, prompts, samples=3, max_tokens=40, token_js=True)
    parts = result.to_dict()["breakdown"]
    rb = next(e for e in result.estimates if e.method == "rb" and e.estimand == "S").value
    for name in ("by_confidence", "by_class", "by_position"):
        assert sum(row["nats_per_response"] for row in parts[name]) == pytest.approx(rb)
    assert [row["group"] for row in parts["by_group"]] == ["a", "b"]
    assert np.mean([row["nats_per_response"] for row in parts["by_group"]]) == pytest.approx(rb)
    assert result.lines["where"].count("groups from 'a'") + result.lines["where"].count("groups from 'b'") == 1
    assert 0 < result.companions["js_at_p"]["value"] < np.log(2)
    assert "not that of whole responses" in result.lines["per token"]
    plain = klkit.estimate(p, q, samples=20, max_tokens=20)
    assert "js_at_p" not in plain.companions
    assert plain.breakdown["by_group"] == []
    reverse = klkit.estimate(p, q, samples=20, max_tokens=20, divergence="reverse_kl", token_js=True)
    assert "js_at_q" in reverse.companions


def test_an_infinite_divergence_is_not_taken_apart():
    parts = klkit.estimate(INFINITE.p, INFINITE.q, samples=20, max_tokens=20).breakdown
    assert parts["by_confidence"] == parts["by_class"] == parts["by_group"] == []
