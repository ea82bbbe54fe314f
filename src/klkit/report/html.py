"""One self-contained page a run: no network, no script from elsewhere, every token escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from klkit.files import write_text
from klkit.models.token_classes import FIRST, NAMES
from klkit.report.plots import estimators_figure, position_figure, strings_figure
from klkit.report.record import REPORT, RunFolder, disk_errors
from klkit.report.shards import Shown
from klkit.report.text import printable

SHADES = 8  # steps of the heat map's colour scale
LISTED = 20  # strings in plain text
SATURATED = 0.995  # quantile of the per-token KL at which the scale ends

Array = NDArray[np.float64]


def write_report(folder: RunFolder) -> Path:
    """Write ``report.html`` of a finished run and return its path.

    Raises:
        RunFolderError: the run is not finished, damaged, or the page cannot be written.
    """
    first = list(islice(folder.samples(), LISTED))
    text = render(folder.result(), folder.shown(), shade_limit(folder), folder.tokens(), first)
    path = folder.path / REPORT
    with disk_errors(folder.path):
        write_text(path, text)
    return path


def render(
    result: Mapping[str, Any], shown: Shown, limit: float, texts: Mapping[int, str], samples: list[dict[str, Any]]
) -> str:
    """The page as text.

    Args:
        limit: per-token KL at which the colour scale ends.
        samples: the first strings in plain text, shown where none is shown token by token.
        texts: readable text of every token that the page shows.
    """
    parts = result["breakdown"]
    counted = "windows" if result["headline"]["estimand"] == "F" else "responses"
    # Runs of earlier versions have fewer parts than those of this one.
    kind = {token: name for name, tokens in parts.get("token_classes", {}).items() for token in tokens}
    strings = heat_map(shown, limit, texts, kind)
    return page(
        "template.html",
        result=result,
        head=result["headline"],
        figure_estimators=estimators_figure(result),
        figure_positions=position_figure(parts["by_position"], counted) if parts["by_position"] else "",
        figure_strings=strings_figure(parts["strings"], counted) if parts["strings"] else "",
        facets={name: parts.get(name, []) for name in ("by_confidence", "by_class", "by_group")},
        strings=strings,
        kinds=kinds_of(strings),
        kind_names=NAMES,
        shades=SHADES,
        counted=counted,
        first=result["roles"][0],
        second=result["roles"][1],
        shade_limit=limit,
        samples=[] if strings else samples,
        data=embed({"top": [s["top"] for s in strings], "texts": {str(i): printable(t) for i, t in texts.items()}}),
    )


def page(template: str, **values: Any) -> str:
    """A template of this folder, filled in."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Autoescape is on for every value; only figures made here and the data block are marked safe.
    environment = Environment(
        loader=PackageLoader("klkit", "report/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number, printable=printable, percent=percent, share_of=share_of, level_of=level_of
    )
    return environment.get_template(template).render(**values)


def number(value: Any) -> str:
    """Four significant digits; infinities and missing values as signs.

    Example:
        >>> number(0.123456), number("inf"), number("nan")
        ('0.1235', '∞', '–')
    """
    value = float(value)
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.4g}"


def percent(value: Any) -> str:
    """A share in per cent.

    Example:
        >>> percent(0.1234), percent("nan")
        ('12.3\xa0%', '–')
    """
    value = float(value)
    return "–" if math.isnan(value) else f"{100 * value:.1f}\u00a0%"


