"""A folder of caches that takes no more room than it was given: the ones not used for longest make way.

KEY/             a cache, finished or not: see :mod:`klkit.caches.build`
KEY.used         empty; its time says when the cache was last asked for
KEY.lock         empty; held by the process that builds the cache
KEY.evicted/     a cache on its way out, which nothing reads any more

A cache is named by what it is made of, so that whoever needs it finds it, and whoever needs another one does not.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from klkit.caches.cache import TeacherCache
from klkit.caches.recording import Recording
from klkit.caches.shards import CacheError
from klkit.caches.sizes import readable
from klkit.caches.source import Data, Teacher

USED, EVICTED, LOCK = ".used", ".evicted", ".lock"


def key_of(teacher: Teacher, data: Data, recording: Recording, sampling: Mapping[str, Any] | None = None) -> str:
    """The name of a cache: a digest of the model, the strings, what is kept of its laws, and how strings were drawn.

    What a model is called, and a limit of length that was let through, do not matter.

    Args:
        sampling: settings that the strings were drawn with, if the strings themselves do not say enough.

    Raises:
        TypeError: a setting has no form in JSON.

    Example:
        >>> import torch
        >>> from klkit.models.automaton import coin
        >>> from klkit.sequences import Sequences
        >>> x = Sequences.pack([torch.tensor([1])], [torch.tensor([1, 0])])
        >>> facts = Teacher.of(coin(end=0.5)), Data.of(x)
        >>> key_of(*facts, Recording()) == key_of(*facts, Recording(k=3)), len(key_of(*facts, Recording()))
        (True, 32)
    """
    model, strings = asdict(teacher), asdict(data)
    del model["name"], strings["max_tokens"]
    facts = [model, strings, recording.options(), dict(sampling or {})]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


class CacheStore:
    """Caches in a folder, of at most so many bytes together.

    A cache that this process has found or claimed stays until it is released. Unfinished ones are kept, since
    building goes on from where it stopped; what was half removed when a process died is removed by the next one.

    Args:
        folder: of the store; made if it is not there.
        most_bytes: that all caches may take together.
        clock: seconds since the epoch.

    Raises:
        ValueError: there is no room at all, or the folder is a file.

    Example:
        >>> import tempfile
        >>> from klkit.caches.build import build, size_of
        >>> from klkit.caches.recording import Recording
        >>> from klkit.models.automaton import coin
        >>> from klkit.sequences import Sequences
        >>> import torch
        >>> p, x = coin(end=0.5), Sequences.pack([torch.tensor([1])], [torch.tensor([1, 0])])
        >>> recording = Recording("top-k", k=2)
        >>> key = key_of(Teacher.of(p), Data.of(x), recording)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = CacheStore(folder, most_bytes=1_000_000)
        ...     before = store.find(key)
        ...     _ = build(store.claim(key, size_of(p, x, recording).total), p, x, recording)
        ...     before is None, len(store.find(key))
        (True, 1)
    """

    def __init__(self, folder: str | Path, most_bytes: int, *, clock: Callable[[], float] = time.time):
        self.folder, self.most_bytes, self._clock = Path(folder).expanduser(), most_bytes, clock
        if most_bytes < 1:
            raise ValueError(f"expected room for caches of at least 1 byte, got {most_bytes}; raise it")
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"expected a folder for caches, got the file {self.folder}; choose another name")
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held: set[str] = set()
        for path in self.folder.glob(f"*{EVICTED}"):
            shutil.rmtree(path, ignore_errors=True)

    def find(self, key: str) -> TeacherCache | None:
        """The finished cache of that name, which is then in use; None where there is none, or it is not finished."""
        cache = self._finished(key)
        if cache is not None:
            self._use(key)
        return cache

    def claim(self, key: str, size: int) -> Path:
        """A folder to build a cache in, which is then in use, with room for ``size`` bytes; what was begun is there.

        Args:
            size: of the finished cache, see :func:`klkit.caches.build.size_of`.

        Raises:
            ValueError: there is no room, even without the caches that nobody uses.
        """
        if size > self.most_bytes:
            raise ValueError(
                f"expected a cache of at most {readable(self.most_bytes)}, which {self.folder} may take, got one of "
                f"{readable(size)}; give the folder more, or record less"
            )
        sizes = {path.name: _bytes(path) for path in self._folders()}
        sizes[key] = max(size, sizes.get(key, 0))
        for other in sorted(sizes.keys() - {key}, key=self._last_use):
            if sum(sizes.values()) <= self.most_bytes:
                break
            if other not in self._held and self._finished(other) is not None:
                self._evict(other)
                del sizes[other]
        taken = sum(sizes.values()) - sizes[key]
        if taken + sizes[key] > self.most_bytes:
            raise ValueError(
                f"expected room for {readable(sizes[key])} in {self.folder}, got {readable(self.most_bytes)} of which "
                f"caches in use and unfinished ones take {readable(taken)}; give the folder more, or remove some"
            )
        self._use(key)
        return self.folder / key

    @contextmanager
    def alone(self, key: str) -> Iterator[None]:
        """Let no other process of this machine build the cache while the block runs: it waits, and then finds it.

        On systems without file locks nobody waits.
        """
        if sys.platform == "win32":
            yield
            return
        import fcntl

        with (self.folder / f"{key}{LOCK}").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def release(self, key: str) -> None:
        """Say that this process no longer uses a cache."""
        self._held.discard(key)

    def _finished(self, key: str) -> TeacherCache | None:
        try:
            return TeacherCache.open(self.folder / key)
        except CacheError:
            return None

    def _use(self, key: str) -> None:
        marker = self.folder / f"{key}{USED}"
        marker.touch()
        os.utime(marker, (self._clock(),) * 2)
        self._held.add(key)

    def _last_use(self, key: str) -> tuple[float, str]:
        marker = self.folder / f"{key}{USED}"
        return (marker.stat().st_mtime if marker.exists() else 0.0), key

    def _folders(self) -> list[Path]:
        return [path for path in self.folder.iterdir() if path.is_dir() and not path.name.endswith(EVICTED)]

    def _evict(self, key: str) -> None:
        """Remove a cache: at once for everyone who looks for it, and its files after that."""
        aside = self.folder / f"{key}{EVICTED}"
        shutil.rmtree(aside, ignore_errors=True)
        (self.folder / key).rename(aside)
        (self.folder / f"{key}{USED}").unlink(missing_ok=True)
        shutil.rmtree(aside, ignore_errors=True)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
