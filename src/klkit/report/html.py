"""One self-contained page a run: no network, no script from elsewhere, every token escaped."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from klkit.report.plots import estimators_figure, position_figure, strings_figure
from klkit.report.record import REPORT, Batch, RunFolder, disk_errors, write_text
from klkit.report.text import printable

SHADES = 8  # steps of the heat map's colour scale
SATURATED = 0.995  # quantile of the per-token KL at which the scale ends


def write_report(folder: RunFolder) -> Path:
    """Write ``report.html`` of a finished run and return its path.

    Raises:
        RunFolderError: the run is not finished, damaged, or the page cannot be written.
    """
    page = render(folder.result(), folder.whole(), folder.tokens(), folder.samples())
    path = folder.path / REPORT
    with disk_errors(folder.path):
        write_text(path, page)
    return path


def render(result: Mapping[str, Any], whole: Batch, texts: Mapping[int, str], samples: list[dict[str, Any]]) -> str:
    """The page as text.

    Args:
        texts: readable text of every token that the page shows.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Autoescape is on for every value; only figures made here and the data block are marked safe.
    environment = Environment(
        loader=PackageLoader("klkit", "report/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, printable=printable)
    parts = result["breakdown"]
    counted = "windows" if result["headline"]["estimand"] == "F" else "responses"
    strings = heat_map(whole, texts)
    return environment.get_template("template.html").render(
        result=result,
        head=result["headline"],
        figure_estimators=estimators_figure(result),
        figure_positions=position_figure(parts["by_position"], counted) if parts["by_position"] else "",
        figure_strings=strings_figure(parts["strings"], counted) if parts["strings"] else "",
        strings=strings,
        shades=SHADES,
        counted=counted,
        first=result["roles"][0],
        second=result["roles"][1],
        shade_limit=shade_limit(whole),
        samples=[] if strings else samples[:20],
        data=embed({"top": [s["top"] for s in strings], "texts": {str(i): printable(t) for i, t in texts.items()}}),
    )


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


def embed(data: Any) -> str:
    """JSON that may stand inside a script element: no character can close it or open another.

    Example:
        >>> embed("</script>")
        '"\\\\u003c/script\\\\u003e"'
    """
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def heat_map(whole: Batch, texts: Mapping[int, str]) -> list[dict[str, Any]]:
    """The strings shown token by token, most divergent first, each token with its shade and figures."""
    statistics, details = whole.statistics, whole.details
    if not len(details.string):
        return []
    few = statistics.select(details.string)
    kl = few.rows.kl.double().numpy()
    top = shade_limit(whole)
    # The square root: KL is quadratic in the difference of two laws, so this is linear in the difference.
    shade = np.floor(SHADES * np.sqrt(np.minimum(kl / top, 1.0)) + 0.5).astype(int)
    ratio = few.log_ratio.double().numpy()
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
                    {"text": printable(texts.get(t, f"[{t}]")), "shade": int(s), "breaks": texts.get(t, "").count("\n")}
                    for t, s in zip(ids, shade[inside], strict=True)
                ],
                "top": [
                    {
                        "t": ids[j],
                        "kl": number(kl[first + j]),
                        "p": number(few.rows.logp[first + j]),
                        "q": number(few.rows.logq[first + j]),
                        "tp": _pairs(details.tokens_p[first + j], details.logp_p[first + j]),
                        "tq": _pairs(details.tokens_q[first + j], details.logp_q[first + j]),
                    }
                    for j in range(length)
                ],
            }
        )
        first += length
    return sorted(found, key=lambda s: -s["kl"])


def shade_limit(whole: Batch) -> float:
    """The per-token KL at which the colour scale ends: a quantile of the run, so that one outlier cannot bleach it."""
    kl = whole.statistics.rows.kl.double().numpy()
    finite = kl[np.isfinite(kl) & (kl > 0)]
    return float(np.quantile(finite, SATURATED)) if len(finite) else 1.0


def _pairs(tokens: torch.Tensor, logp: torch.Tensor) -> list[list[Any]]:
    return [[int(t), round(math.exp(float(v)), 4)] for t, v in zip(tokens, logp, strict=True)]
