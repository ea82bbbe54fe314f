"""Reading prompts and documents from the files people have: txt, jsonl, csv, parquet."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from klkit.sequences import Content, Prompts
from klkit.train.records import SUFFIXES, decode, records, resolve


def read_prompts(source: str, column: str = "prompt") -> Prompts:
    """Read prompts: a line each (txt), or field ``column`` of each record (jsonl, csv, parquet).

    A record's field may be text or a conversation (a list of messages with ``role`` and
    ``content``). Blank lines of a txt file are skipped; a blank or missing field of a record is an
    error, since it is rarely meant.

    Raises:
        ValueError: a broken line (its number is named), a missing column, no prompt at all.
        FileNotFoundError: no such file.
    """
    path = resolve(source)
    contents = tuple(_content(record, column, path, number) for number, record in records(path, column))
    if not contents:
        raise ValueError(f"expected at least one prompt in {path}, got none; the file is empty")
    return Prompts(contents)


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
