"""What the index must find, by trying everything: O(prompt x spans), no hashes, no numba."""

from typing import NamedTuple

import numpy as np


class Span(NamedTuple):
    """One learnt donor: tokens `[start, stop)` of `path`."""

    donor: int
    tenant: object
    path: np.ndarray
    start: int
    stop: int


def maximal_runs(prompt: np.ndarray, span: Span, begin: int = 0) -> set[tuple[int, int, int]]:
    """All `(start, stop, source)`: prompt `[start, stop)` equals the path from `source` on inside the span, and neither
    end can be moved outwards (to before `begin` neither)."""
    runs = set()
    n = len(prompt)
    for diagonal in range(span.start - n + 1, span.stop - begin):
        first = max(begin, span.start - diagonal)
        last = min(n, span.stop - diagonal)
        equal = prompt[first:last] == span.path[first + diagonal : last + diagonal]
        edges = np.flatnonzero(np.diff(np.concatenate(([0], equal.astype(np.int8), [0]))))
        for start, stop in edges.reshape(-1, 2).tolist():
            runs.add((first + start, first + stop, first + start + diagonal))
    return runs


def check_runs(runs, prompt: np.ndarray, spans: list[Span], tenant: object, begin: int, min_run: int) -> None:
    """Every reported run is one of the tenant's maximal runs, long enough, and none is reported twice."""
    truth = {span.donor: maximal_runs(prompt, span, begin) for span in spans if span.tenant == tenant}
    for run in runs:
        assert run.donor in truth, f"{run} is of a donor that is gone or another tenant's"
        assert (run.start, run.stop, run.source) in truth[run.donor], f"{run} is not a maximal run"
        assert run.stop - run.start >= min_run
    assert len({run[:4] for run in runs}) == len(runs)


def check_cover(runs, prompt: np.ndarray, spans: list[Span], tenant: object, begin: int, least: int) -> int:
    """Every common stretch of at least `least` tokens lies inside a reported run; returns how many there are."""
    count = 0
    for span in spans:
        if span.tenant != tenant:
            continue
        for start, stop, source in maximal_runs(prompt, span, begin):
            if stop - start >= least:
                count += 1
                inside = any(run.start <= start and stop <= run.stop for run in runs)
                assert inside, (
                    f"prompt [{start}, {stop}) equals donor {span.donor} from {source} on, and is not covered"
                )
    return count
