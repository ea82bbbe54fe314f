"""Randomness without global state: one seed, and a path of names.

Every draw in klkit comes from a generator derived from the run's seed and from *what* is drawn
(``"string", prompt, replicate``), never from *when* it is drawn. Results therefore do not depend on
the batch size, on the order of the work, or on a resumption half-way.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on ``seed`` and on every name of the path.

    Example:
        >>> derive(0, "string", 1) == derive(0, "string", 1) != derive(0, "string", 2)
        True
    """
    digest = hashlib.blake2b(repr((seed, *names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator for the path ``names`` under ``seed``.

    Example:
        >>> import torch
        >>> a = torch.rand(2, generator=stream(7, "demo"))
        >>> b = torch.rand(2, generator=stream(7, "demo"))
        >>> bool((a == b).all())
        True
    """
    return torch.Generator().manual_seed(derive(seed, *names))


def numpy_stream(seed: int, *names: str | int) -> np.random.Generator:
    """The same path as a NumPy generator, for the statistics layer (resampling)."""
    return np.random.default_rng(derive(seed, *names))
