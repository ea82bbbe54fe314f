"""The files that lm-evaluation-harness writes: scores of tasks, and what every document contributed to them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What the harness wrote about one model.

    Attributes:
        path: of its results.
        content: of that file.
    """

    path: Path
    content: Mapping[str, Any]

    def samples(self, task: str) -> list[dict[str, Any]] | None:
        """The documents of a task, one entry a document and filter; None if they were not kept."""
        date = self.path.stem.rpartition("_")[2]
        path = self.path.with_name(f"samples_{task}_{date}.jsonl")
        if not path.is_file():
            return None
        try:
            with path.open(encoding="utf-8") as file:
                return [json.loads(line) for line in file if line.strip()]
        except ValueError as error:
            raise ValueError(f"expected samples in {path}, one JSON object a line, got: {error}") from error


def read_results(path: Path) -> Evaluation:
    """The results of one model.

    Raises:
        ValueError: the file is not there, or not one of the harness.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"expected results of lm-evaluation-harness in {path}, got: {error}; check the path"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("results"), dict):
        raise ValueError(
            f"expected results of lm-evaluation-harness in {path}, got JSON without 'results'; give its results_….json"
        )
    return Evaluation(path, content)


def by_document(lines: list[dict[str, Any]], metric: str, chosen: str, task: str) -> dict[Any, dict[str, Any]]:
    """The lines of one filter that have the metric, by the number of their document."""
    found: dict[Any, dict[str, Any]] = {}
    for line in lines:
        if line.get("filter", "none") != chosen or metric not in line:
            continue
        if line.get("doc_id") in found:
            raise ValueError(
                f"expected every document of {task} once, got document {line.get('doc_id')} twice; the samples of two "
                f"runs may have been written into one file"
            )
        found[line.get("doc_id")] = line
    return found


def units_of(lines: list[dict[str, Any]], cluster: str, task: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The independent unit of each document, from a field of it."""
    if not all(isinstance(line.get("doc"), dict) and cluster in line["doc"] for line in lines):
        raise ValueError(
            f"expected the field {cluster!r} in every document of {task}, got documents without it; name one of "
            f"{', '.join(lines[0].get('doc') or {})}, or leave cluster out"
        )
    return np.unique([str(line["doc"][cluster]) for line in lines], return_inverse=True)[1].astype(np.int64)
