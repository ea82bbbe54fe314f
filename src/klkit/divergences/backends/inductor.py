"""Kernels from ``torch.compile``, called on tensors: C++ on a CPU, Triton on a GPU, from one source.

Compiling takes ten seconds and more for each of the functions and each combination of formats, and a call costs
a tenth of a millisecond, so whole tensors are handed over and never a single row: that, double precision and
vocabularies of less than two blocks go through :mod:`klkit.divergences.backends.eager`.
"""

from __future__ import annotations

import inspect
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from klkit.divergences.adaptive import HeadRule
from klkit.divergences.backends import eager, graphs
from klkit.divergences.backends.graphs import BLOCK

# Values that many sums use are computed where they are used; by default they would be written to memory first.
OPTIONS: dict[str, str | int | bool | Callable[..., Any]] = {
    "realize_reads_threshold": 1000,
    "realize_acc_reads_threshold": 1000,
    "realize_opcount_threshold": 10000,
}

LIMIT: dict[str, Any] = (
    {"recompile_limit": 64} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
)


def available(device: torch.device | str = "cpu") -> bool:
    """Whether ``torch.compile`` finds what it needs: a C++ compiler and Python's headers, or Triton for a GPU."""
    if torch.device(device).type != "cpu":
        return find_spec("triton") is not None
    compilers = (
        [os.environ["CXX"]] if "CXX" in os.environ else ["cl"] if sys.platform == "win32" else ["g++", "clang++"]
    )
    return any(map(shutil.which, compilers)) and (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()


@torch.no_grad()
def row_sums(a: Float[Tensor, "m v"], b: Float[Tensor, "m v"]) -> Float[Tensor, "m _"]:
    """The table of :class:`klkit.divergences.sums.RowSums`, in double precision."""
    if not _suits(a, b):
        return eager.row_sums(a, b)
    a, b, device = a.detach(), b.detach(), a.device.type
    parts = _by_blocks(_compiled(graphs.block_sums, device), a, b)
    # A GPU wants these small steps in one kernel; a CPU does not mind, and is spared the compilation.
    table: Tensor = (graphs.row_sums if device == "cpu" else _compiled(graphs.row_sums, device))(a, b, parts)
    return table


@torch.no_grad()
def second_sweep(
    a: Float[Tensor, "m v"],
    b: Float[Tensor, "m v"],
    norms: Float[Tensor, "m 4"],
    *,
    mixture: bool = True,
    overwrite: bool = False,
) -> Float[Tensor, "m 3"]:
    """Jensen-Shannon divergence, ``KL(p‖½p + ½q)`` and total variation of rows whose norms are known."""
    if not _suits(a, b):
        return eager.second_sweep(a, b, norms, mixture=mixture, overwrite=overwrite)
    a, b, device = a.detach(), b.detach(), a.device.type
    table = _by_blocks(_compiled(graphs.second_sweep, device), a, b, norms).double().sum(-1).T
    if overwrite:
        _compiled(graphs.probabilities, device)(a, norms)
    return table


@torch.no_grad()
def sums_and_gaps(
    a: Float[Tensor, "m v"], b: Float[Tensor, "m v"], rule: HeadRule
) -> tuple[Float[Tensor, "m _"], Float[Tensor, "m 2"]]:
    """The table of sums, and ``Σ |p − q|`` over the head of each row and over all of it; its selection is eager."""
    table = row_sums(a, b)
    return table, eager.gaps_of(a, b, table, rule)


@torch.no_grad()
def gradients(
    a: Float[Tensor, "m v"],
    b: Float[Tensor, "m v"],
    tokens: Int[Tensor, " m"],
    norms: Float[Tensor, "m 4"],
    slopes: Float[Tensor, "m 12"],
    out_a: Float[Tensor, "m v"] | None,
    out_b: Float[Tensor, "m v"] | None,
) -> None:
    """Write the gradients that :class:`klkit.divergences.sums.Slopes` spells out."""
    places = [_place(a, out_a), _place(b, out_b)]
    if not _suits(a, b) or _overlap(a, b, *places):
        return eager.gradients(a, b, tokens, norms, slopes, out_a, out_b)
    a, b, drawn = a.detach(), b.detach(), tokens[:, None]
    k_p, k_q = slopes[:, :6].contiguous(), slopes[:, 6:] * slopes.new_tensor(graphs.TURNED)
    parts_p, parts_q = (
        (False, False) if out is None else (bool(k[:, 3].any()), bool(k[:, 4].any()))
        for out, k in ((out_a, k_p), (out_b, k_q))
    )
    # The entries of the drawn tokens apart: a comparison in every entry would cost more.
    few = a.gather(1, drawn), b.gather(1, drawn), norms
    at_p = graphs.slopes_p(*few, k_p, *parts_p) + k_p[:, 5:].float()
    at_q = graphs.slopes_q(*few, k_q, *parts_q) + k_q[:, 5:].float()
    rows = torch.arange(len(a), device=a.device)
    _compiled(graphs.write, a.device.type)(a, b, norms, k_p, k_q, parts_p, parts_q, *places)
    for out, value in ((out_a, at_p), (out_b, at_q)):
        if out is not None:
            # Not scatter_, which copies the whole of a half-precision tensor on a CPU.
            out.detach()[rows, tokens] = value[:, 0].to(out.dtype)
    return None


def _place(x: Tensor, out: Tensor | None) -> Tensor | bool | None:
    """``out``, or True if it is ``x`` itself: a graph must not be given one tensor under two names."""
    if out is None:
        return None
    return True if (out.data_ptr(), out.stride()) == (x.data_ptr(), x.stride()) else out.detach()


def _overlap(*tensors: Tensor | bool | None) -> bool:
    """Whether two tensors share memory, which graphs that write cannot tell apart."""
    places = [x.untyped_storage().data_ptr() for x in tensors if isinstance(x, Tensor)]
    return len(set(places)) < len(places)


def _suits(a: Tensor, b: Tensor) -> bool:
    """Whether compiled kernels are meant for tensors like these; sizes of 0 and 1 would each be compiled for."""
    return len(a) > 1 and a.shape[1] >= 3 * BLOCK and torch.float64 not in (a.dtype, b.dtype)


def _by_blocks(function: Callable[..., tuple[Tensor, ...]], a: Tensor, b: Tensor, *of_rows: Tensor) -> Tensor:
    """What ``function`` returns of all blocks of each row, ``(_, m, n)``.

    Blocks are taken where they lie; the last two of a row, of which one is short, from a padded copy.
    """
    size = a.shape[1]
    whole = size if size % BLOCK == 0 else size // BLOCK * BLOCK - BLOCK
    pieces = [(a[:, :whole], b[:, :whole])]
    if whole < size:
        pieces.append((_last(a, whole), _last(b, whole)))
    found = []
    for piece in pieces:
        cut = [x.view(len(x), -1, BLOCK) for x in piece]
        for x in cut:
            torch._dynamo.mark_static(x, 2)
        of_blocks = [z[:, None].repeat(1, cut[0].shape[1], 1) for z in of_rows]
        found.append(torch.stack(function(*cut, *of_blocks)))
    return torch.cat(found, -1)


def _last(x: Tensor, start: int) -> Tensor:
    """A copy of a row's entries from ``start`` on, filled up to two blocks with excluded tokens."""
    # One column more than needed: rows that are not contiguous, like those of the whole blocks, share their kernel.
    copy = x.new_full((len(x), 2 * BLOCK + 1), -torch.inf)[:, : 2 * BLOCK]
    copy[:, : x.shape[1] - start] = x[:, start:]
    return copy


@cache
def _compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """``function`` compiled for rows and vocabularies of any size.

    Raises:
        ImportError: there is nothing to compile with.
    """
    if not available(device):
        raise ImportError(
            f"expected a C++ compiler and Python's headers, or Triton for a GPU, which torch.compile needs for device "
            f"{device!r}, got neither; install them, set CXX, or choose the eager backend"
        )
    compiled: Callable[..., Any] = torch.compile(function, dynamic=True, fullgraph=True, options=OPTIONS, **LIMIT)
    return compiled
