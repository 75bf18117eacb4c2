"""Whether relaying one prompt is predicted to save time (architecture.md, "What must hold on a GPU server").

The seconds of a forward are linear in its features, with coefficients that are never negative:

    stock   passes * stock_pass + rows * stock_row + pairs * stock_pair
    relay   passes * relay_pass + rows * relay_row + pairs * relay_pair + placed * relay_place + idle * relay_idle

Start values come from a calibration (``calibrate``), later ones from forwards that were served (``observe``): a robust
fit over the recent ones, held to the start values where those say nothing. The start values are taken at the speed of
the recent forwards: a machine that became slower is slower in what was not measured, too.

``idle`` are the rows that a relay pass has less than ``KNEE``: passes are launched eagerly, and on a GPU a short one
costs the host's time whatever its rows, a long one hides it.

Tensor parallel: ``saves`` reads only the published coefficients. Every rank calls ``observe`` for the same forwards;
where that returns True (the same call on all ranks), rank 0 calls ``publish`` and broadcasts what it returns, and the
others ``load`` it. Ranks measure different seconds, which enter no decision otherwise. There is no clock and no
randomness in here.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import nnls

PUBLISH_EVERY = 64
"""Measured forwards from one publication to the next; before the first of them, ``_EARLY`` ones."""
_EARLY = (8, 16, 32)
KNEE = 512
"""Rows from which a pass is taken to keep the device busy: of an 8B model on an H100, about what 13-15 ms of host time
hide."""
WINDOW = 128
"""Forwards of each path that are remembered."""
HALF_LIFE = 256
"""A remembered forward counts half after this many later ones, of either path: what was learnt of a path that is no
longer taken gives way to its start values, at the speed that the other path now has."""
TRIAL_EVERY = 256
"""One in so many prompts that would be declined is relayed, to notice that the relay path has become faster."""
MARGIN = 0.05
"""Share of the stock time that relay must be predicted to save."""
CALIBRATION_SECONDS = 2.0

_OUTLIER = 0.15
"""Relative error beyond which a forward pulls no harder (Huber): one that took ten times as long moves nothing,
behaviour that lasts does, once it is the larger part of what is remembered."""
_LOOSE, _FIRM = 1e-3, 0.1
"""Weight, in forwards, of the start values before and after a calibration."""
_ROUNDS = 12
_FASTEST, _SLOWEST = 1e-6, 1e4
"""Seconds; what is outside is no measurement."""


class Features(NamedTuple):
    """What the time of a forward depends on.

    path: who runs it. passes: times the layers are launched. rows: tokens computed, in units of all layers (a token
    that runs half of the layers is half a row). pairs: keys that these rows see, summed. placed: tokens whose KV is
    copied.
    """

    path: Literal["stock", "relay"]
    passes: float
    rows: float
    pairs: float
    placed: float = 0.0


class Coefficients(NamedTuple):
    """Seconds per pass, row, pair, placed token and missing row."""

    stock_pass: float
    stock_row: float
    stock_pair: float
    relay_pass: float
    relay_row: float
    relay_pair: float
    relay_place: float
    relay_idle: float


_ROW = 1e-4
PRIOR = Coefficients(64 * _ROW, _ROW, _ROW / 2**14, 64 * _ROW, _ROW, _ROW / 2**14, _ROW / 100, _ROW / 50)
"""Before anything is measured: a pass costs as much as 64 rows and no more on the relay path than on the stock path, so
that only what is hopeless is declined (repairing nearly everything, or a second pass for a few dozen tokens). The
decision depends on ratios only; the unit lies between a GPU's and a CPU's."""


def pairs_of(start: int, stop: int) -> int:
    """Keys that rows at prompt positions ``[start, stop)`` see: a row at position p sees p + 1."""
    return (stop * (stop + 1) - start * (start + 1)) // 2


def stock_features(prefix: int, stop: int, chunk: int | None = None) -> Features:
    """Stock prefill of prompt positions ``[prefix, stop)``. chunk: most rows of one forward; None: no limit."""
    rows = stop - prefix
    return Features("stock", _chunks(rows, chunk), rows, pairs_of(prefix, stop))


def relay_features(
    prefix: int,
    stop: int,
    reused: Iterable[tuple[int, int]],
    repair: float,
    *,
    exact: Iterable[tuple[int, int]] = (),
    probe_rows: int = 0,
    chunk: int | None = None,
) -> Features:
    """Relayed prefill of prompt positions ``[prefix, stop)``.

    reused, exact: disjoint ranges inside it that are copied; those of ``reused`` are repaired. repair: expected share
    of the layers of a reused token that run again, in [0, 1] (``Policy.expected_share``): 0 for ``rotate``, 1 for
    ``full``, for a staged policy its first layers and the selected share of the others. probe_rows: rows of a probe
    pass at the prompt's end, 0 for policies without one. chunk: as in ``stock_features``; what is copied counts, too.
    """
    rows, pairs, placed = float(stop - prefix), float(pairs_of(prefix, stop)), 0
    for ranges, skipped in ((reused, 1.0 - repair), (exact, 1.0)):
        for a, b in ranges:
            rows -= skipped * (b - a)
            pairs -= skipped * pairs_of(a, b)
            placed += b - a
    passes = _chunks(stop - prefix, chunk) + (probe_rows > 0)
    return Features("relay", passes, rows + probe_rows, pairs + pairs_of(stop - probe_rows, stop), placed)


def together(features: Sequence[Features]) -> Features:
    """One forward over several requests: their work adds up, their passes are shared. A batch in which one request is
    relayed runs on the relay path. ``features`` is not empty."""
    path = "relay" if any(f.path == "relay" for f in features) else "stock"
    _, passes, rows, pairs, placed = zip(*features, strict=True)
    return Features(path, max(passes), sum(rows), sum(pairs), sum(placed))


def _chunks(rows: int, chunk: int | None) -> int:
    return 1 if chunk is None else max(1, -(-rows // chunk))


class CostModel:
    """start, firm: start values, and whether they were measured on this machine."""

    def __init__(self, start: Coefficients = PRIOR, *, firm: bool = False) -> None:
        self._start = start
        self._hold = _FIRM if firm else _LOOSE
        self._published = start
        self._seen = 0
        # number of the forward, its features as a row of the fit, seconds
        self._recent: dict[str, deque[tuple[int, np.ndarray, float]]] = {
            path: deque(maxlen=WINDOW) for path in ("stock", "relay")
        }

    def predict(self, features: Features) -> float:
        """Seconds, from the published coefficients."""
        return float(_row(features) @ self._published)

    def saves(self, stock: Features, relay: Features, margin: float = MARGIN, ticket: int | None = None) -> bool:
        """Whether relay is predicted to take at most ``1 - margin`` of the stock time.

        ticket: a number that all ranks share and that spreads evenly (a hash of the request's id). One in
        ``TRIAL_EVERY`` is relayed whatever is predicted: without relayed forwards there is nothing to learn from.
        """
        if ticket is not None and ticket % TRIAL_EVERY == 0:
            return True
        return self.predict(relay) <= (1.0 - margin) * self.predict(stock)

    def observe(self, features: Features, seconds: float) -> bool:
        """Take in a forward that was served; True when it is time to publish. It changes no decision before that.

        What is no measurement (times or features that are not a number, negative, all zero) is counted only.
        """
        self._seen += 1
        row = _row(features)
        if _FASTEST <= seconds <= _SLOWEST and np.isfinite(row).all() and row.min() >= 0 and row.any():
            self._recent[features.path].append((self._seen, row, seconds))
        return publishes_at(self._seen)

    def publish(self) -> Coefficients:
        """Fit what was observed; decisions use the result from now on. Returns it for the other ranks."""
        samples = [*self._recent["stock"], *self._recent["relay"]]
        if samples:
            numbers, rows, seconds = zip(*samples, strict=True)
            weights = 0.5 ** ((self._seen - np.array(numbers)) / HALF_LIFE)
            # A solver that gives up leaves what is published: the other ranks wait for an answer.
            with contextlib.suppress(RuntimeError):
                self._published = _fit(np.stack(rows), np.array(seconds), weights, self._start, self._hold)
        return self._published

    def state(self) -> Coefficients:
        """What is published, for reports."""
        return self._published

    def load(self, state: Sequence[float]) -> None:
        """Publish what another rank has published. Raises ValueError unless these are eight finite coefficients, none
        of them negative."""
        values = [float(v) for v in state]
        if len(values) != len(PRIOR) or not all(math.isfinite(v) and v >= 0 for v in values):
            raise ValueError(f"{values}: not {len(PRIOR)} finite coefficients >= 0")
        self._published = Coefficients(*values)


def publishes_at(seen: int) -> bool:
    """Whether it is time to publish after so many observed forwards."""
    return seen % PUBLISH_EVERY == 0 or seen in _EARLY


def fit(samples: Sequence[tuple[Features, float]]) -> Coefficients:
    """Start values from (features, seconds) of a calibration; all of them positive, ``PRIOR`` without samples."""
    if not samples:
        return PRIOR
    rows = np.stack([_row(features) for features, _ in samples])
    seconds = np.array([s for _, s in samples])
    weights = np.ones(len(samples))
    found = np.array(_fit(rows, seconds, weights, PRIOR, _LOOSE))
    # What few samples make zero is small, not nothing: later fits work in multiples of the start values.
    least = 0.02 * _speed(rows @ np.array(PRIOR), rows @ found, weights) * np.array(PRIOR)
    return Coefficients(*np.maximum(found, least).tolist())


class Shape(NamedTuple):
    """A pass to time: ``rows`` tokens behind ``context`` tokens of one request, all layers; or, without rows, the copy
    of ``placed`` tokens."""

    path: Literal["stock", "relay"]
    rows: int
    context: int
    placed: int = 0

    def features(self) -> Features:
        pairs = pairs_of(self.context, self.context + self.rows)
        return Features(self.path, float(self.rows > 0), self.rows, pairs, self.placed)


def calibration_shapes() -> tuple[Shape, ...]:
    """What to time at start-up, cheapest first."""
    ladder = ((16, 0), (64, 0), (64, 2048), (256, 0), (512, 2048), (2048, 0))
    passes = [Shape(path, *step) for step in ladder for path in ("stock", "relay")]
    return (*passes[:4], Shape("relay", 0, 0, 1024), *passes[4:])


def calibrate(measure: Callable[[Shape], float], budget: float = CALIBRATION_SECONDS) -> CostModel:
    """A model with start values of this machine, from timing as many shapes as fit into ``budget`` seconds.

    measure: seconds of one shape, warmed up (compiling is not what a forward costs); NaN where it cannot run. A shape
    is timed only if it still fits when it takes twice as long as those before it predict. Then all are timed again as
    long as there is budget, and the shorter time counts. Which shapes are timed depends on the times, so with tensor
    parallelism ``measure`` must return rank 0's on every rank: they run the same passes then, and start alike.
    """
    best: dict[Shape, float] = {}
    spent = 0.0
    for shape in calibration_shapes() * 2:
        features = shape.features()
        expected = _row(features) @ np.array(fit([(s.features(), t) for s, t in best.items()]))
        if spent + 2.0 * expected > budget:
            continue
        seconds = measure(shape)
        if _FASTEST <= seconds <= _SLOWEST:
            spent += seconds
            best[shape] = min(seconds, best.get(shape, math.inf))
    return CostModel(fit([(s.features(), t) for s, t in best.items()]), firm=bool(best))


def _row(features: Features) -> np.ndarray:
    """float64 [8]: the features, each at its coefficient."""
    path, passes, rows, pairs, placed = features
    if path == "stock":
        return np.array((passes, rows, pairs, 0.0, 0.0, 0.0, 0.0, 0.0))
    return np.array((0.0, 0.0, 0.0, passes, rows, pairs, placed, max(0.0, passes * KNEE - rows)))


def _fit(rows: np.ndarray, seconds: np.ndarray, weights: np.ndarray, start: Coefficients, hold: float) -> Coefficients:
    """Coefficients >= 0 that minimise the Huber loss of the relative errors.

    rows: float64 [n, 8]; seconds, weights: float64 [n]. Unknown are the multiples x of the start values, which are
    first brought to the speed of the data; ``hold * (x - 1)^2`` is added for each. The problem is convex: its solution
    depends on nothing but the data. Solved by reweighting (Huber 1964).
    """
    at_speed = np.array(start) * _speed(rows @ np.array(start), seconds, weights)
    relative = rows * at_speed / seconds[:, None]
    size = len(start)
    held = np.sqrt(hold) * np.eye(size)
    pull = np.ones(len(rows))
    found = np.ones(size)
    for _ in range(_ROUNDS):
        scale = np.sqrt(weights * pull)
        matrix = np.concatenate((relative * scale[:, None], held))
        found, _ = nnls(matrix, np.concatenate((scale, np.diag(held))), maxiter=100 * size)
        pull = np.minimum(1.0, _OUTLIER / np.maximum(np.abs(relative @ found - 1.0), 1e-12))
    return Coefficients(*(found * at_speed).tolist())


def _speed(expected: np.ndarray, seconds: np.ndarray, weights: np.ndarray) -> float:
    """Weighted median of ``seconds / expected``: how much slower than its start values the machine is."""
    ratios = seconds / expected
    order = np.argsort(ratios, kind="stable")
    reached = np.cumsum(weights[order])
    return float(ratios[order[np.searchsorted(reached, reached[-1] / 2)]])
