"""placeholder interface: see the statistics helper"""
from __future__ import annotations
from dataclasses import dataclass
import numpy as np
from numpy.typing import NDArray
from scipy import stats as _s

@dataclass(frozen=True, slots=True)
class Interval:
    level: float
    lower: float
    upper: float
    method: str

def cluster_totals(contributions, weights, cluster):
    _, inv = np.unique(cluster, return_inverse=True)
    return np.bincount(inv, contributions), np.bincount(inv, weights)

def ratio_stderr(totals, weights) -> float:
    c = len(totals)
    if c < 2:
        return float("nan")
    r = totals.sum() / weights.sum()
    return float(np.sqrt(c / (c - 1) * np.sum((totals - r * weights) ** 2)) / weights.sum())

def ratio_interval(totals, weights, *, level=0.95, method="auto", seed=0) -> Interval:
    r = totals.sum() / weights.sum(); s = ratio_stderr(totals, weights); z = 1.96
    return Interval(level, float(r - z * s), float(r + z * s), "t")
