"""The published schemas hold for what klkit writes, and for nothing that is broken."""

import copy
import json
import math
from contextlib import nullcontext

import pytest
from jsonschema import Draft202012Validator

import klkit
from klkit.api.candidates import Candidate
from klkit.api.compare import compare_models
from klkit.api.compare_settings import CompareSettings
from klkit.api.settings import DIVERGENCES, UNITS
from klkit.frames import candidate_rows
from klkit.models.automaton import memoryless, random_automaton
from klkit.models.wrap import temperature
from klkit.report.schema import SCHEMAS, schema
from klkit.results import ESTIMANDS
from klkit.rng import stream

TEXT = "The value of a name is looked up in the namespace of the module. " * 20


def automata(*names):
    return [random_automaton(3, 3, generator=stream(0, "schema", name), name=name) for name in names]


def infinite():
    """q never says what p says half of the time."""
    p, q = memoryless([0.5, 0.5], end=0.25), memoryless([1.0, 0.0], end=0.25)
    return klkit.estimate(p, q, samples=40, max_tokens=20)


def text(folder):
    (folder / "text.txt").write_text(TEXT)
    return klkit.estimate("klkit:docs-tuned", "klkit:docs", text=str(folder / "text.txt"), context=64)


def compared(**options):
    p, *candidates = automata("p", "a", "b")
    candidates = [*candidates, temperature(p, 0.9)]
    given = {"p": "p", "candidates": [q.name for q in candidates], "samples": 60, "max_tokens": 20, **options}
    made = [Candidate(q.name, lambda q=q: nullcontext(q)) for q in candidates]
    return compare_models(p, made, CompareSettings.from_mapping(given))


def compared_on_a_text(folder):
    (folder / "text.txt").write_text(TEXT)
    p, q = klkit.load("klkit:docs-tuned"), klkit.load("klkit:docs")
    options = {"p": p.name, "candidates": [q.name], "text": str(folder / "text.txt"), "context": 64}
    made = [Candidate(q.name, lambda: nullcontext(q))]
    return compare_models(p, made, CompareSettings.from_mapping(options), documents=[TEXT])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    p, q = automata("p", "q")
    few = {"samples": 40, "max_tokens": 20}
    return {
        "automata": klkit.estimate(p, q, **few),
        "bits": klkit.estimate(p, q, **few, unit="bits"),
        "reverse": klkit.estimate(p, q, **few, divergence="reverse_kl"),
        "js": klkit.estimate(p, q, **few, divergence="js"),
        "jeffreys": klkit.estimate(p, q, **few, divergence="jeffreys"),
        "few": klkit.estimate(p, q, samples=3, max_tokens=20, floor="none"),
        "infinite": infinite(),
        "models": klkit.estimate("klkit:docs-tuned", "klkit:docs", samples=16, max_tokens=8),
        "text": text(tmp_path_factory.mktemp("text")),
    }


@pytest.fixture(scope="module")
def rankings(tmp_path_factory):
    text = compared_on_a_text(tmp_path_factory.mktemp("text"))
    return {"one way": compared(), "both": compared(both=True, unit="bits"), "text": text}


def through_json(result):
    return json.loads(json.dumps(result.to_dict(), allow_nan=False))


def errors(name, value):
    return [f"{error.json_path}: {error.message}" for error in Draft202012Validator(schema(name)).iter_errors(value)]


def test_the_schemas_are_schemas():
    for name in SCHEMAS:
        Draft202012Validator.check_schema(schema(name))


def test_results_are_as_the_schema_says(results):
    assert math.isinf(results["infinite"].headline.value)
    for name, result in results.items():
        assert not errors("result", through_json(result)), name


def test_rankings_are_as_the_schema_says(rankings):
    for name, ranking in rankings.items():
        assert not errors("ranking", through_json(ranking)), name


def test_a_candidate_of_a_text_has_one_quantity(rankings):
    (row,) = candidate_rows(through_json(rankings["text"]))
    head = rankings["text"].entries[0].result.headline
    assert (row["kl_nats_per_text_token"], row["less_closest_nats_per_text_token"]) == (head.value, 0.0)
    assert "kl_nats_per_token" not in row


