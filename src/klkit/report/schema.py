"""What may stand in a ``result.json``: published JSON Schemas, one a version.

Within a version keys may be added, and none changes its meaning or its unit. What would break a reader gets a new
version with a schema file of its own, beside the old one.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

SCHEMAS = {"result": "result-1.json", "ranking": "ranking-1.json"}
"""File of each schema's newest version."""


def schema(name: str) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of ``Comparison.to_dict()`` or ``Ranking.to_dict()``, whole in itself.

    A ranking holds results, so their schema is embedded in its.

    Raises:
        ValueError: no such schema.

    Example:
        >>> schema("result")["title"], sorted(schema("ranking")["$defs"])
        ('klkit.result/1', ['candidate', 'pair', 'probability', 'result'])
    """
    if name not in SCHEMAS:
        raise ValueError(f"expected a schema among {', '.join(SCHEMAS)}, got {name!r}; choose one of them")
    found: dict[str, Any] = json.loads((files("klkit.report") / "schemas" / SCHEMAS[name]).read_text(encoding="utf-8"))
    if name == "ranking":
        found["$defs"]["result"] = schema("result")
    return found
