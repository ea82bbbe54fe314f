"""A result as a badge: the JSON that a shields.io endpoint badge is drawn from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

PER = {"S": "per response", "R": "per token", "F": "per token of a text"}
NEUTRAL, BAD = "blue", "red"


def badge(result: Mapping[str, Any]) -> dict[str, Any]:
    """Quantity, number, precision and n; the colour says only whether there is a finite number to use.

    A divergence is no grade: what is small for one purpose is large for another, so no value is green.

    Args:
        result: as ``Comparison.to_dict`` gives it, or as ``result.json`` holds it.

    Example:
        >>> import klkit
        >>> from klkit.models.automaton import coin
        >>> result = klkit.estimate(coin(end=0.5), coin(end=0.25), samples=20, max_tokens=60)
        >>> found = badge(result.to_dict())
        >>> found["label"], found["color"], found["message"].endswith("(n=20)")
        ('KL(p‖q) per response', 'blue', True)
    """
    head = result["headline"]
    value, unit = float(head["value"]), head["unit"]
    lower, upper = float(head["ci"]["lower"]), float(head["ci"]["upper"])
    counted = f"(n={head['n_sequences']})"
    colour = NEUTRAL
    if not result["audit"]["passed"]:
        message, colour = f"self-audit failed: no {unit} {counted}", BAD
    elif math.isinf(value):
        message, colour = f"infinite {unit} {counted}", BAD
    elif not (math.isfinite(lower) and math.isfinite(upper)):
        message = f"{value:.3g} {unit}, no interval {counted}"
    elif value > 0:
        message = f"{value:.3g} {unit} ± {100 * (upper - lower) / 2 / value:.2g}% {counted}"
    else:
        message = f"{value:.3g} {unit} ± {(upper - lower) / 2:.2g} {counted}"
    return {
        "schemaVersion": 1,
        "label": f"{head['direction']} {PER[head['estimand']]}",
        "message": message,
        "color": colour,
    }
