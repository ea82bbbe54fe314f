"""The kernels behind :mod:`klkit.divergences.fused`: one contract, several ways to meet it.

A backend is a module with four functions on rows of raw logits ``a`` (of ``p``) and ``b`` (of ``q``), each
``(m, v)`` in fp64, fp32, bf16 or fp16, computing in at least single precision and allocating nothing of
the logits' size:

``row_sums(a, b)``
    the table of :class:`klkit.divergences.sums.RowSums`, ``(m, COLUMNS)`` in double precision.

``second_sweep(a, b, norms, *, mixture, overwrite)``
    ``(m, 3)`` in double precision: the Jensen-Shannon divergence, ``KL(p‖½p + ½q)``, and the total variation.
    The first two are left undefined without ``mixture``. With ``overwrite``, ``a`` is left holding ``p``.

``sums_and_gaps(a, b, rule)``
    that table, and ``(m, 2)`` in double precision: ``Σ |p − q|`` over the head that a
    :class:`klkit.divergences.adaptive.HeadRule` gives each row, and over the whole row.

``gradients(a, b, tokens, norms, slopes, out_a, out_b)``
    into ``out_a`` and ``out_b`` (either may be None, or the logits themselves) the gradients that
    :class:`klkit.divergences.sums.Slopes` spells out.

``norms`` is :class:`klkit.divergences.sums.Norms` as a table ``(m, 4)`` in double precision.

:func:`choose` picks one: ``eager`` always works; ``native`` needs numba and a CPU; ``inductor`` needs
what ``torch.compile`` needs. The environment variable ``KLKIT_BACKEND`` decides for a whole process.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

BACKENDS = ("eager", "native", "inductor")

VARIABLE = "KLKIT_BACKEND"

SAVED = 4e-9
"""Seconds that the native kernels save a position (one entry of both rows) on two cores, at the least."""

LOADING, COMPILING = 0.6, 4.0
"""Seconds it takes to import numba and its cached kernels, and to compile them for the first time."""


def choose(positions: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """The name of the backend for ``positions`` entries (rows times vocabulary) in all.

    Kernels that have to be loaded or compiled first are chosen when they save at least twice what that
    costs, so a short run is never slower for it. Name the whole of a computation, not one of its chunks.

    Raises:
        ValueError: ``KLKIT_BACKEND`` names no backend.

    Example:
        >>> import torch
        >>> choose(1000, dtype=torch.float64)  # numba's kernels know single and half precision only
        'eager'
    """
    forced = os.environ.get(VARIABLE)
    if forced and forced != "auto":
        if forced not in BACKENDS:
            raise ValueError(f"expected {VARIABLE} to be auto or one of {', '.join(BACKENDS)}, got {forced!r}")
        return forced
    if torch.device(device).type != "cpu" or dtype == torch.float64 or find_spec("numba") is None:
        return "eager"
    if f"{__name__}.native" in sys.modules:
        return "native"
    return "native" if positions * SAVED > 2 * (LOADING if _compiled_before() else COMPILING) else "eager"


def get(name: str, *tensors: torch.Tensor) -> ModuleType:
    """The backend called ``name``, which has to suit ``tensors``.

    Raises:
        ValueError: no such backend, or it cannot work on tensors like these.
        ImportError: what it needs is not installed.
    """
    if name not in BACKENDS:
        raise ValueError(f"expected a backend among {', '.join(BACKENDS)}, got {name!r}")
    if name == "native":
        if find_spec("numba") is None:
            raise ImportError(
                "expected numba for the native backend, got an environment without it; pip install 'klkit[fast]'"
            )
        if any(x.device.type != "cpu" or x.dtype == torch.float64 for x in tensors):
            return import_module(f"{__name__}.eager")
    return import_module(f"{__name__}.{name}")


def _compiled_before() -> bool:
    """Whether numba has kernels of this module in its cache, without importing it."""
    folder = os.environ.get("NUMBA_CACHE_DIR")
    places = [Path(folder).glob("*/kernels.row_sums-*.nbi")] if folder else []
    return any(
        any(place) for place in [*places, (Path(__file__).parent / "__pycache__").glob("kernels.row_sums-*.nbi")]
    )
