"""Results as flat rows: units in the names of columns, nats throughout, whatever unit a result is printed in.

Everything here reads the plain values of ``to_dict`` or of a ``result.json``, so a result of last year makes the same
table as one of now. pandas is needed for data frames only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from klkit.ranking import Gap, gaps
from klkit.results import NATS_PER_BIT

PER = {"S": "response", "R": "token", "F": "text_token"}
"""What the columns of each estimand are per: responses, tokens, or tokens of a given text."""


def frame(rows: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> Any:
    """A pandas ``DataFrame`` of rows, or of columns by their names.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise ImportError(
            f"expected pandas for a data frame, got: {error}; pip install pandas, or take the numbers from to_dict()"
        ) from error
    return pandas.DataFrame(rows)


def nats(value: float | str, unit: str) -> float:
    """A number of a result in nats; ``"inf"`` and ``"nan"`` become numbers again.

    Example:
        >>> nats(1.5, "nats"), round(nats(1.0, "bits"), 6), nats("inf", "bits")
        (1.5, 0.693147, inf)
    """
    return float(value) * (NATS_PER_BIT if unit == "bits" else 1.0)


def column_of(estimate: Mapping[str, Any]) -> str:
    """Name of the column that holds an estimate.

    Example:
        >>> column_of({"divergence": "kl", "estimand": "S"}), column_of({"divergence": "js", "estimand": "S"})
        ('kl_nats_per_response', 'js_nats_per_response')
    """
    return f"{estimate['divergence']}_nats_per_{PER[estimate['estimand']]}"


def bounded(name: str, estimate: Mapping[str, Any]) -> dict[str, float]:
    """An estimate with its standard error and interval, as four columns."""
    unit, ci = estimate["unit"], estimate["ci"]
    return {
        name: nats(estimate["value"], unit),
        f"{name}_stderr": nats(estimate["stderr"], unit),
        f"{name}_lower": nats(ci["lower"], unit),
        f"{name}_upper": nats(ci["upper"], unit),
    }


def estimator_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row an estimator of a result."""
    ratios = result["variance_ratio_vs_mc"]
    head = result["headline"]
    rows = []
    for row in result["estimates"]:
        compared = row["estimand"] == "S" and row["direction"] == head["direction"]
        rows.append(
            {
                "method": row["method"],
                "divergence": row["divergence"],
                "direction": row["direction"],
                "estimand": row["estimand"],
                "per": PER[row["estimand"]],
                **bounded("nats", row),
                "level": row["ci"]["level"],
                "interval_method": row["ci"]["method"],
                "variance_ratio_vs_mc": float(ratios.get(row["method"], "nan")) if compared else float("nan"),
                "n_strings": row["n_sequences"],
                "n_prompts": row["n_prompts"],
                "n_clusters": row["n_clusters"],
                "truncated_share": row["truncated_share"],
                "infinite_decisions": row["infinite"],
            }
        )
    return rows


def result_row(result: Mapping[str, Any]) -> dict[str, Any]:
    """A whole result as one row: the headline, the same per token, the companions and what vouches for them."""
    head, companions = result["headline"], result["companions"]
    row: dict[str, Any] = {
        "estimand": head["estimand"],
        "direction": head["direction"],
        "method": head["method"],
        **bounded(column_of(head), head),
        "level": head["ci"]["level"],
        "interval_method": head["ci"]["method"],
    }
    for rate in result["estimates"]:
        if rate["estimand"] == "R" and rate["direction"] == head["direction"]:
            row |= bounded(column_of(rate), rate)
    names = {"same_top": "same_top_share", "total_variation": "total_variation", "mean_length": "mean_length_tokens"}
    for role in result["roles"]:
        names |= {f"{kind}_{role}": f"{kind}_{role}_nats_per_token" for kind in ("entropy", "reverse_kl_at")}
    for name, column in names.items():
        if name in companions:
            row[column] = float(companions[name]["value"])
            row[f"{column}_stderr"] = float(companions[name]["stderr"])
    if result["floor"]["n"]:
        row["floor_nats_per_response"] = float(result["floor"]["value"])
    if result["lower_bound"]:
        row["lower_bound_nats_per_response"] = float(result["lower_bound"]["value"])
    return row | {
        "truncated_share": head["truncated_share"],
        "infinite_decisions": head["infinite"],
        "n_strings": head["n_sequences"],
        "n_prompts": head["n_prompts"],
        "n_clusters": head["n_clusters"],
        "audit_passed": result["audit"]["passed"],
    }


def candidate_rows(ranking: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a candidate of a ranking, the closest first."""
    less_closest = gaps(ranking, ranking["candidates"][0]["name"])
    rows = []
    for entry in ranking["candidates"]:
        size, per = entry["size"], f"nats_per_{PER[ranking['estimand']]}"
        row = {
            "candidate": entry["name"],
            "rank_first": entry["rank_first"],
            "rank_last": entry["rank_last"],
            "tied_with": ", ".join(entry["tied_with"]),
            **result_row(entry["result"]),
            **difference(less_closest.get(entry["name"]), ranking["unit"], f"less_closest_{per}"),
        }
        if entry["reverse"] is not None:
            row |= bounded(column_of(entry["reverse"]), entry["reverse"])
        rows.append(
            row
            | {
                "against_floor": entry["against_floor"]["verdict"],
                "file_bytes": size.get("file_bytes"),
                "parameters": size.get("parameters"),
                "bits_per_weight": size.get("bits_per_weight"),
                "on_frontier": entry["name"] in ranking["frontier"],
            }
        )
    return rows


def difference(gap: Gap | None, unit: str, column: str) -> dict[str, float]:
    """A paired difference with its standard error and interval: four columns, 0 where there is none."""
    names = column, f"{column}_stderr", f"{column}_lower", f"{column}_upper"
    numbers = (0.0,) * 4 if gap is None else gap[:4]
    return {name: nats(number, unit) for name, number in zip(names, numbers, strict=True)}