def embed(data: Any) -> str:
    """JSON that may stand inside a script element: no character can close it or open another.

    Example:
        >>> embed("</script>")
        '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def heat_map(
    shown: Shown, limit: float, texts: Mapping[int, str], kind: Mapping[int, str] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """The strings shown token by token, most divergent first, each token with its shade, its kind and figures.

    Args:
        kind: of each token, by :func:`klkit.models.token_classes.token_classes`; empty where it is not known.
    """
    few, details = shown.statistics, shown.details
    kl = few.rows.kl.double().numpy()
    # The square root: KL is quadratic in the difference of two laws, so this is linear in the difference.
    shade = np.floor(SHADES * np.sqrt(np.minimum(kl / limit, 1.0)) + 0.5).astype(int)
    ratio = few.log_ratio.double().numpy()
    logp, logq = few.rows.logp.tolist(), few.rows.logq.tolist()
    likely_p = _likely(details.tokens_p, details.logp_p)
    likely_q = _likely(details.tokens_q, details.logp_q)
    found = []
    first = 0
    for i, length in enumerate(few.x.lengths.tolist()):
        inside = slice(first, first + length)
        ids = few.x.completion(i).tolist()
        found.append(
            {
                "number": int(details.string[i]),
                "prompt": printable("".join(texts.get(t, "") for t in few.x.context(i).tolist())),
                "kl": float(kl[inside].sum()),
                "ratio": float(ratio[inside].sum()),
                "finished": bool(few.x.finished[i]),
                "tokens": [
                    {
                        "text": printable(texts.get(t, f"[{t}]")),
                        "shade": int(s),
                        "breaks": texts.get(t, "").count("\n"),
                        "kind": FIRST if kind and j == 0 and kind.get(t) != "end" else kind.get(t, ""),
                    }
                    for j, (t, s) in enumerate(zip(ids, shade[inside], strict=True))
                ],
                "top": [
                    {
                        "t": ids[j],
                        "kl": number(kl[first + j]),
                        "p": number(logp[first + j]),
                        "q": number(logq[first + j]),
                        "tp": likely_p[first + j],
                        "tq": likely_q[first + j],
                    }
                    for j in range(length)
                ],
            }
        )
        first += length
    return sorted(found, key=lambda s: -s["kl"])


def kinds_of(strings: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Kinds of the tokens that are shown and what they are called, if there are several to choose from."""
    found = {token["kind"] for string in strings for token in string["tokens"]}
    return [(name, text) for name, text in NAMES.items() if name in found] if len(found) > 1 else []


def share_of(row: Mapping[str, Any]) -> str:
    """A bar from 0 to 100 % with its interval, as style properties of its two pieces.

    Example:
        >>> share_of({"share": 0.5, "share_lower": 0.25, "share_upper": "nan"})
        '--value: 50.00%; --lower: 50.00%; --upper: 50.00%'
    """
    return bar_style(*(float(row[name]) for name in ("share", "share_lower", "share_upper")))


def level_of(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The same for nats per response, in units of the longest bar of ``rows``."""
    names = ("nats_per_response", "lower", "upper")
    longest = max(v for r in rows for v in (float(r[name]) for name in names) if math.isfinite(v))
    return bar_style(*(float(row[name]) / (longest or 1.0) for name in names))


def bar_style(value: float, lower: float, upper: float) -> str:
    """Style properties of a bar of three shares of its full length; without bounds it has no whisker."""
    value = value if math.isfinite(value) else 0.0
    ends = (lower, upper) if math.isfinite(lower) and math.isfinite(upper) else (value, value)
    places = zip(("value", "lower", "upper"), (value, *ends), strict=True)
    return "; ".join(f"--{name}: {100 * min(max(x, 0.0), 1.0):.2f}%" for name, x in places)


def shade_limit(folder: RunFolder) -> float:
    """The per-token KL at which the colour scale ends: a quantile of the run, so that one outlier cannot bleach it."""
    count = sum(len(positive(part)) for part in folder.column("rows.kl"))
    return upper_quantile((positive(part) for part in folder.column("rows.kl")), count, SATURATED) if count else 1.0


def positive(kl: torch.Tensor) -> Array:
    """The divergences that are neither 0 nor infinite."""
    values: Array = kl.double().numpy()
    return values[np.isfinite(values) & (values > 0)]


def upper_quantile(parts: Iterable[Array], count: int, level: float) -> float:
    """``np.quantile`` at a high ``level`` of ``count`` values that come in parts; only those above it are kept.

    Example:
        >>> upper_quantile([np.array([3.0, 1.0]), np.array([2.0, 5.0, 4.0])], 5, 0.75)
        4.0
    """
    rank = (count - 1) * level
    wanted = count - math.floor(rank)
    largest = np.zeros(0)
    for part in parts:
        largest = np.sort(np.concatenate([largest, part]))[-wanted:]
    return float(np.interp(rank - math.floor(rank), [0.0, 1.0], largest[[0, min(1, wanted - 1)]]))


def _likely(tokens: torch.Tensor, logp: torch.Tensor) -> list[list[list[Any]]]:
    """The most probable tokens of each decision with their probabilities."""
    return [
        [[token, round(math.exp(value), 4)] for token, value in zip(*row, strict=True)]
        for row in zip(tokens.tolist(), logp.tolist(), strict=True)
    ]