def test_the_schema_knows_every_word_of_the_code():
    parts = schema("result")["$defs"]
    assert parts["estimand"]["enum"] == list(ESTIMANDS)
    assert parts["unit"]["enum"] == list(UNITS)
    assert parts["divergence"]["enum"] == list(DIVERGENCES)


def test_every_key_is_required_or_open_on_purpose(results):
    """What every result has, the schema demands; what it demands, every result has."""
    whole = schema("result")
    assert set(whole["required"]) == set(results["automata"].to_dict()) == set(whole["properties"])
    head = whole["$defs"]["estimate"]
    assert set(head["required"]) == set(results["automata"].headline.to_dict()) == set(head["properties"])


def keys_of(value, path=()):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from keys_of(inner, (*path, key))


def without(value, path):
    changed = copy.deepcopy(value)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return changed


def test_a_missing_key_is_found(results):
    result = through_json(results["automata"])
    required = [path for path in keys_of(result) if len(path) == 1 or path[0] in ("headline", "floor")]
    assert len(required) > 30
    for path in required:
        assert errors("result", without(result, path)), path


MUTATIONS = [
    (("schema",), "klkit.result/2"),
    (("roles",), ["q", "q"]),
    (("headline", "value"), None),
    (("headline", "value"), "infinity"),
    (("headline", "stderr"), -1.0),
    (("headline", "estimand"), "T"),
    (("headline", "unit"), "hartleys"),
    (("headline", "divergence"), "tv"),
    (("headline", "n_sequences"), 0),
    (("headline", "n_sequences"), 2.5),
    (("headline", "truncated_share"), 1.5),
    (("headline", "ci", "level"), 95),
    (("headline", "ci", "lower"), [0]),
    (("estimates",), []),
    (("variance_ratio_vs_mc", "rb"), "small"),
    (("audit", "passed"), "yes"),
    (("audit", "checks", "not_a_number", "verdict"), "good"),
    (("floor", "unit"), "bits"),
    (("lower_bound", "value"), -0.5),
    (("lower_bound",), {"value": 1.0}),
    (("tail",), {"verdict": "light"}),
    (("companions", "same_top"), 0.5),
    (("breakdown", "by_position", 0, "kl"), "high"),
    (("breakdown", "tokens", 0, "token"), "a"),
    (("breakdown", "end"), {"end_share": 0.5}),
    (("notes",), "none"),
    (("settings", "p"), 1),
    (("provenance", "models", "q", "weights"), 7),
    (("lines", "audit"), 1),
]


@pytest.mark.parametrize(
    ("path", "value"), MUTATIONS, ids=lambda x: "-".join(map(str, x)) if type(x) is tuple else None
)
def test_a_wrong_value_is_found(results, path, value):
    changed = through_json(results["automata"])
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]]  # there is something to change
    inner[path[-1]] = value
    assert errors("result", changed)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("candidates",), []),
        (("level",), 1.0),
        (("candidates", 0, "rank_first"), 0),
        (("candidates", 0, "against_floor", "verdict"), "below"),
        (("candidates", 0, "per_token", "unit"), "hartleys"),
        (("candidates", 0, "result", "headline", "estimand"), "T"),
        (("candidates", 0, "result", "schema"), "klkit.ranking/1"),
        (("candidates", 0, "reverse"), 0.5),
        (("pairs", 0, "p_adjusted"), 1.5),
        (("pairs", 0, "verdict"), None),
        (("frontier",), None),
    ],
)
def test_a_wrong_ranking_is_found(rankings, path, value):
    changed = through_json(rankings["one way"])
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]]
    inner[path[-1]] = value
    assert errors("ranking", changed)


def test_keys_may_be_added(results, rankings):
    result = through_json(results["automata"])
    result["new"] = result["companions"]["new"] = result["breakdown"]["new"] = {"value": [1, 2]}
    assert not errors("result", result)
    ranking = through_json(rankings["one way"])
    ranking["new"] = ranking["candidates"][0]["new"] = ranking["candidates"][0]["size"]["new"] = 1
    assert not errors("ranking", ranking)


def test_another_schema_is_refused():
    with pytest.raises(ValueError, match="among result, ranking, got 'page'"):
        schema("page")
