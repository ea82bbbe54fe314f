"""The file of base logits that llama-perplexity would write, from any model: see :mod:`klkit.caches.llamacpp`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from klkit.caches.llamacpp import CODES, DEPTH, HEADER, MAGIC, first_token, record_width, strings_of
from klkit.files import write_atomically
from klkit.models.base import LanguageModel, read_logits


def write_llamacpp(
    path: str | Path,
    model: LanguageModel,
    windows: Int[Tensor, "w n"],
    *,
    first: int | str | None = "auto",
    batch_size: int = 8,
) -> None:
    """Write the file that llama-perplexity would write for ``model``, whole or not at all.

    Args:
        windows: ids of the text, ``(w, n)``, in windows that do not overlap.
        first: what the model reads in place of the first token of every window, see :func:`first_token`; the file
            keeps the ids of the text.
        batch_size: windows the model reads at a time.

    Raises:
        ValueError: no window, or windows too short or too long for the model, or ids outside of its vocabulary.

    Example:
        >>> import tempfile
        >>> from klkit.models.automaton import coin
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "base"
        ...     write_llamacpp(path, coin(end=0.5), torch.tensor([[1, 1, 0, 1]]))
        ...     path.stat().st_size
        48
    """
    count, width = windows.shape
    if count < 1 or width < 3:
        raise ValueError(f"expected at least one window of at least 3 tokens, got {count} of {width}; give longer text")
    if model.window is not None and width > model.window:
        raise ValueError(
            f"expected windows of at most {model.window} tokens, all that {model.name} reads, got {width}; cut the "
            f"text into shorter windows"
        )
    size = model.vocabulary.size
    if int(windows.min()) < 0 or int(windows.max()) >= size:
        raise ValueError(
            f"expected ids in 0..{size - 1}, those of {model.name}, got {int(windows.min())}..{int(windows.max())}; "
            f"tokenize the text with its tokenizer"
        )
    x = strings_of(windows, first_token(windows, model, first))

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            file.write(HEADER.pack(MAGIC, width, size, count))
            file.write(windows.numpy().astype("<i4").tobytes())
            for part in torch.split(torch.arange(count), batch_size):
                for logits in read_logits(model, model.encode(x.select(part))):
                    file.write(records_of(logits).tobytes())

    write_atomically(Path(path), write)


def records_of(logits: Float[Tensor, "m v"]) -> NDArray[np.uint16]:
    """Records of laws, ``(m, 2·ceil(v/2)+4)``, in the single precision that llama.cpp computes them in.

    Raises:
        ValueError: a logit is NaN or ``+inf``, or a row excludes every token.
    """
    z = logits.detach().float().cpu().numpy()
    greatest = z.max(1, keepdims=True)
    if not np.isfinite(greatest).all():
        raise ValueError(
            "expected logits that are finite or -inf, with one finite entry in each row, got NaN, +inf or an empty "
            "row; load the model with dtype=float32"
        )
    least = np.maximum(z.min(1, keepdims=True), greatest - DEPTH)
    total = np.exp(z - greatest).sum(1, keepdims=True, dtype=np.float64)
    lowest = least - greatest - np.log(total).astype(np.float32)
    step = (greatest - least) / CODES
    inverse = np.divide(np.float32(1), step, out=np.zeros_like(step), where=step > 0)
    found: NDArray[Any] = np.zeros((len(z), record_width(z.shape[1])), dtype="<u2")
    found[:, :4] = np.concatenate([step, lowest], 1).astype("<f4").view("<u2")
    found[:, 4 : 4 + z.shape[1]] = np.rint(inverse * (np.maximum(z, least) - least))
    return found
