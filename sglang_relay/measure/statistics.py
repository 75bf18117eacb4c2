"""Figures over cases, with bootstrap confidence intervals: cases are drawn with replacement, the seed is fixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 4000
CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A figure and the ends of its confidence interval (percentiles of the bootstrap)."""

    value: float
    low: float
    high: float


class Summary(NamedTuple):
    """Over ``cases`` values; ``p90`` is the 0.9 quantile, interpolated linearly."""

    cases: int
    mean: Estimate
    median: Estimate
    p90: Estimate
    max: float


class Paired(NamedTuple):
    """Two policies on the same cases: the mean of first - second, and the share of cases with the first below the
    second."""

    difference: Estimate
    below: float


def summarise(values: Sequence[float], *, draws: int = DRAWS, seed: int = 0) -> Summary:
    """ValueError for no values."""
    x = _column(values)
    rows = _draws(len(x), draws, seed)
    return Summary(
        len(x),
        _estimate(lambda drawn: x[drawn].mean(axis=-1), rows),
        _estimate(lambda drawn: np.median(x[drawn], axis=-1), rows),
        _estimate(lambda drawn: np.quantile(x[drawn], 0.9, axis=-1), rows),
        float(x.max()),
    )


def paired(first: Sequence[float], second: Sequence[float], *, draws: int = DRAWS, seed: int = 0) -> Paired:
    """ValueError for no values or for lists of different lengths."""
    a, b = _pair(first, second)
    rows = _draws(len(a), draws, seed)
    return Paired(_estimate(lambda drawn: (a - b)[drawn].mean(axis=-1), rows), float((a < b).mean()))


def gap_closed(values: Sequence[float], baseline: Sequence[float], *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Share of the baseline's mean that a policy removes, on the same cases: 1 - mean(values) / mean(baseline)."""
    a, b = _pair(values, baseline)
    return _estimate(lambda drawn: 1.0 - a[drawn].mean(axis=-1) / b[drawn].mean(axis=-1), _draws(len(a), draws, seed))


def _column(values: Sequence[float]) -> np.ndarray:
    x = np.asarray(values, dtype=np.float64)
    if not x.size:
        raise ValueError("no values")
    return x


def _pair(first: Sequence[float], second: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    a, b = _column(first), _column(second)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} values against {b.size}: the cases differ")
    return a, b


def _draws(cases: int, draws: int, seed: int) -> np.ndarray:
    """int64 [draws, cases], indices of cases."""
    return np.random.default_rng(seed).integers(0, cases, size=(draws, cases))


def _estimate(statistic: Callable[[np.ndarray], np.ndarray], rows: np.ndarray) -> Estimate:
    """``statistic`` turns indices of cases [..., cases] into figures [...]."""
    tail = (1.0 - CONFIDENCE) / 2
    low, high = np.quantile(statistic(rows), [tail, 1.0 - tail])
    return Estimate(float(statistic(np.arange(rows.shape[1]))), float(low), float(high))
