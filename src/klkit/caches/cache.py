"""A cache that is read: the laws of any of its strings, in any order, and refusals where it is not the right one."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from klkit.caches.manifest import HEAD, SHARDS, Manifest
from klkit.caches.recording import HIDDEN, Law, law
from klkit.caches.shards import CacheError, Shard
from klkit.caches.source import Data, Teacher, data_changes, teacher_changes, token_digest
from klkit.divergences.linear import Head
from klkit.divergences.partial import Hidden, Hybrid
from klkit.files import file_digest
from klkit.models.base import LanguageModel, Vocabulary
from klkit.sequences import Sequences

OPEN_SHARDS = 128  # files that are kept open: well below what a process may have
NEGLIGIBLE = 1e-6  # mass of rows that no tokenizer names below which they do not matter


class StaleCache(CacheError):
    """A cache holds what another model said, or what was said about other strings."""


class TeacherCache:
    """What a model says at every decision of fixed strings; see :meth:`open` and :func:`klkit.caches.build.build`.

    Attributes:
        path: its folder.
        manifest: what it says of itself.
    """

    def __init__(self, path: Path, manifest: Manifest):
        self.path, self.manifest = path, manifest
        self._first = [part.first for part in manifest.parts]
        self._open: OrderedDict[int, Shard] = OrderedDict()
        self._checked: set[int] = set()
        self._head: Head | None = None

    @classmethod
    def open(cls, path: str | Path) -> TeacherCache:
        """The cache in the folder ``path``. Shards are checked when they are first read.

        Raises:
            CacheError: there is none, it is not finished, or files of it are missing.
        """
        folder = Path(path).expanduser()
        manifest = Manifest.read(folder)
        if not manifest.complete:
            found = sum(part.find(folder / SHARDS) is not None for part in manifest.parts)
            raise CacheError(
                f"expected a finished cache in {folder}, got {found} of {len(manifest.parts)} shards; repeat the "
                f"command that builds it: it goes on from there"
            )
        missing = [name for name in manifest.files if not (folder / SHARDS / name).is_file()]
        if missing:
            there = len(manifest.files) - len(missing)
            raise CacheError(
                f"expected {len(manifest.files)} shards in {folder / SHARDS}, got {there}: {missing[0]} is missing; "
                f"repeat the command that builds the cache: it fills the gap"
            )
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.manifest.data.examples

    @property
    def kind(self) -> str:
        """``hidden``, ``top-k``, ``sampled`` or ``hybrid``."""
        return self.manifest.recording.kind

    @property
    def temperature(self) -> float | None:
        """At which the laws were taken; None where they can be read at any."""
        return None if self.kind == HIDDEN else self.manifest.recording.temperature

    def rows(self, indices: Sequence[int], strings: Sequences | None = None, *, size: int | None = None) -> Law:
        """The laws at every decision of the strings ``indices``, in that order.

        Args:
            indices: positions in the whole set of strings, from 0.
            strings: these strings, where they are at hand: their responses have to be those of the cache.
            size: ids that the laws shall be over, where a student's table has fewer rows.

        Returns:
            :class:`klkit.divergences.partial.Hidden`, ``TopK``, ``Sampled`` or ``Hybrid``, one row a decision.

        Raises:
            IndexError: there is no such string.
            StaleCache: a string is another one.
            CacheError: a shard is damaged, or the laws cannot be cut to ``size``.
        """
        if strings is not None:
            self._same_responses(indices, strings)
        found = [shard.laws(i) for shard, i in map(self._locate, indices)]
        if not found:
            found = [self._nothing()]
        tensors = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        manifest = self.manifest
        options: dict[str, Any] = {"temperature": manifest.recording.temperature, "size": manifest.size}
        laws = law(self.kind, tensors, head=self._output_head(), **options)
        return laws if size is None or size >= manifest.size else self._cut(laws, size)

    def strings(self, indices: Sequence[int]) -> Sequences:
        """The strings themselves, as the model read them.

        Raises:
            IndexError: there is no such string.
            CacheError: a shard is damaged, or no string was asked for.
        """
        parts = [shard.string(i) for shard, i in map(self._locate, indices)]
        if not parts:
            raise CacheError("expected the index of at least one string, got none; name some")
        return Sequences.cat(parts)

    def require(
        self,
        *,
        strings: Sequences | None = None,
        teacher: LanguageModel | None = None,
        vocabulary: Vocabulary | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
    ) -> None:
        """Refuse this cache unless it is what ``teacher`` says about ``strings``. What is None is not looked at.

        Args:
            strings: all strings of the set, in order, as the teacher reads them.
            teacher: the model.
            vocabulary: what a student chooses from; padding rows do not matter.
            max_tokens: longest string that was let through; named where the strings differ.
            temperature: at which the laws are needed.

        Raises:
            StaleCache: what is wrong, and what to do.
        """
        manifest, found = self.manifest, []
        if teacher is not None:
            found += teacher_changes(manifest.teacher, Teacher.of(teacher))
        if vocabulary is not None and token_digest(vocabulary) != manifest.teacher.tokens:
            found.append(
                f"a student with another tokenizer: tokens {manifest.teacher.tokens} of {manifest.teacher.name}, "
                f"{token_digest(vocabulary)} of the student"
            )
        if strings is not None:
            now = Data.of(strings, max_tokens)
            if (now.responses, now.contexts) != (manifest.data.responses, manifest.data.contexts):
                before = self.strings(range(len(self))) if len(self) == len(strings) else strings
                found += data_changes(before, manifest.data, strings, now)
        if temperature is not None and self.temperature not in (None, temperature):
            found.append(
                f"another temperature: {self.temperature:g} then, {temperature:g} now, and a part of a law cannot be "
                f"tempered"
            )
        if found:
            raise StaleCache(
                f"expected {self.path} to hold what this teacher says about these examples, got {'; '.join(found)}. "
                f"Build it again, in another folder, with: klkit cache build; or go back to what it was built from"
            )

    def _locate(self, index: int) -> tuple[Shard, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"expected examples in 0..{len(self) - 1}, those of {self.path}, got {index}")
        place = bisect_right(self._first, index) - 1
        part = self.manifest.parts[place]
        shard = self._open.pop(place, None)
        if shard is None:
            path = self.path / SHARDS / self.manifest.files[place]
            shard = Shard(path, part, self.kind, trusted=place in self._checked)
            self._checked.add(place)
        self._open[place] = shard
        if len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return shard, index - part.first

    def _nothing(self) -> dict[str, Tensor]:
        """Tensors of no decisions, of the right widths and formats."""
        shard = self._locate(0)[0]
        return {name: value[:0] for name, value in shard.laws(0).items()}

    def _output_head(self) -> Head | None:
        if self.manifest.head is None or self._head is not None:
            return self._head
        path, facts = self.path / HEAD, self.manifest.head
        try:
            if file_digest(path) != facts["digest"]:
                raise ValueError("its content is not what was written")
            tensors = load_file(path)
        except (OSError, SafetensorError, ValueError) as error:
            raise CacheError(
                f"expected a whole output head {path}, got: {error}; delete this file and repeat the command that "
                f"built the cache"
            ) from error
        self._head = Head(tensors["weight"], tensors.get("bias"), facts["factor"], facts["cap"], facts["size"])
        return self._head

    def _cut(self, laws: Law, size: int) -> Law:
        if isinstance(laws, Hidden):
            return replace(laws, head=laws.head.cut(size))
        ids = torch.cat([laws.tokens, laws.draws], 1) if isinstance(laws, Hybrid) else laws.tokens
        if ids.numel() and int(ids.max()) >= size:
            raise CacheError(
                f"expected laws over the {size} ids of the student, got some over {self.manifest.size} in {self.path}, "
                f"whose teacher gives mass to ids that the student lacks; build the cache with --kind hidden"
            )
        return laws

    def _same_responses(self, indices: Sequence[int], strings: Sequences) -> None:
        if len(indices) != len(strings):
            raise StaleCache(f"expected one index for each of {len(strings)} strings, got {len(indices)}")
        for place, index in enumerate(indices):
            shard, i = self._locate(index)
            if not torch.equal(shard.string(i).completion(0), strings.completion(place).cpu()):
                raise StaleCache(
                    f"expected example {index + 1} to be the one that {self.path} was built from, got another "
                    f"response; build the cache again from this data, or use the data it was built from"
                )
