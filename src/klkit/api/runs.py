"""Finished runs, read back: the numbers of an estimate, or of one candidate of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from klkit.api.candidates import folder_of
from klkit.ranking import SCHEMA as RANKING
from klkit.report.record import RunFolder, RunFolderError


def read_run(folder: str | Path, candidate: str | None = None) -> RunFolder:
    """A finished run: its result, and every number behind it.

    Args:
        folder: what ``klkit estimate --out`` or ``klkit compare --out`` wrote.
        candidate: which candidate of a comparison; without it a comparison has a result and no numbers of its own.

    Raises:
        RunFolderError: there is no finished run, or no such candidate in it.

    Example:
        >>> import tempfile
        >>> import klkit
        >>> from klkit.models.automaton import coin
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     made = klkit.estimate(coin(end=0.5), coin(end=0.25), samples=20, max_tokens=30, out=f"{folder}/run")
        ...     read = klkit.read_run(f"{folder}/run")
        ...     read.result() == made.to_dict(), sum(len(part) for part in read.column("rows.kl")) > 20
        (True, True)
    """
    found = RunFolder.open(Path(folder))
    if candidate is None:
        return found
    entry_of(found.result(), candidate, found.path)
    return RunFolder.open(folder_of(found.path, candidate))


def is_ranking(result: Mapping[str, Any]) -> bool:
    """Whether a result is one of a comparison of many models."""
    return result.get("schema") == RANKING


def entry_of(result: Mapping[str, Any], candidate: str, folder: Path) -> Mapping[str, Any]:
    """What a comparison says of one candidate.

    Raises:
        RunFolderError: it is not a comparison, or has no such candidate.
    """
    if not is_ranking(result):
        raise RunFolderError(
            f"expected a comparison of many models in {folder} to choose {candidate!r} from, got a run of one pair; "
            f"leave the candidate out"
        )
    names = [entry["name"] for entry in result["candidates"]]
    for entry in result["candidates"]:
        if entry["name"] == candidate:
            return dict(entry)
    raise RunFolderError(f"expected a candidate of {folder}, got {candidate!r}; it has {', '.join(names)}")
