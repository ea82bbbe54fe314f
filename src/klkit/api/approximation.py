"""What one tokenisation of each text says of two models with different tokenizers, and how far it is from a divergence.

The number is ``E_p[log p(tokens) − log q(canonical tokens of the text)]``. With ``KL`` that of the laws of texts,

    number = KL − H_p(tokens | text) + E_p[log q(text) − log q(canonical tokens of the text)],

two errors of which neither is negative and whose signs are opposite. Over samples that ``p``'s own tokenizer would have
written so, ``p`` conditional on that has one tokenisation a text: there the first error is gone, and the number, with
the logarithm of their share taken away, is above the divergence of that model's texts.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from klkit.results import NATS_PER_BIT, plain
from klkit.stats.intervals import clustered_ratio

SCHEMA = "klkit.approximation/1"
MEANING = (
    "not the KL of the texts, but that minus H(tokens of p | text), what p's tokens hold beyond their text, plus "
    "E[log q(text) − log q(canonical)], what q gives to other tokenisations: two errors of opposite sign, neither "
    "negative; ± is the sampling error alone"
)
BOUND = (
    "from canonical samples alone: above the KL(p‖q) of the texts of a p that writes only in its tokenizer's own way "
    "(drawn again until it does), but for the sampling error"
)
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Texts:
    """What two models make of texts that ``p`` wrote; every field has one entry a string, ``(n,)``.

    Attributes:
        logp: ``log p(tokens)``, nats.
        logq: ``log q(canonical tokens of their text)``, nats; NaN where there are none.
        sizes: bytes of the text.
        cluster: the independent unit.
        valid: whether its bytes are valid UTF-8.
        written: whether q's tokenizer has tokens that spell the text.
        canonical: whether p's tokenizer would have written the text in the tokens that were drawn.
        finished: whether the string ended by itself.
    """

    logp: Array
    logq: Array
    sizes: NDArray[np.int64]
    cluster: NDArray[np.int64]
    valid: NDArray[np.bool_]
    written: NDArray[np.bool_]
    canonical: NDArray[np.bool_]
    finished: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Reading:
    """A number with the standard error of its sampling, clustered by the independent unit; NaN where there is none."""

    value: float
    stderr: float

    @classmethod
    def ratio(cls, contributions: Array, weights: Array, cluster: NDArray[np.int64]) -> Reading:
        """``Σ contributions / Σ weights``; undefined without any weight.

        Example:
            >>> Reading.ratio(np.array([1.0, 3.0]), np.ones(2), np.arange(2))
            Reading(value=2.0, stderr=1.0)
        """
        if not weights.sum() > 0:
            return cls(math.nan, math.nan)
        return cls(*clustered_ratio(contributions, weights, cluster))

    def scaled(self, factor: float) -> Reading:
        """The same in another unit."""
        return Reading(self.value * factor, self.stderr * factor)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; the error by its name."""
        found: dict[str, Any] = plain({"value": self.value, "sampling_stderr": self.stderr})
        return found


