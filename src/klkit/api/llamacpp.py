"""Estimand F against a file of llama.cpp's base logits: what a user of its perplexity tool already has, as p."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from klkit.api.assemble import from_text
from klkit.api.batches import batches_of, describe, no_details
from klkit.api.gather import Gathered
from klkit.api.prepare import environment
from klkit.api.run import finish
from klkit.api.settings import Settings
from klkit.api.text import Windows
from klkit.caches.llamacpp import DEPTH, LlamaCppFile, first_token
from klkit.caches.llamacpp_score import ScoredLaws, score_laws
from klkit.divergences import backends
from klkit.estimators.statistics import TokenStatistics
from klkit.models.base import LanguageModel, read_rows
from klkit.models.spec import load
from klkit.numerics import rows_per_chunk
from klkit.report.record import RunFolder
from klkit.report.shards import Batch
from klkit.results import Comparison, Estimate, jsonable

CHUNKS_A_READ = 4  # cache-sized chunks of laws that are read and reduced together
SHOWN = 80  # characters of the text that a user can check the tokenizer by


@dataclass(frozen=True, slots=True)
class Scored:
    """Some windows of a file, scored: ``statistics`` for every estimator, ``laws`` for what the file leaves open."""

    statistics: TokenStatistics
    laws: ScoredLaws


@dataclass(frozen=True, slots=True)
class StoredModel:
    """The model that wrote a file, of which there is a name only; its tokens are spelled by ``speller``."""

    name: str
    speller: LanguageModel

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """Each token as text, if both models have one tokenizer."""
        return self.speller.pieces(tokens)


def score_against(
    file: LlamaCppFile, q: LanguageModel, *, batch_size: int = 8, first: int | str | None = "auto"
) -> Iterator[Scored]:
    """Read the windows of ``file`` with ``q``, and compare it with the stored laws at every scored position.

    Args:
        batch_size: windows that ``q`` reads at a time.
        first: what is read in place of the first token of every window;
            see :func:`klkit.caches.llamacpp.first_token`.

    Raises:
        ValueError: ``q`` cannot read windows this long.
        VocabularyMismatch: ``q`` does not choose from the file's ids.
        CacheError: a record is damaged.

    Example:
        >>> import tempfile
        >>> from klkit.caches.llamacpp_write import write_llamacpp
        >>> from klkit.models.automaton import coin
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_llamacpp(Path(folder) / "base", coin(end=0.5), torch.tensor([[1, 1, 1, 0]]))
        ...     scored = next(score_against(LlamaCppFile.open(Path(folder) / "base"), coin(end=0.25)))
        >>> round(float(scored.statistics.rows.kl), 4), round(float(scored.laws.llamacpp), 4)
        (0.1438, 0.1438)
    """
    file.require_vocabulary(q.vocabulary, q.name)
    width = file.tokens.shape[1]
    if q.window is not None and width > q.window:
        raise ValueError(
            f"expected a model that reads the file's windows of {width} tokens, got {q.name}, which reads {q.window}; "
            f"write the file again with llama-perplexity -c {q.window}"
        )
    strings = file.strings(first_token(file.tokens, q, first))
    size, ends = CHUNKS_A_READ * rows_per_chunk(q.vocabulary.size), q.vocabulary.ends
    backend = backends.choose(strings.decisions * q.vocabulary.size, dtype=q.dtype)
    begin = 0
    for batch in batches_of(len(strings), batch_size):
        x = strings.select(batch)
        parts = []
        for logq, tokens in zip(read_rows(q, q.encode(x), rows=size), torch.split(x.targets(), size), strict=True):
            laws = file.rows(slice(begin, begin + len(logq))).to(logq.device)
            parts.append(score_laws(laws, logq, tokens.to(logq.device), ends, backend=backend))
            begin += len(logq)
        laws_of_batch = ScoredLaws.cat(parts)
        rows = laws_of_batch.rows
        yield Scored(TokenStatistics(x=x, rows=rows, features=rows.kl.new_zeros(x.decisions, 0)), laws_of_batch)


def measure_llamacpp(
    path: str | Path,
    q: LanguageModel | str,
    *,
    first: int | str | None = "auto",
    unit: str = "nats",
    batch_size: int = 8,
    out: str | Path | None = None,
    observe: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Estimate ``KL(p‖q)`` per token of a text from the laws of ``p`` that llama-perplexity stored, from below.

    Args:
        path: written by ``llama-perplexity --kl-divergence-base``.
        q: the model compared with it, or its specification.
        first: id that the models read in place of the first token of every window, None for the text as it is, or
            ``"auto"``; see :func:`klkit.caches.llamacpp.first_token`.
        unit: ``nats`` or ``bits``, for printing.
        batch_size: windows that ``q`` reads at a time; changes no result.
        out: a new run folder to write, with a report; None keeps nothing on disk.
        observe: called with windows done and in all.

    Raises:
        CacheError: the file cannot be used.
        VocabularyMismatch: ``q`` does not choose from the file's ids.
        ValueError: an option or a model that cannot be used.

    Example:
        >>> import tempfile
        >>> from klkit.caches.llamacpp_write import write_llamacpp
        >>> from klkit.models.automaton import coin
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_llamacpp(Path(folder) / "base", coin(end=0.5), torch.ones(12, 5, dtype=torch.long))
        ...     result = measure_llamacpp(Path(folder) / "base", coin(end=0.25))
        >>> print(round(result.headline.value, 4), result.companions["precision"]["floored_tokens"])
        0.1438 0.0
    """
    file = LlamaCppFile.open(path)
    model = load(q) if isinstance(q, str) else q
    first = first_token(file.tokens, model, first)
    settings = Settings(p=str(file.path.resolve()), q=model.name, unit=unit, batch_size=batch_size)
    asked = {"llamacpp": settings.p, "q": settings.q, "first": first, "unit": unit, "batch_size": batch_size}
    env = provenance(file, model, settings)
    folder = None if out is None else RunFolder.create(Path(out), asked, env)
    found, parts = Gathered(0, every=True), []
    for number, scored in enumerate(score_against(file, model, batch_size=batch_size, first=first)):
        batch = Batch(scored.statistics, no_details(), torch.zeros(0))
        if folder is not None:
            folder.append(number, batch, describe(model, batch.statistics))
        found.add(batch)
        parts.append(scored.laws)
        if observe is not None:
            observe(len(found), len(file.tokens))
    laws = ScoredLaws.cat(parts)
    open_ended = bool((laws.floored > 0).any())
    p = StoredModel(f"{file.path.name} (llama.cpp base logits)", model)
    result = from_text(
        found,
        p,
        model,
        settings,
        Windows(file.strings(first), ()),
        notes_of(file, model, laws, first, open_ended),
        env,
        method="bucketed",
        direction="lower bound on KL(p‖q)" if open_ended else "KL(p‖q)",
    )
    result = with_file(result, file, p, laws, asked)
    finish(folder, result, found, model)
    return result


