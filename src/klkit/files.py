"""Files that appear whole or not at all, and digests by which damaged ones are found out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Run ``write`` on a neighbour of ``path`` and rename it into place: whole or not at all."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")  # another process may write the same
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file whole or not at all."""

    def write(beside: Path) -> None:
        beside.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def file_digest(path: Path) -> str:
    """What tells a file's content from any other: 16 hexadecimal digits of its SHA-256.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "a"
        ...     write_text(path, "abc")
        ...     file_digest(path)
        'ba7816bf8f01cfea'
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
