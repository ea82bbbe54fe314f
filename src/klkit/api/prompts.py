"""Reading prompts and documents from the files people have: txt, jsonl, csv, parquet."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from klkit.api.settings import Settings
from klkit.sequences import Content, Prompts
from klkit.train.records import SUFFIXES, decode, records, resolve

GROUP = "group"  # the field that groups are read from where none is named


def read_prompts(source: str, column: str = "prompt", group_column: str | None = None) -> Prompts:
    """Read prompts: a line each (txt), or field ``column`` of each record (jsonl, csv, parquet).

    A record's field may be text or a conversation (a list of messages with ``role`` and
    ``content``). Blank lines of a txt file are skipped; a blank or missing field of a record is an
    error, since it is rarely meant.

    Args:
        group_column: field that names the group of each prompt. Without it, the field ``group`` where records have
            one; then all of them must.

    Raises:
        ValueError: a broken line (its number is named), a missing column, a group for some prompts only, no prompt
            at all.
        FileNotFoundError: no such file.
    """
    path = resolve(source)
    rows = list(records(path, column))
    contents = tuple(_content(record, column, path, number) for number, record in rows)
    if not contents:
        raise ValueError(f"expected at least one prompt in {path}, got none; the file is empty")
    return Prompts(contents, _groups(rows, column, group_column, path))


def _groups(
    rows: Sequence[tuple[int, Any]], column: str, group_column: str | None, path: Path
) -> tuple[str, ...] | None:
    """The group of each record, or None where there are none and none were asked for."""
    name = group_column or GROUP
    values = [record.get(name) if isinstance(record, dict) else None for _, record in rows]
    missing = [value is None or value != value or (isinstance(value, str) and not value.strip()) for value in values]
    if group_column is None and (name == column or all(missing)):
        return None
    for (number, _), value, absent in zip(rows, values, missing, strict=True):
        if absent:
            raise ValueError(
                f"expected a group for every prompt, got none in field {name!r} of line {number} of {path}; "
                f"mend the line, or name another field with --group-column"
            )
        if not isinstance(value, str | int | float):
            raise ValueError(
                f"expected the name of a group in field {name!r} of line {number} of {path}, got {str(value)[:60]!r}; "
                f"write text or a number, or name another field with --group-column"
            )
    return tuple(str(value).strip() for value in values)


def prompts_of(settings: Settings) -> Prompts | None:
    """Those that ``settings`` name, if they name a file."""
    if settings.prompts is None:
        return None
    return read_prompts(settings.prompts, settings.column, settings.group_column)


def documents_of(settings: Settings) -> list[str] | None:
    """The fixed text that ``settings`` name, if they do; its field is called ``text`` unless another is named."""
    if settings.text is None:
        return None
    return read_documents(settings.text, "text" if settings.column == "prompt" else settings.column)


def read_documents(source: str, column: str = "text") -> list[str]:
    """Read fixed text: a txt file is one document, each record of another kind is one.

    Raises:
        ValueError: a broken line (its number is named), or no text at all.
        FileNotFoundError: no such file.
    """
    path = resolve(source)
    if path.suffix.lower() not in SUFFIXES[1:]:
        documents = [io.StringIO(decode(path), newline=None).read()]
    else:
        documents = []
        for number, record in records(path, column):
            content = _content(record, column, path, number)
            if not isinstance(content, str):
                raise ValueError(
                    f"expected text in line {number} of {path}, got a conversation; render it to text first"
                )
            documents.append(content)
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"expected some text in {path}, got none; the file is empty")
    return documents


def _content(record: Any, column: str, path: Path, number: int) -> Content:
    value = record.get(column) if isinstance(record, dict) else record
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m and "content" in m for m in value):
        return value
    if isinstance(record, dict) and column not in record:
        raise ValueError(
            f"expected a field {column!r} in line {number} of {path}, got the fields {', '.join(map(repr, record))}; "
            f"name the right one with --column"
        )
    raise ValueError(
        f"expected text or a conversation (messages with role and content) in line {number} of {path}, "
        f"got {str(value)[:60]!r}; mend the line"
    )
