"""Quantiles and tails of Student's t, to near machine precision, with NumPy alone."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(64)
TAIL_NODES, TAIL_WEIGHTS = np.polynomial.legendre.leggauss(24)
BLOCK = 4096  # tails integrated at a time


@lru_cache(maxsize=1024)
def student_quantile(probability: float, df: float | int) -> float:
    """``F⁻¹(probability)`` of Student's t with ``df`` degrees of freedom.

    With ``t = √df tan θ`` the distribution function is ``½ + c ∫₀^θ cos^(df−1)``: a smooth integrand on a
    short range, which 64 Gauss-Legendre nodes integrate to rounding error. It is concave in ``θ``, so
    Newton's iteration from zero climbs to the quantile without overshooting.

    Raises:
        ValueError: ``probability`` is not strictly between 0 and 1, or ``df`` is below 1.

    Example:
        >>> round(student_quantile(0.975, 9), 6), round(student_quantile(0.975, math.inf), 6)
        (2.262157, 1.959964)
    """
    if not (0 < probability < 1 and df >= 1):
        raise ValueError(
            f"expected a probability strictly between 0 and 1 and at least 1 degree of freedom, "
            f"got {probability} and {df}; check the level and the number of clusters"
        )
    if probability < 0.5:
        return -student_quantile(1 - probability, df)
    if math.isinf(df):
        return NormalDist().inv_cdf(probability)
    target, constant = probability - 0.5, math.exp(_log_gamma_ratio(df)) / math.sqrt(math.pi)
    angle = 0.0
    for _ in range(200):
        half = angle / 2
        # log cos through log1p: the power of a cosine near one loses digits in proportion to df.
        log_cosine = 0.5 * np.log1p(-(np.sin(half * (NODES + 1)) ** 2))
        area = constant * half * float(NODE_WEIGHTS @ np.exp((df - 1) * log_cosine))
        step = (target - area) / (constant * math.exp((df - 1) * 0.5 * math.log1p(-(math.sin(angle) ** 2))))
        angle += step
        if step <= 1e-15 * angle:
            break
    return math.sqrt(df) * math.tan(angle)


def student_tail(t: float, df: float | int) -> float:
    """``P(T > t)`` of Student's t with ``df`` degrees of freedom, to a relative 1e-10 for whole ``df``, in any tail.

    Raises:
        ValueError: ``df`` is below 1, or ``t`` is NaN.

    Example:
        >>> round(student_tail(2.262157, 9), 6), student_tail(0.0, 3)
        (0.025, 0.5)
    """
    return float(student_tails(np.array([t], dtype=np.float64), df)[0])


def student_tails(t: NDArray[np.float64], df: float | int) -> NDArray[np.float64]:
    """``P(T > t)`` for many ``t`` at once; shapes ``(m,)`` to ``(m,)``.

    Raises:
        ValueError: as :func:`student_tail`.

    Example:
        >>> student_tails(np.array([-math.inf, 0.0, 2.262157]), 9).round(6).tolist()
        [1.0, 0.5, 0.025]
    """
    if not df >= 1 or np.isnan(t).any():
        raise ValueError(f"expected numbers and at least 1 degree of freedom, got {t} and {df}")
    size = np.abs(t)
    if math.isinf(df):
        tails = np.array([0.5 * math.erfc(x / math.sqrt(2)) for x in size])
    else:
        blocks = [_tails(size[first : first + BLOCK], df) for first in range(0, len(size), BLOCK)]
        tails = np.concatenate([np.zeros(0), *blocks])
    return np.where(t > 0, tails, np.where(t == 0, 0.5, 1 - tails))


def _tails(t: NDArray[np.float64], df: float | int) -> NDArray[np.float64]:
    """The same for ``t ≥ 0`` and a finite ``df``."""
    angle = np.arctan(t / math.sqrt(df))[:, None]
    # Beyond this the integrand has fallen below e^-40 of what it is at the edge; the pieces follow its decay.
    reach = np.minimum(math.pi / 2 - angle, 40 / (math.sqrt(df) * np.maximum(t, 1.0)[:, None]))
    edges = angle + reach * np.array([0.0, 0.1, 0.3, 0.6, 1.0])
    half, middle = np.diff(edges)[..., None] / 2, (edges[:, 1:, None] + edges[:, :-1, None]) / 2
    log_cosine = np.log(np.maximum(np.cos(middle + half * TAIL_NODES), 1e-300))
    area = (half * TAIL_WEIGHTS * np.exp((df - 1) * log_cosine)).sum((1, 2))
    return np.asarray(math.exp(_log_gamma_ratio(df)) / math.sqrt(math.pi) * area)


def _log_gamma_ratio(df: float | int) -> float:
    """``log Γ((df+1)/2) − log Γ(df/2)``, by its expansion where the two would cancel."""
    if df < 200:
        return math.lgamma((df + 1) / 2) - math.lgamma(df / 2)
    return 0.5 * math.log(df / 2) - 1 / (4 * df) + 1 / (24 * df**3) - 1 / (20 * df**5)
