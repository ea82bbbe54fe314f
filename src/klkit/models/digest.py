"""What tells one set of weights from another: a hash of every value, whatever holds it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 25
"""Bytes that are hashed at a time, by as many threads as there are cores."""


def weights_digest(state: Mapping[str, Any]) -> str:
    """BLAKE2 over the name, type, shape and bytes of every tensor of a state dictionary, as 16 hexadecimal digits.

    No arithmetic takes part, so it is the same on every device and for every number of threads; a tensor under two
    names is read once, and counts as two equal ones. Of tensors without data (``meta``) the shape alone is known; what
    is no tensor is left out.

    Example:
        >>> one, other = torch.zeros(3), torch.tensor([0.0, 0.0, 1e-30])
        >>> weights_digest({"w": one}) == weights_digest({"w": other})
        False
    """
    leaves = [leaf for name in sorted(state) for leaf in plain_tensors(name, state[name])]
    found = hashlib.blake2b(digest_size=8)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        once = {place_of(tensor): tensor for _, tensor in leaves}
        read = {place: pool.map(_hashed, _chunks(tensor)) for place, tensor in once.items()}
        hashes = {place: b"".join(parts) for place, parts in read.items()}
    for name, tensor in leaves:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(hashes[place_of(tensor)])
    return found.hexdigest()


def plain_tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors that a value consists of: itself, or the parts of a quantised or distributed one."""
    if not isinstance(value, Tensor):
        return
    value = value.detach()
    if hasattr(value, "__tensor_flatten__"):
        for part in value.__tensor_flatten__()[0]:
            yield from plain_tensors(f"{name}.{part}", getattr(value, part))
    elif value.is_quantized:
        yield name, value.dequantize()
    elif value.layout != torch.strided:
        yield name, value.to_dense()
    else:
        yield name, value


def place_of(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor's values are; equal for two names of one tensor."""
    return tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _chunks(tensor: Tensor) -> list[Tensor]:
    """The bytes of a tensor in parts; none of a tensor without data."""
    if tensor.is_meta or not tensor.numel():
        return []
    return list(torch.split(tensor.reshape(-1).view(torch.uint8), CHUNK))


def _hashed(part: Tensor) -> bytes:
    return hashlib.blake2b(part.cpu().numpy().data, digest_size=32).digest()
