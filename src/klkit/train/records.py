"""Records of the files people have: txt, jsonl, csv, parquet, each with the line it stands in."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")


def resolve(source: str) -> Path:
    """The file that ``source`` names: a path, or ``klkit:NAME`` for packaged prompts.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if source.startswith("klkit:"):
        folder = Path(str(resources.files("klkit") / "zoo" / "prompts"))
        path = folder / f"{source.removeprefix('klkit:')}.jsonl"
        if not path.is_file():
            names = ", ".join(sorted(f"klkit:{p.stem}" for p in folder.glob("*.jsonl")))
            raise FileNotFoundError(f"expected packaged prompts, got {source!r}; the packaged ones are {names}")
        return path
    path = Path(source).expanduser()
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "nothing there"
        raise FileNotFoundError(f"expected a file of prompts or text at {source}, got {kind}; check the path")
    return path


def decode(path: Path) -> str:
    """The file's text, its line ends as they are."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"expected UTF-8 text in {path}, got a byte that is not ({error}); convert the file"
        ) from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line) pairs, blank lines left out."""
    # Not str.splitlines, which also splits at form feeds and at U+0085 and U+2028, all allowed within a line.
    for number, line in enumerate(decode(path).split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _table(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of its first line, fields by name) of each row; quoted fields may run over several lines."""
    reader = csv.reader(io.StringIO(decode(path), newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    first = 1
    try:
        for row in reader:
            if row and names is None:
                names = row
            elif row and names is not None:
                if len(row) != len(names):
                    raise ValueError(
                        f"expected {len(names)} fields in line {first} of {path}, got {len(row)}; "
                        f"quote fields that contain the separator"
                    )
                yield first, dict(zip(names, row, strict=True))
            first = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"expected CSV in line {first} of {path}, got: {error}; mend the line") from error


def records(path: Path, column: str) -> Iterator[tuple[int, Any]]:
    """(line number, record) pairs; numbers count from 1 as editors do, a row over several lines by its first."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        for number, line in _lines(path):
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"expected JSON in line {number} of {path}, got {line[:60]!r} ({error}); mend the line"
                ) from error
    elif suffix == ".json":
        try:
            found = json.loads(decode(path))
        except ValueError as error:
            raise ValueError(f"expected JSON in {path}, got: {error}; mend the file") from error
        if not isinstance(found, list):
            raise ValueError(
                f"expected a list of records in {path}, got {type(found).__name__}; one a prompt or example"
            )
        yield from enumerate(found, start=1)
    elif suffix in (".csv", ".tsv"):
        yield from _table(path, "\t" if suffix == ".tsv" else ",")
    elif suffix == ".parquet":
        try:
            from pyarrow import ArrowException, parquet
        except ImportError as error:
            raise ValueError(
                "expected pyarrow for parquet files, got an environment without it; pip install 'klkit[parquet]'"
            ) from error
        try:
            table = parquet.read_table(path)
        except (ArrowException, OSError) as error:
            raise ValueError(f"expected a parquet file at {path}, got: {error}; check the file") from error
        yield from enumerate(table.to_pylist(), start=1)
    else:
        for number, line in _lines(path):
            yield number, {column: line}