def with_file(
    result: Comparison, file: LlamaCppFile, p: StoredModel, laws: ScoredLaws, asked: Mapping[str, Any]
) -> Comparison:
    """The result with llama.cpp's own numbers, and with what the file leaves open."""
    theirs = llamacpp_estimate(laws, result.headline)
    kld, plain = theirs.in_unit(theirs.value), theirs.in_unit(plain_error(laws.llamacpp))
    perplexities = {name: perplexity(values) for name, values in (("p", laws.log_stored), ("q", laws.rows.logq))}
    precision = precision_of(laws)
    start = "".join(p.pieces(file.tokens.reshape(-1)[: SHOWN + 1].tolist()))[:SHOWN]
    unit = theirs.unit
    lines = {
        **result.lines,
        "llama.cpp": f"mean KLD {kld:.6g} ± {plain:.2g} {unit} by its own sum (tokens taken as independent); "
        f"perplexity of the text {perplexities['p']:.5g} under p, {perplexities['q']:.5g} under q",
        "stored laws": precision["words"],
        "text": f"{start!r}: if this does not read as text, p had another tokenizer than q",
    }
    companions = {
        **result.companions,
        "precision": precision,
        "llamacpp": {
            "mean_kld": jsonable(kld),
            "independent_stderr": jsonable(plain),
            "perplexity_p": jsonable(perplexities["p"]),
            "perplexity_q": jsonable(perplexities["q"]),
        },
        "text_start": start,
    }
    return replace(
        result, estimates=(*result.estimates, theirs), lines=lines, companions=companions, settings=dict(asked)
    )


def llamacpp_estimate(laws: ScoredLaws, headline: Estimate) -> Estimate:
    """llama.cpp's mean KLD: what is at the floor, or below −16 nats, left out, and no law normalised."""
    sums = laws.llamacpp.view(headline.n, -1).sum(1).numpy()
    return replace(headline, method="llamacpp", direction="KL(p‖q) as stored", contributions=sums, notes=())


