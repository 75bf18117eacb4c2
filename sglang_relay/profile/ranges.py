"""The paper's layer-range profiler (arXiv 2603.13289, offline part), with the cases in which its rules have no answer.

Layers are counted from 0; a range is inclusive, as in ``config.LayerRange``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sglang_relay.config import LayerRange
from sglang_relay.profile.deviation import rank_correlations

SHALLOW = 0.99
"""Mean similarity from which a layer counts as unchanged (the paper's threshold for ``L_start``)."""
TAIL = 5
"""Last layers that show where the deep similarity settles (T)."""
STABLE = 2
"""Settled layers that must follow ``L_end`` (C)."""
STEP = 2.0
"""Largest step between settled layers, in standard deviations of the tail."""
RECOVERED = 0.5
"""Share of the lost similarity that the tail must have regained to count as a recovery. The paper's rule alone takes a
model that stays deviant for one that has settled at once, and would stop the repair where deviation is greatest."""
SETTLED_RANKS = 0.9
"""Rank correlation between adjacent layers from which the ranking of tokens is stable (the paper: above .9)."""
NOISE = 2.0
"""Standard errors that the curvature must exceed to be more than sampling noise."""


class Ranges(NamedTuple):
    """layers: the range. start, detect, end: why it is so, one sentence each. similarity, rho, curvature: float64
    [layers], the curves they follow from; NaN where undefined (rho: layer 0; curvature: layers 0 to 2)."""

    layers: LayerRange
    start: str
    detect: str
    end: str
    similarity: np.ndarray
    rho: np.ndarray
    curvature: np.ndarray


def find_ranges(field: np.ndarray) -> Ranges:
    """The layer range of a deviation field, [tokens, layers] (`deviation`).

    ValueError for fewer than 3 tokens, no layers, or a field that is not finite.
    """
    if field.ndim != 2 or field.shape[0] < 3 or field.shape[1] < 1 or not np.isfinite(field).all():
        raise ValueError(f"a field of shape {field.shape}: expected finite values, [3 or more tokens, layers]")
    field = field.astype(np.float64)
    similarity = 1.0 - field.mean(axis=0)
    rho = rank_correlations(field)
    curvature = np.full(len(rho), np.nan)
    curvature[2:] = rho[2:] - 2 * rho[1:-1] + rho[:-2]
    start, why_start = _start(similarity)
    end, why_end = _end(similarity, start)
    detect, why_detect = _detect(rho, curvature, start, end, len(field))
    return Ranges(LayerRange(start, detect, end), why_start, why_detect, why_end, similarity, rho, curvature)


def _start(similarity: np.ndarray) -> tuple[int, str]:
    shallow = similarity >= SHALLOW
    if shallow.all():
        return 0, f"no layer deviates: all have similarity {similarity.min():.4f} or more"
    run = int(np.argmin(shallow))
    if run == 0:
        return 0, f"no shallow run: the first layer's similarity is {similarity[0]:.4f}, below {SHALLOW}"
    return run - 1, f"last of the first {run} layers with similarity {SHALLOW} or more"


def _end(similarity: np.ndarray, start: int) -> tuple[int, str]:
    last = len(similarity) - 1
    lowest = start + int(np.argmin(similarity[start:]))
    tail = similarity[-TAIL:]
    mean, sigma = float(tail.mean()), max(float(tail.std()), 1e-6)
    lost, regained = 1.0 - similarity[lowest], mean - similarity[lowest]
    if lost < 1.0 - SHALLOW:
        return last, "no layer deviates, so none recovers"
    if regained < RECOVERED * lost:
        share = 100 * regained / lost
        return last, f"no recovery: the last {len(tail)} layers regain {share:.0f} % of what layer {lowest} has lost"
    steps = np.abs(np.diff(similarity, prepend=similarity[:1]))
    settled = (similarity >= mean - sigma) & (steps < STEP * sigma)
    for layer in range(lowest, last - STABLE + 1):
        if settled[layer + 1 : layer + 1 + STABLE].all():
            bound = f"{mean - sigma:.4f}"
            return layer, f"the next {STABLE} layers are settled at {bound} or more; lowest is layer {lowest}"
    return last, f"no {STABLE} settled layers follow layer {lowest}"


def _detect(rho: np.ndarray, curvature: np.ndarray, start: int, end: int, tokens: int) -> tuple[int, str]:
    error = _curvature_error(rho, tokens)
    for layer in range(start, end):
        # NaN compares false: the curvature begins at layer 3.
        if curvature[layer] > NOISE * error[layer] and curvature[layer + 1] < 0:
            return layer + 1, f"the rank correlation's curvature turns negative behind layer {layer}"
    for layer in range(max(start, 1), end + 1):
        if rho[layer] >= SETTLED_RANKS:
            return layer, f"curvature is within its noise; first layer with rank correlation {SETTLED_RANKS} or more"
    return min(start + 2, end), "curvature is within its noise and no ranking is stable: two layers behind the start"


def _curvature_error(rho: np.ndarray, tokens: int) -> np.ndarray:
    """Standard error of the curvature, [layers]. Spearman's rho has about (1 - rho^2) sqrt(1.06 / (n - 1)); three
    neighbours enter with weights 1, -2, 1."""
    variance = 1.06 * (1.0 - rho**2) ** 2 / (tokens - 1)
    error = np.full(len(rho), np.nan)
    error[2:] = np.sqrt(variance[2:] + 4 * variance[1:-1] + variance[:-2])
    return error
