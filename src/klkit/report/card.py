"""A result as a block of a model card: metadata that the Hub reads, and a paragraph with a table for people.

The Hub keeps one entry of ``model-index`` a card, and counts two results as one if task, dataset, configuration, split
and revision are the same, whatever their arguments. What tells one divergence from another therefore stands in
``dataset.config`` (what is measured, against which model, on what) and ``dataset.split`` (in which arithmetic).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from klkit.report.markdown import facts, paragraph, quantity, table
from klkit.report.ranking import cell, place
from klkit.report.text import printable

TASK = {"type": "text-generation", "name": "Text Generation"}
LOCAL = ("/", "./", "../", "~", ".\\", "..\\")


def model_card(result: Mapping[str, Any], *, name: str | None = None, entry: Mapping[str, Any] | None = None) -> str:
    """The model card block of the candidate ``q`` of a result: YAML front matter, a paragraph and a table.

    Args:
        result: as ``Comparison.to_dict`` gives it, or as ``result.json`` holds it.
        name: of the model in the card; by default what the run calls ``q``, without the path to it.
        entry: the candidate's entry in a ranking, to say its rank and size.

    Raises:
        ValueError: the self-audit failed, so that there is no number to publish.

    Example:
        >>> import klkit
        >>> from klkit.models.automaton import coin
        >>> result = klkit.estimate(coin(end=0.5), coin(end=0.25, name="candidate"), samples=20, max_tokens=60)
        >>> card = model_card(result.to_dict())
        >>> yaml.safe_load(card.split("---")[1])["model-index"][0]["name"]
        'candidate'
    """
    if not result["audit"]["passed"]:
        raise ValueError(
            f"expected a result to publish, got one whose self-audit failed ({result['lines'].get('audit', '')}); mend "
            f"what it names and measure again"
        )
    result = json.loads(json.dumps(result))  # plain numbers, which YAML knows how to write
    settings = result["settings"]
    name = printable(name or public_name(settings["q"]))
    block = yaml.safe_dump(metadata(result, name), sort_keys=False, allow_unicode=True, width=10**6)
    rows = [[cell(what), cell(value)] for what, value in (*standing(entry), *facts(result))]
    sentence = paragraph({**result, "sentence": public_text(result["sentence"], settings)})
    reference = cell(public_name(settings["p"])).replace("`", "")
    about = (
        f"How far this model is from `{reference}` (p; this model is q), measured by klkit "
        f"{result['provenance']['versions'].get('klkit', '')}: {sentence} "
        f"A divergence says how differently the two models behave, not which is better."
    )
    lines = [f"---\n{block}---", "", "## Divergence from the reference", "", about, ""]
    return "\n".join([*lines, *table(["quantity", "value"], rows)]) + "\n"


def ranking_card(ranking: Mapping[str, Any], candidate: str, *, name: str | None = None) -> str:
    """The block of one candidate of a ranking.

    Raises:
        ValueError: no such candidate, or its self-audit failed.
    """
    for entry in ranking["candidates"]:
        if entry["name"] == candidate:
            place_of = {**entry, "of": len(ranking["candidates"])}
            return model_card(entry["result"], name=name or public_name(candidate), entry=place_of)
    names = ", ".join(entry["name"] for entry in ranking["candidates"])
    raise ValueError(f"expected a candidate of this comparison, got {candidate!r}; it has {names}")


def metadata(result: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What stands in the front matter: ``model-index`` with one result, and a key of klkit's own with the rest."""
    head, settings, provenance = result["headline"], result["settings"], result["provenance"]
    given = settings.get("text") is not None
    models = provenance["models"]
    reference = printable(public_name(settings["p"]))
    source = printable(source_of(settings))
    limits = {} if given else {"max_tokens": settings["max_tokens"]}
    what = {
        "estimand": head["estimand"],
        "direction": head["direction"],
        "reference": reference,
        "source": source,
        **limits,
        "temperature": settings.get("temperature", 1.0),
    }
    dataset = {
        "type": "klkit-text" if given else "klkit-responses",
        "name": f"text of {source}" if given else f"responses of {result['roles'][0]} to {source}",
        "config": ",".join(f"{key}={value}" for key, value in what.items()),
        "split": ",".join(f"{role}={model['dtype']}" for role, model in models.items()),
    }
    if "contexts" in provenance:
        dataset["revision"] = provenance["contexts"]
    metric = {
        "type": "kl_divergence" if head["divergence"] in ("kl", "reverse_kl") else f"{head['divergence']}_divergence",
        "value": head["value"],
        "name": quantity(head),
        "args": {
            "unit": head["unit"],
            "direction": head["direction"],
            "estimand": head["estimand"],
            "estimator": head["method"],
            "n_strings": head["n_sequences"],
            "n_prompts": head["n_prompts"],
            "n_clusters": head["n_clusters"],
            "stderr": head["stderr"],
            "interval": head["ci"],
            "floor": result["floor"],
            "lower_bound": result["lower_bound"],
            "truncated_share": head["truncated_share"],
            "infinite_decisions": head["infinite"],
        },
    }
    return {
        "model-index": [{"name": name, "results": [{"task": TASK, "dataset": dataset, "metrics": [metric]}]}],
        "klkit": {
            "schema": result["schema"],
            "sentence": printable(public_text(result["sentence"], settings)),
            "reference": reference,
            "weights": {role: printable(public_name(model["weights"])) for role, model in models.items()},
            "vocabulary": {role: model["vocabulary"] for role, model in models.items()},
            "files": {option: file["sha256"] for option, file in provenance.get("files", {}).items()},
            "seed": settings.get("seed"),
            "versions": provenance["versions"],
        },
    }


def standing(entry: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """(name, value) of a candidate's place among others."""
    if entry is None:
        return []
    tied = ", ".join(public_name(name) for name in entry["tied_with"])
    text = f"{place(entry)} of {entry['of']}" + (f"; not resolved from {tied}" if tied else "")
    return [("rank among the candidates measured with it", text)]


def source_of(settings: Mapping[str, Any]) -> str:
    """What the strings were cut from, or an answer to: the name of a file, not the way to it.

    Example:
        >>> source_of({"text": None, "prompts": "/home/me/prompts.jsonl"}), source_of({"prompts": None})
        ('prompts.jsonl', 'an empty prompt')
    """
    return public_name(settings.get("text") or settings.get("prompts") or "an empty prompt")


def public_name(spec: str) -> str:
    """A specification of a model or a file without the folders of the machine that it was measured on.

    Example:
        >>> public_name("org/name,dtype=bfloat16"), public_name("/home/me/int4,peft=./work/adapter")
        ('org/name,dtype=bfloat16', 'int4,peft=adapter')
    """
    parts = []
    for part in spec.split(","):
        key, equals, value = part.rpartition("=")
        if value.startswith(LOCAL):
            value = value.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or value
        parts.append(f"{key}{equals}{value}")
    return ",".join(parts)


def public_text(text: str, settings: Mapping[str, Any]) -> str:
    """``text`` with the models named as :func:`public_name` names them."""
    for spec in sorted((settings["p"], settings["q"]), key=len, reverse=True):
        for part in spec.split(","):
            value = part.rpartition("=")[2]
            if value.startswith(LOCAL):
                text = text.replace(value, public_name(value))
    return text
