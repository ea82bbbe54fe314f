"""The manifest: what a cache was made of, how, and what it holds, in JSON that a person can read."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from klkit import __version__
from klkit.caches.recording import Recording
from klkit.caches.shards import CacheError, Part
from klkit.caches.source import Data, Teacher, record
from klkit.files import write_text

MANIFEST, HEAD, SHARDS = "manifest.json", "head.safetensors", "shards"
FORMAT = 1
ROWS = (
    "one row a response token, end token included, string by string; a row is the law of its token given everything "
    "before it"
)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a cache says of itself.

    Attributes:
        teacher: whose laws these are.
        data: of which strings.
        recording: how they were recorded.
        size: ids that the laws are over.
        width: values of a hidden state.
        head: what is known of the output head beside its weights; None for other kinds.
        parts: strings of each shard.
        files: file of each shard; empty while the cache is being built.
        coverage: what was kept, on average; empty while it is being built.
        bytes: on disk; 0 while it is being built.
        writer: version that wrote it.
    """

    teacher: Teacher
    data: Data
    recording: Recording
    size: int
    width: int
    head: dict[str, Any] | None
    parts: tuple[Part, ...]
    files: tuple[str, ...] = ()
    coverage: dict[str, float] = field(default_factory=dict)
    bytes: int = 0
    writer: str = f"klkit {__version__}"

    @property
    def complete(self) -> bool:
        """Whether every shard was written."""
        return len(self.files) == len(self.parts)

    def planned(self) -> Manifest:
        """The same before anything was written: equal for equal caches."""
        return replace(self, files=(), coverage={}, bytes=0, writer="")

    def write(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        names = self.files or ("",) * len(self.parts)
        content = {
            "format": FORMAT,
            "writer": self.writer,
            "complete": self.complete,
            "teacher": record(self.teacher),
            "data": record(self.data),
            "recording": self.recording.options(),
            "rows": ROWS,
            "size": self.size,
            "width": self.width,
            "head": self.head,
            "coverage": self.coverage,
            "bytes": self.bytes,
            "shards": [
                {"first": part.first, "examples": part.count, "file": name}
                for part, name in zip(self.parts, names, strict=True)
            ],
        }
        write_text(folder / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read it.

        Raises:
            CacheError: there is none, it cannot be read, or a later version wrote it.
        """
        path = folder / MANIFEST
        if not path.is_file():
            state = "nothing there" if not folder.exists() else f"no {MANIFEST} in it" if folder.is_dir() else "a file"
            raise CacheError(f"expected the folder of a cache at {folder}, got {state}; check the path")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] > FORMAT:
                raise CacheError(
                    f"expected a cache of format {FORMAT} or older in {folder}, got format {content['format']} by "
                    f"{content['writer']}; update klkit, or build the cache again"
                )
            shards = content["shards"]
            return cls(
                teacher=Teacher.read(content["teacher"]),
                data=Data(**content["data"]),
                recording=Recording(**content["recording"]),
                size=content["size"],
                width=content["width"],
                head=content["head"],
                parts=tuple(Part(i, shard["first"], shard["examples"]) for i, shard in enumerate(shards)),
                files=tuple(shard["file"] for shard in shards) if content["complete"] else (),
                coverage=content["coverage"],
                bytes=content["bytes"],
                writer=content["writer"],
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, CacheError):
                raise
            raise CacheError(
                f"expected a readable {MANIFEST} in {folder}, got: {error}; build the cache again in another folder"
            ) from error
