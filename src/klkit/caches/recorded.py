"""A model of which only what it said about some strings is left: enough to compare any other model with it.

The vectors of its strings and its output head are its laws; the words of its tokens, and the features that control
variates are made of, are kept beside them. It can be read out at those strings and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from klkit.caches.build import write_head
from klkit.caches.cache import TeacherCache
from klkit.caches.manifest import SHARDS, Manifest
from klkit.caches.recording import HIDDEN, Coverage, Recording
from klkit.caches.shards import CacheError, Part, Shard
from klkit.caches.source import Data, Teacher
from klkit.divergences.linear import Head
from klkit.files import write_atomically, write_text
from klkit.models.base import LanguageModel, NotTractable, Vocabulary
from klkit.numerics import log_softmax
from klkit.sequences import Content, Sequences

MODEL, FEATURES = "model.json", "features.safetensors"


def publish(
    folder: Path,
    model: LanguageModel,
    strings: Sequences,
    parts: Sequence[Part],
    recording: Recording,
    *,
    size: int,
    max_tokens: int | None = None,
    features: Float[Tensor, "v f"] | None = None,
) -> None:
    """Make a cache of shards that hold what ``model`` said about ``strings``; nothing where it has no head to keep.

    Args:
        recording: how its laws were recorded.
        size: ids that they are over.

    Raises:
        CacheError: a shard is missing, or the disk refuses.
    """
    try:
        head = write_head(folder, model, recording)
        if head is None and recording.kind == HIDDEN:
            return
        tokens = model.vocabulary.tokens
        words = {"tokens": list(tokens), "pieces": model.pieces(range(len(tokens))), "window": model.window}
        write_text(folder / MODEL, json.dumps(words))
        if features is not None:
            kept = {"features": features.cpu().contiguous()}
            write_atomically(folder / FEATURES, lambda beside: save_file(kept, beside))
    except (OSError, SafetensorError) as error:
        raise CacheError(
            f"expected to write into {folder}, got: {error}; make room, or choose another folder"
        ) from error
    files = [part.find(folder / SHARDS) for part in parts]
    if None in files:
        raise CacheError(f"expected {len(parts)} shards in {folder / SHARDS}, got fewer; repeat the command to go on")
    paths = [path for path in files if path is not None]
    shards = (Shard(path, part, recording.kind, trusted=True) for path, part in zip(paths, parts, strict=True))
    coverage = sum((shard.coverage for shard in shards), Coverage())
    held = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    Manifest(
        teacher=Teacher.of(model),
        data=Data.of(strings, max_tokens),
        recording=recording,
        size=size,
        width=model.width,
        head=head,
        parts=tuple(parts),
        files=tuple(path.name for path in paths),
        coverage=coverage.summary(recording.kind),
        bytes=held,
    ).write(folder)


@dataclass(frozen=True, eq=False)
class RecordedModel:
    """What is left of a model: it reads vectors out, knows its tokens, and repeats what it said of its strings.

    Attributes:
        cache: what it said.
        vocabulary: what it chose from.
        texts: each token as text.
        window: longest context plus completion it could read.
        features: of its tokens, for control variates; None if it had none.
    """

    cache: TeacherCache
    vocabulary: Vocabulary
    texts: tuple[str, ...]
    window: int | None
    features: Float[Tensor, "v f"] | None

    @classmethod
    def open(cls, path: str | Path) -> RecordedModel:
        """The model that was recorded in the folder ``path``.

        Raises:
            CacheError: there is no finished cache, or one that does not say what the model's tokens are.
        """
        cache = TeacherCache.open(path)
        try:
            words = json.loads((cache.path / MODEL).read_text(encoding="utf-8"))
            vocabulary = Vocabulary(tuple(words["tokens"]), cache.manifest.teacher.ends)
            texts, window = tuple(words["pieces"]), words["window"]
            table = load_file(cache.path / FEATURES)["features"] if (cache.path / FEATURES).is_file() else None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CacheError(
                f"expected a reference that klkit compare recorded in {cache.path}, got: {error}; name the folder that "
                f"--cache or the run's reference lies in, or the model itself"
            ) from error
        return cls(cache, vocabulary, texts, window, table)

    @property
    def name(self) -> str:
        """The name of the model that was recorded."""
        return self.cache.manifest.teacher.name

    @property
    def digest(self) -> str:
        """Digest of its weights."""
        return self.cache.manifest.teacher.weights

    @property
    def width(self) -> int:
        """Values of a vector."""
        return self.cache.manifest.width

    @property
    def dtype(self) -> torch.dtype:
        """Precision it computed in."""
        found: torch.dtype = getattr(torch, self.cache.manifest.teacher.dtype)
        return found

    @cached_property
    def _head(self) -> Head | None:
        law: Any = self.cache.rows([])
        found: Head | None = getattr(law, "head", None)
        return found

    def head(self) -> Head | None:
        """Its output head; None where only parts of its laws were kept."""
        return self._head

    def readout(self, h: Float[Tensor, "m d"]) -> Float[Tensor, "m v"]:
        """Log-probabilities that vectors stand for.

        Raises:
            NotTractable: only parts of its laws were kept.
        """
        if self._head is None:
            raise self._gone()
        return log_softmax(self._head.logits(h))

    def context(self, prompt: Content | None) -> Int[Tensor, " c"]:
        """What it read before its first string: nothing else was kept of its prompts."""
        return self.cache.strings([0]).context(0)

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Each token as text."""
        return [self.texts[i] for i in tokens]

    def begin(self, contexts: Sequence[Int[Tensor, " _c"]]) -> tuple[None, Float[Tensor, "b d"]]:
        """The vectors of the first decisions after contexts of its strings.

        Raises:
            NotTractable: a context is none of them.
        """
        found = []
        for context in contexts:
            for i in range(len(self.cache)):
                string = self.cache.strings([i])
                if self._head is not None and torch.equal(string.context(0), context) and string.decisions:
                    law: Any = self.cache.rows([i])
                    found.append(law.hidden[:1])
                    break
            else:
                raise self._gone()
        return None, torch.cat(found)

    def encode(self, x: Sequences) -> Float[Tensor, "m d"]:
        """Not to be had.

        Raises:
            NotTractable: always.
        """
        raise self._gone()

    def advance(self, state: Any, tokens: Int[Tensor, " b"]) -> tuple[Any, Float[Tensor, "b d"]]:
        """Not to be had.

        Raises:
            NotTractable: always.
        """
        raise self._gone()

    def select(self, state: Any, rows: Int[Tensor, " k"]) -> Any:
        """Not to be had.

        Raises:
            NotTractable: always.
        """
        raise self._gone()

    def embedding(self) -> None:
        """None was kept; see ``features``."""
        return None

    def _gone(self) -> NotTractable:
        return NotTractable(
            f"expected to ask what {self.name} said of the {len(self.cache)} strings in {self.cache.path}, got other "
            f"strings; name the model itself instead of its cache"
        )