@dataclass(frozen=True, slots=True)
class Approximation:
    """The canonical-tokenisation number of two models with different tokenizers; all in nats but the bits.

    Attributes:
        p: name of the model that wrote the texts.
        q: name of the model compared with it.
        per_response: ``E_p[log p(tokens) − log q(canonical tokens)]``.
        per_byte: its ratio to the expected number of bytes.
        upper_bound: the same from canonical samples, with the logarithm of their share taken away; NaN without any.
        bits_p: bits per byte of ``p`` on the same samples, as it wrote them.
        bits_q: bits per byte of ``q``.
        noncanonical: share of the samples that p's own tokenizer would write in other tokens.
        invalid: share whose bytes are no valid UTF-8, which are left out.
        unwritten: share of valid texts that q's tokenizer changes, which are left out as well.
        cut: share that was cut at the length limit.
        n: samples.
        clusters: independent units.
        max_tokens: longest response.
        unit: nats or bits, for printing.
        notes: what else a reader must be told.
        settings: the resolved options.
        provenance: models, precisions, versions, digests.
    """

    p: str
    q: str
    per_response: Reading
    per_byte: Reading
    upper_bound: Reading
    bits_p: Reading
    bits_q: Reading
    noncanonical: float
    invalid: float
    unwritten: float
    cut: float
    n: int
    clusters: int
    max_tokens: int
    unit: str = "nats"
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] | None = None

    @property
    def scale(self) -> float:
        """What nats are multiplied by for printing."""
        return 1 / NATS_PER_BIT if self.unit == "bits" else 1.0

    @property
    def lines(self) -> dict[str, str]:
        """What must be said beside the numbers, by name."""
        said = {"it is": MEANING, "bound": BOUND}
        if math.isnan(self.upper_bound.value):
            said["bound"] = "none: no sample is written as p's own tokenizer writes it"
        said["samples"] = f"{self.n}, {self.noncanonical:.1%} of them not canonical under p's own tokenizer"
        if self.invalid:
            said["left out"] = f"{self.invalid:.1%} whose bytes are no valid UTF-8"
        if self.unwritten:
            more = f"{self.unwritten:.1%} that q's tokenizer changes"
            said["left out"] = f"{said['left out']}, {more}" if self.invalid else more
        if self.cut:
            said["cut"] = (
                f"{self.cut:.1%} at {self.max_tokens} tokens: of those the text up to the cut counts, and what is said "
                f"of the two errors and of the bound holds for whole responses only"
            )
        return said

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values under a versioned schema; divergences in the printing unit, bits in bits."""
        return {
            "schema": SCHEMA,
            "p": self.p,
            "q": self.q,
            "unit": self.unit,
            "sentence": str(self),
            "approximate": {
                "per_response": self.per_response.scaled(self.scale).to_dict(),
                "per_byte": self.per_byte.scaled(self.scale).to_dict(),
            },
            "upper_bound_of_canonicalised_p": {"per_response": self.upper_bound.scaled(self.scale).to_dict()},
            "bits_per_byte": {"p": self.bits_p.to_dict(), "q": self.bits_q.to_dict()},
            "shares": {
                "noncanonical": self.noncanonical,
                "invalid_utf8": self.invalid,
                "changed_by_q": self.unwritten,
                "cut": self.cut,
            },
            "n_sequences": self.n,
            "n_clusters": self.clusters,
            "lines": self.lines,
            "notes": list(self.notes),
            "settings": plain(self.settings or {}),
            "provenance": plain(self.provenance or {}),
        }

    def __str__(self) -> str:
        value, byte = self.per_response.scaled(self.scale), self.per_byte.scaled(self.scale)
        return (
            f"Approximately {value.value:.4g} {self.unit} per response, {byte.value:.4g} per byte, sampling error "
            f"± {value.stderr:.2g}, between the texts of p = {self.p} and q = {self.q}, from {self.n} responses of p "
            f"of at most {self.max_tokens} tokens, each in its canonical tokens under q: off by two errors of opposite "
            f"sign that are not in the ±."
        )

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(str(self))}</p>"


def approximation(texts: Texts, *, p: str, q: str, max_tokens: int, **rest: Any) -> Approximation:
    """``E_p[log p(tokens) − log q(canonical tokens)]`` and what belongs to it, from texts that ``p`` wrote.

    The upper bound is ``E[log p − log q | canonical] − log Z``, ``Z`` the share of the canonical samples: drawing until
    one is canonical has the law ``p(tokens)/Z``, in which every text has one tokenisation. With several prompts it is
    of the pair of prompt and response, and so the more above the mean over prompts the more that share differs
    between them.

    Args:
        rest: further fields of the result.

    Raises:
        ValueError: no text is left, or ``p`` gives one of them no probability.

    Example:
        >>> logs = np.log([0.5, 0.25, 0.125])
        >>> yes, none = np.ones(3, dtype=bool), np.zeros(3, dtype=bool)
        >>> texts = Texts(logs, logs - 1, np.array([1, 2, 4]), np.arange(3), yes, yes, yes, yes)
        >>> found = approximation(texts, p="one", q="two", max_tokens=8)
        >>> found.per_response.value, found.upper_bound.value, found.noncanonical
        (1.0, 1.0, 0.0)
    """
    n = len(texts.logp)
    kept = texts.valid & texts.written
    if not kept.any():
        raise ValueError(
            f"expected texts in UTF-8 that the tokenizer of {q} writes as they are, got none among {n} responses of "
            f"{p} ({int((~texts.valid).sum())} are no UTF-8); compare the models over bytes: bytes=True, --bytes"
        )
    if not np.isfinite(texts.logp).all():
        raise ValueError(
            f"expected texts that {p} can write, got {int((~np.isfinite(texts.logp)).sum())} that it gives no "
            f"probability; draw them from it"
        )
    cluster, sizes = texts.cluster[kept], texts.sizes[kept].astype(np.float64)
    gap = np.where(kept, texts.logp - texts.logq, 0.0)
    ones = np.ones(len(cluster))
    return Approximation(
        p,
        q,
        per_response=Reading.ratio(gap[kept], ones, cluster),
        per_byte=Reading.ratio(gap[kept], sizes, cluster),
        upper_bound=rejected(gap, texts.canonical & kept, texts.cluster),
        bits_p=Reading.ratio(-texts.logp[kept] / NATS_PER_BIT, sizes, cluster),
        bits_q=Reading.ratio(-texts.logq[kept] / NATS_PER_BIT, sizes, cluster),
        noncanonical=float(1 - texts.canonical.mean()),
        invalid=float(1 - texts.valid.mean()),
        unwritten=float((texts.valid & ~texts.written).mean()),
        cut=float(1 - texts.finished.mean()),
        n=n,
        clusters=len(np.unique(texts.cluster)),
        max_tokens=max_tokens,
        **rest,
    )


def rejected(gap: Array, accepted: NDArray[np.bool_], cluster: NDArray[np.int64]) -> Reading:
    """``E[gap | accepted] − log P(accepted)``, with its linearised standard error; undefined if nothing is accepted.

    Shapes: three of ``(n,)`` to a number in the unit of ``gap``, nats.

    Source: the delta method, with clusters as in :func:`klkit.stats.intervals.ratio_stderr`.

    Example:
        >>> found = rejected(np.array([1.0, 1.0, 9.0, 9.0]), np.array([True, True, False, False]), np.arange(4))
        >>> round(found.value - math.log(2), 12)
        1.0
    """
    share = float(accepted.mean())
    if not share:
        return Reading(math.nan, math.nan)
    mean = float(gap[accepted].mean())
    if not math.isfinite(mean):
        return Reading(mean, math.nan)
    slope = np.where(accepted, gap - mean, 0.0) - (accepted - share)
    _, spread = clustered_ratio(slope / share, np.ones(len(gap)), cluster)
    return Reading(mean - math.log(share), spread)
