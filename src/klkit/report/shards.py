"""Batches of a run as tensors on disk: one file a batch while it lasts, all of them in one file in the end.

A finished run may be larger than memory. Its file is therefore written shard by shard, and read in slices: the few
strings that a page shows, or one column of numbers, some at a time.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from klkit.divergences.fused import RowStatistics
from klkit.estimators.statistics import TokenStatistics
from klkit.sequences import Sequences

FORMATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}
"""Names that the safetensors format gives to the types of what a batch holds."""

CHUNK = 1 << 18  # numbers of a column read at a time


@dataclass(frozen=True, slots=True)
class Details:
    """The five most probable tokens of both models at every decision of a few strings.

    Attributes:
        string: index of the shown strings in the run, ``(s,)``.
        tokens_p: ids, ``(k, 5)`` over the decisions of those strings, most probable first.
        logp_p: their log-probabilities under ``p``, ``(k, 5)``.
        tokens_q: the same for ``q``.
        logp_q: their log-probabilities under ``q``.
    """

    string: Tensor
    tokens_p: Tensor
    logp_p: Tensor
    tokens_q: Tensor
    logp_q: Tensor

    @staticmethod
    def cat(parts: Sequence[Details], offsets: Sequence[int]) -> Details:
        """Concatenate batches; ``offsets`` is the index in the run of each batch's first string."""
        return Details(
            torch.cat([part.string + offset for part, offset in zip(parts, offsets, strict=True)]),
            *(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Details)[1:]),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """One finished batch of strings.

    Attributes:
        statistics: what the estimators read.
        details: the decisions of the few strings that the report shows in full.
        floor: ``KL(p‖p)`` between two passes of ``p`` over the first strings of the run, ``(f,)``.
    """

    statistics: TokenStatistics
    details: Details
    floor: Tensor

    @staticmethod
    def cat(parts: Sequence[Batch]) -> Batch:
        """Successive strings together."""
        sizes = [len(part.statistics.x) for part in parts]
        return Batch(
            TokenStatistics.cat([part.statistics for part in parts]),
            Details.cat([part.details for part in parts], [sum(sizes[:i]) for i in range(len(sizes))]),
            torch.cat([part.floor for part in parts]),
        )


def flatten(batch: Batch) -> dict[str, Tensor]:
    """A batch as named tensors, the form in which it lies on disk."""
    x, stats = batch.statistics.x, batch.statistics
    named = {f"x.{f.name}": getattr(x, f.name) for f in fields(Sequences)}
    named |= {f"rows.{f.name}": getattr(stats.rows, f.name) for f in fields(RowStatistics)}
    named |= {f"details.{f.name}": getattr(batch.details, f.name) for f in fields(Details)}
    named |= {"features": stats.features, "mixture": stats.mixture, "floor": batch.floor}
    return {name: value.contiguous() for name, value in named.items() if value is not None}


def unflatten(tensors: Mapping[str, Tensor]) -> Batch:
    """The inverse of :func:`flatten`."""
    return Batch(_statistics(tensors), Details(**_fields(tensors, "details", Details)), tensors["floor"])


def _statistics(tensors: Mapping[str, Tensor]) -> TokenStatistics:
    rows = _fields(tensors, "rows", RowStatistics)
    if rows["confidence"] is None:  # a run from before it was kept: not known
        rows["confidence"] = torch.full_like(rows["kl"], torch.nan)
    return TokenStatistics(
        x=Sequences(**_fields(tensors, "x", Sequences)),
        rows=RowStatistics(**rows),
        features=tensors["features"],
        mixture=tensors.get("mixture"),
    )


def _fields(tensors: Mapping[str, Tensor], prefix: str, cls: type) -> dict[str, Any]:
    return {f.name: tensors.get(f"{prefix}.{f.name}") for f in fields(cls)}


@dataclass(frozen=True, slots=True)
class Shown:
    """The few strings of a run that its report shows token by token.

    Attributes:
        statistics: of these strings alone.
        details: their most probable tokens; ``details.string`` are their numbers in the run.
    """

    statistics: TokenStatistics
    details: Details


def join_shards(paths: Sequence[Path], whole: Path) -> None:
    """Write the batches of the files ``paths``, one after the other, into the one file ``whole``.

    Only one batch is in memory at a time. Padding follows the widest batch, and the numbers of the shown strings
    count through.
    """
    entries: dict[str, dict[str, Any]] = {}
    for path in paths:
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - a safetensors file is no mapping
                part = shard.get_slice(name)
                (rows, *width), kind = part.get_shape(), FORMATS[part.get_dtype()]
                entry = entries.setdefault(name, {"rows": 0, "width": width, "kinds": []})
                entry["width"] = [max(pair) for pair in zip(entry["width"], width, strict=True)]
                entry["rows"] += rows
                # An empty tensor has no type that matters.
                entry["kinds"] = entry["kinds"] + [kind] if rows else entry["kinds"] or [kind]
    header, end = {}, 0
    for name, entry in sorted(entries.items(), key=lambda item: (-_kind(item[1]).itemsize, item[0])):
        shape = [entry["rows"], *entry["width"]]
        entry["next"] = end
        size = torch.Size(shape).numel() * _kind(entry).itemsize
        named = next(key for key, kind in FORMATS.items() if kind == _kind(entry))
        header[name] = {"dtype": named, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    strings = 0
    with whole.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for path in paths:
            shard = load_file(path)
            shard["details.string"] = shard["details.string"] + strings
            strings += len(shard["x.start"])
            for name, values in shard.items():
                entry = entries[name]
                if entry["width"]:
                    values = torch.nn.functional.pad(values, (0, entry["width"][0] - values.shape[1]))
                raw = values.to(_kind(entry)).contiguous().view(-1).view(torch.uint8).numpy()
                file.seek(8 + len(text) + entry["next"])
                file.write(raw.data)
                entry["next"] += raw.nbytes
        file.truncate(8 + len(text) + end)


def _kind(entry: Mapping[str, Any]) -> torch.dtype:
    kinds: list[torch.dtype] = entry["kinds"]
    return reduce(torch.promote_types, kinds)


def read_shown(path: Path) -> Shown:
    """The shown strings of a finished run."""
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        details = Details(**{f.name: file.get_tensor(f"details.{f.name}") for f in fields(Details)})
        start, stop = file.get_tensor("x.start"), file.get_tensor("x.stop")
        last = torch.cat([torch.zeros(1, dtype=torch.long), (stop - start).cumsum(0)])
        strings = details.string.tolist()

        def rows(name: str) -> Tensor:
            part = file.get_slice(name)
            by_string = name.startswith("x.") and name != "x.sampler_logp"
            bounds = [(i, i + 1) if by_string else (int(last[i]), int(last[i + 1])) for i in strings]
            return torch.cat([part[:0], *(part[first:end] for first, end in bounds)])

        kept = {name for name in names if name.split(".")[0] in ("x", "rows", "features", "mixture")}
        return Shown(_statistics({name: rows(name) for name in kept}), details)


def read_column(path: Path, name: str) -> Iterator[Tensor]:
    """The numbers of one column of a finished run, some at a time."""
    with safe_open(path, framework="pt") as file:
        part = file.get_slice(name)
        for first in range(0, part.get_shape()[0], CHUNK):
            yield part[first : first + CHUNK]
