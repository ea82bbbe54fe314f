"""What is pasted elsewhere: Markdown, badges and model cards, with everything that a number needs beside it."""

import copy
import json

import pytest
import yaml
from huggingface_hub import ModelCard
from tests.test_frames import automata, compared

import klkit
from klkit.models.automaton import memoryless
from klkit.report.badge import badge
from klkit.report.card import model_card, public_name, ranking_card
from klkit.report.markdown import markdown

HOSTILE = 'org/a"b: {c}\n---\n| d |\u202e<script>`e`'


@pytest.fixture(scope="module")
def result():
    return klkit.estimate(*automata("p", "q"), samples=40, max_tokens=20).to_dict()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "wiki.txt"
    path.write_text("The value of a name is looked up in the namespace of the module. " * 40)
    return klkit.estimate("klkit:docs-tuned", "klkit:docs", text=str(path), context=64).to_dict()


@pytest.fixture(scope="module")
def infinite():
    p, q = memoryless([0.5, 0.5], end=0.25, name="p"), memoryless([1.0, 0.0], end=0.25, name="q")
    return klkit.estimate(p, q, samples=40, max_tokens=20).to_dict()


@pytest.fixture(scope="module")
def ranking():
    return compared(both=True).to_dict()


def changed(result, **settings):
    found = copy.deepcopy(result)
    found["settings"] |= settings
    return found


def failed(result):
    return {**result, "audit": {**result["audit"], "passed": False}}


def front(card):
    return yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))


# Markdown


def test_markdown_has_every_estimator_and_what_vouches_for_them(result):
    text = markdown(result)
    assert text.startswith(result["sentence"])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(result["estimates"])
    assert len({row.count("|") for row in rows}) == 1
    assert sum("**" in row for row in rows) == 1  # the headline's row
    for line in result["lines"].values():
        assert line in text


def test_markdown_of_a_failed_run_says_so_first(result):
    assert markdown(failed(result)).startswith("**THE SELF-AUDIT FAILED: do not use this number.**")


def test_markdown_of_strange_names_stays_one_table(result):
    other = copy.deepcopy(result)
    other["sentence"] += HOSTILE
    other["notes"] = [HOSTILE]
    text = markdown(other)
    assert len(text.splitlines()) == len(markdown(result).splitlines()) + 1
    assert "<script" not in text
    assert "\u202e" not in text


# Badges


def test_a_badge_has_quantity_unit_and_n(result, text):
    found = badge(result)
    assert set(found) == {"schemaVersion", "label", "message", "color"}
    assert (found["schemaVersion"], found["label"], found["color"]) == (1, "KL(p‖q) per response", "blue")
    head = result["headline"]
    half = 100 * (head["ci"]["upper"] - head["ci"]["lower"]) / 2 / head["value"]
    assert found["message"] == f"{head['value']:.3g} nats ± {half:.2g}% (n=40)"
    assert badge(text)["label"] == "KL(p‖q) per token of a text"


def test_no_value_is_good_or_bad(result):
    """Colours do not grade: the same one for any finite divergence."""
    other = copy.deepcopy(result)
    for value in (1e-6, 0.1, 100.0):
        other["headline"]["value"] = value
        assert badge(other)["color"] == "blue"


def test_a_badge_says_what_is_wrong(result, infinite):
    assert badge(infinite) == {
        "schemaVersion": 1, "label": "KL(p‖q) per response", "message": "infinite nats (n=40)", "color": "red"
    }  # fmt: skip
    found = badge(failed(result))
    assert (found["color"], found["message"]) == ("red", "self-audit failed: no nats (n=40)")
    few = klkit.estimate(*automata("p", "q"), samples=4, max_tokens=20, unit="bits").to_dict()
    assert badge(few)["message"].endswith("bits, no interval (n=4)")
    p = automata("p")[0]
    same = badge(klkit.estimate(p, p, samples=40, max_tokens=20).to_dict())
    assert same["message"] == "0 nats ± 0 (n=40)"


# Model cards


def test_the_front_matter_has_one_entry_with_the_number_and_its_arguments(result):
    found = front(model_card(result))
    (entry,) = found["model-index"]
    ((measured,),) = (entry["results"],)
    (metric,) = measured["metrics"]
    head = result["headline"]
    assert (entry["name"], metric["type"], metric["value"]) == ("q", "kl_divergence", head["value"])
    arguments = metric["args"]
    for name in ("unit", "direction", "estimand", "stderr", "n_clusters", "n_prompts"):
        assert arguments[name] == head[name]
    assert (arguments["estimator"], arguments["n_strings"]) == ("rb_cv", 40)
    assert arguments["interval"] == head["ci"]
    assert arguments["floor"] == result["floor"]
    assert found["klkit"]["sentence"] == result["sentence"]