def plain_error(values: Tensor) -> float:
    """The standard error that llama.cpp prints: of a mean of independent numbers."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def perplexity(logp: Tensor) -> float:
    """``exp(−mean log p)`` over the tokens of the text."""
    with np.errstate(over="ignore"):
        return float(np.exp(-float(logp.double().mean())))


def precision_of(laws: ScoredLaws) -> dict[str, Any]:
    """What the file leaves open about its laws, per scored position, in numbers and in words."""
    above = laws.beyond[laws.beyond > 0]
    rounding = laws.rounding[laws.rounding.isfinite()]
    mass = {"mean": float(laws.bucket.mean()), "max": float(laws.bucket.max())}
    found = {
        "depth": float(DEPTH),
        "step": float(2 * laws.error.max()),
        "floored_tokens": float(laws.floored.mean()),
        "positions_with_floor": float((laws.floored > 0).double().mean()),
        "bucket_mass": mass,
        "mass_above_one": {"positions": len(above), "largest": float(above.max()) if len(above) else 0.0},
        "rounding": float(rounding.mean()) if len(rounding) else math.nan,
        "text_tokens_at_floor": int(laws.drawn_floored.sum()),
        "q_mass_outside": float(laws.outside.mean()),
        "unit": "nats",
    }
    words = (
        f"cut {DEPTH:g} nats below the likeliest token: {found['floored_tokens']:.4g} tokens a position at the floor, "
        f"with {mass['mean']:.2g} of the mass (at most {mass['max']:.2g}); steps of {found['step']:.2g} nats, which "
        f"raise the number by {found['rounding']:.2g} nats at most"
    )
    if len(above):
        words += f"; {len(above)} of {len(laws.beyond)} laws add up to more than 1, by {float(above.max()):.1g} at most"
    return {**found, "words": words}


def notes_of(
    file: LlamaCppFile, q: LanguageModel, laws: ScoredLaws, first: int | None, open_ended: bool
) -> tuple[str, ...]:
    """What a reader must know about a number that comes from a file."""
    windows, width = file.tokens.shape
    notes = [
        f"{windows} window(s) of {width} tokens, of which the last {file.scored} are scored; the interval speaks of "
        f"windows of this text, not of other text",
        f"the file holds ids and no token strings: that p had the tokenizer of {q.name} cannot be checked beyond the "
        f"{file.size} ids",
    ]
    if open_ended:
        notes.append(
            "tokens at the floor are one bucket in both laws, which can only lower a divergence: the headline, the "
            "reverse KL, the total variation and the entropy of p are lower bounds"
        )
    notes.append(
        "every window is read as it is stored, without a token that begins texts"
        if first is None
        else f"every window is read with {q.pieces([first])[0]!r} in place of its first token, as llama.cpp does for "
        f"models that begin texts with it"
    )
    drawn = int(laws.drawn_floored.sum())
    if drawn:
        notes.append(
            f"{drawn} token(s) of the text are at the floor, where p gives them at most what is stored: the perplexity "
            f"under p is a lower bound, and log-ratios are upper bounds there"
        )
    if q.vocabulary.size > file.size:
        notes.append(
            f"{q.vocabulary.size - file.size} rows of {q.name} that no token belongs to are impossible under p; q "
            f"gives them {float(laws.outside.mean()):.1e} on average, which the divergence counts"
        )
    return (*notes, *(f"{q.name}: {note}" for note in getattr(q, "notes", ())))


def provenance(file: LlamaCppFile, q: LanguageModel, settings: Settings) -> dict[str, Any]:
    """What the number depends on: versions, ``q``'s digests, and what can be said of the file."""
    env = environment(settings, q=q)
    ids = hashlib.sha256(file.tokens.numpy().tobytes()).hexdigest()[:16]
    windows, width = file.tokens.shape
    stored = {
        "name": f"{file.path.name} (llama.cpp base logits)",
        "dtype": "16-bit codes",
        "vocabulary": "unknown",
        "vocabulary_size": file.size,
        "weights": "unknown",
    }
    about = {"file": str(file.path.resolve()), "windows": windows, "tokens": width, "ids": ids}
    return {**env, "models": {"p": stored, **env["models"]}, "files": {"llamacpp": about}}