def test_the_hub_reads_the_card_without_loss(result):
    """The library that writes cards parses the block, and writes it again with the same entry."""
    card = ModelCard(model_card(result))
    (found,) = card.data.eval_results
    written = front(model_card(result))["model-index"][0]["results"][0]
    dataset, metric = written["dataset"], written["metrics"][0]
    assert (found.dataset_type, found.dataset_name) == (dataset["type"], dataset["name"])
    assert (found.dataset_config, found.dataset_split) == (dataset["config"], dataset["split"])
    assert found.dataset_revision == dataset["revision"] == result["provenance"]["contexts"]
    assert (found.metric_type, found.metric_value) == (metric["type"], metric["value"])
    assert (found.metric_name, found.metric_args) == (metric["name"], metric["args"])
    assert card.data.model_name == "q"
    again = yaml.safe_load(card.data.to_yaml())
    assert again["model-index"] == front(model_card(result))["model-index"]
    assert again["klkit"] == front(model_card(result))["klkit"]


def identity(result):
    return ModelCard(model_card(result)).data.eval_results[0].unique_identifier


def test_other_measurements_are_other_entries(result, text):
    """The Hub merges entries whose identifiers agree, so whatever changes the quantity must change them."""
    others = [
        changed(result, p="another"),
        changed(result, max_tokens=10),
        changed(result, temperature=0.5),
        changed(result, prompts="prompts.jsonl"),
        text,
    ]
    for path, value in (
        (("headline", "estimand"), "R"),
        (("headline", "direction"), "KL(q‖p)"),
        (("provenance", "models", "q", "dtype"), "bfloat16"),
        (("provenance", "contexts"), "0" * 16),
    ):
        other = copy.deepcopy(result)
        inner = other
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        others.append(other)
    found = [identity(result), *map(identity, others)]
    assert len(set(found)) == len(found)
    again = copy.deepcopy(result)
    again["headline"]["value"] *= 2  # the same quantity measured once more replaces the old number
    assert identity(again) == identity(result)


def test_infinite_is_infinite_in_a_card(infinite):
    assert front(model_card(infinite))["model-index"][0]["results"][0]["metrics"][0]["value"] == "inf"
    assert "| ∞ |" in model_card(infinite)


def test_hostile_names_stay_within_the_block(result):
    card = model_card(changed(result, p=HOSTILE, q=HOSTILE))
    assert card.count("\n---\n") == 1
    found = ModelCard(card).data
    assert "\n" not in found.model_name
    assert found.eval_results[0].metric_value == result["headline"]["value"]
    rows = [line for line in card.splitlines() if line.startswith("|")]
    assert len({row.count("|") for row in rows}) == 1


def test_a_card_does_not_tell_where_things_lay(result):
    paths = changed(result, p="/home/me/base", q="./work/int4,dtype=bfloat16", prompts="/home/me/prompts.jsonl")
    paths["sentence"] = paths["sentence"].replace("p = p", "p = /home/me/base")
    card = model_card(paths)
    assert "/home" not in card
    assert "./work" not in card
    for part in ("reference=base", "prompts.jsonl", "name: int4,dtype=bfloat16", "p = base"):
        assert part in card
    assert model_card(result, name="org/int4").count("- name: org/int4\n") == 1


def test_names_on_the_hub_are_kept():
    assert public_name("org/name@main,dtype=float32,peft=org/adapter") == "org/name@main,dtype=float32,peft=org/adapter"


def test_a_failed_run_has_no_card(result):
    with pytest.raises(ValueError, match="whose self-audit failed"):
        model_card(failed(result))


def test_one_card_a_candidate(ranking):
    for entry in ranking["candidates"]:
        card = ranking_card(ranking, entry["name"])
        assert front(card)["model-index"][0]["name"] == entry["name"]
        assert ModelCard(card).data.eval_results[0].metric_value == entry["result"]["headline"]["value"]
        assert f" of {len(ranking['candidates'])}" in card
    with pytest.raises(ValueError, match="got 'd'; it has"):
        ranking_card(ranking, "d")


def test_of_a_text(text):
    found = front(model_card(text))["model-index"][0]["results"][0]
    assert (found["dataset"]["type"], found["dataset"]["name"]) == ("klkit-text", "text of wiki.txt")
    assert "max_tokens" not in found["dataset"]["config"]
    assert found["metrics"][0]["name"] == "KL(p‖q), nats per token of the given text"


def test_what_is_printed_needs_no_live_object(result):
    through = json.loads(json.dumps(result))
    assert model_card(through) == model_card(result)
    assert markdown(through) == markdown(result)
    assert badge(through) == badge(result)
