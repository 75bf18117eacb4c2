"""Maximal runs of a prompt's tokens inside donor spans.

Every window of the prompt is looked up; a hit is a proposal, a diagonal (donor position minus prompt position) on which
the tokens themselves are then compared, to the right and to the left, up to the span's and the prompt's ends.

Bounds, for a prompt of n tokens, whatever the tokens are (`BUCKET`, `CROWD`, `BURST` are constants of the code):
- proposals: at most `BUCKET * n`; one on a diagonal that a run already covers there costs no comparison; beyond one per
  prompt token on top of `BURST`, windows inside a run that was found are passed over: other donors of its text are
  second choices;
- a donor already matched on `CROWD` diagonals at a prompt position is not tried on a further one there (periodic text);
- token comparisons (and blocks walked to list a donor's span): at most `(BUCKET + 1) * n + BURST`. The allowance grows
  by `BUCKET` per prompt token on top of `BURST`, so text that burns it early delays, and does not prevent, what comes
  later in the prompt.

What is left out for these reasons is counted (`crowded`, `starved`, `passed`).
"""

from typing import NamedTuple

import numpy as np

from ._jit import kernel
from .blocks import BLOCK, list_blocks
from .rolling import table_key, window_hash
from .spans import DEPTH, HEAD, ID, LISTED, START, STOP, TAIL, TENANT, USED
from .table import home, prefetch
from .windows import BUCKET, unpack

CROWD = 2
BURST = 1 << 16

_AHEAD = 16  # lookups between the request for a table slot and its use
_SHIFT = 6
_EMPTY = np.uint64(0)
# Columns of the kernel's run array.
_BEGIN, _END, _SOURCE, _SLOT, _NEXT = range(5)


class Run(NamedTuple):
    """Prompt tokens `[start, stop)` equal path tokens `[source, source + stop - start)` of donor `donor`, of that
    depth."""

    start: int
    stop: int
    donor: int
    source: int
    depth: int


class Work(NamedTuple):
    """Operations of one match. `probed`: table slots read; `proposals`: entries with a window's hash; `compared`:
    tokens compared and blocks walked; `confirmed`: runs found; `refuted`: proposals whose tokens differ within the
    window; `crowded`, `starved`: proposals not tried, `passed`: windows passed over, see the module's
    bounds."""

    probed: int
    proposals: int
    compared: int
    confirmed: int
    refuted: int
    crowded: int
    starved: int
    passed: int


@kernel
def _equal_right(prompt, at, limit, tokens, blocks, offset, source):
    """Length of the common run of `prompt[at:]` and the span from `source` on, at most `limit`. `source` counts from
    the first token of block `blocks[offset]`."""
    length = 0
    while (
        length < limit
        and prompt[at + length]
        == tokens[blocks[offset + ((source + length) >> _SHIFT)], (source + length) & (BLOCK - 1)]
    ):
        length += 1
    return length


@kernel
def _equal_left(prompt, at, limit, tokens, blocks, offset, source):
    """As `_equal_right`, for the tokens before `at` and `source`."""
    length = 0
    while length < limit:
        place = source - length - 1
        if prompt[at - length - 1] != tokens[blocks[offset + (place >> _SHIFT)], place & (BLOCK - 1)]:
            break
        length += 1
    return length


# Plain loops: numba's slice assignment compiles seconds' worth of code for its error messages.
@kernel
def _grown(array, needed):
    if needed <= len(array):
        return array
    larger = np.empty(max(needed, 2 * len(array)), array.dtype)
    for i in range(len(array)):
        larger[i] = array[i]
    return larger


@kernel
def _grown_rows(array, needed):
    if needed <= len(array):
        return array
    larger = np.empty((max(needed, 2 * len(array)), array.shape[1]), array.dtype)
    for i in range(len(array)):
        for j in range(array.shape[1]):
            larger[i, j] = array[i, j]
    return larger


@kernel
def _find_hits(hashes, start, window, factor, seed, keys):
    """Look up all windows from `start` on. Returns the prompt positions that have an entry, the table slot of the first
    entry of each, and the number of slots read."""
    capacity = len(keys)
    size = max(len(hashes) - window - start, 0)
    sought = np.empty(size, np.uint64)
    for i in range(size):
        sought[i] = table_key(window_hash(hashes, start + i, window, factor), seed)
    positions, places = np.empty(size, np.int64), np.empty(size, np.int64)
    hits, probed = 0, 0
    for i in range(size):
        if i + _AHEAD < size:
            prefetch(keys, home(sought[i + _AHEAD], capacity))  # pyright: ignore[reportCallIssue]
        place = home(sought[i], capacity)
        while keys[place] != _EMPTY:
            probed += 1
            if keys[place] == sought[i]:
                positions[hits] = start + i
                places[hits] = place
                hits += 1
                break
            place = place + 1 if place + 1 < capacity else 0
    return positions[:hits], places[:hits], probed


@kernel
def _find_runs(prompt, hashes, start, window, min_run, factor, seed, tenant, keys, values, rows, tokens, parents):
    size, capacity = len(prompt), len(keys)
    positions, places, probed = _find_hits(hashes, start, window, factor, seed, keys)
    runs = np.empty((64, 5), np.int64)
    blocks = np.empty(256, np.int64)  # the block lists of the donors met so far, one behind the other
    met = np.empty(64, np.int64)
    found, listed, donors, reach = 0, 0, 0, 0
    proposals, compared, refuted, crowded, starved, passed = 0, 0, 0, 0, 0, 0
    for i in range(len(positions)):
        at, place = positions[i], places[i]
        if at + window <= reach and proposals >= BURST + at - start + 1:
            passed += 1
            continue
        allowance = BURST + BUCKET * (at - start + 1)
        key = keys[place]
        while keys[place] != _EMPTY:
            hit = keys[place] == key
            entry = place
            place = place + 1 if place + 1 < capacity else 0
            probed += 1
            if not hit:
                continue
            slot, source = unpack(values[entry])
            if rows[slot, TENANT] != tenant:
                continue
            proposals += 1
            # The donor's runs that reach beyond this position, through HEAD and _NEXT; the others are unlinked on the
            # way.
            active, covered = 0, False
            before, run = -1, rows[slot, HEAD]
            while run >= 0:
                following = runs[run, _NEXT]
                if runs[run, _END] <= at:
                    if before < 0:
                        rows[slot, HEAD] = following
                    else:
                        runs[before, _NEXT] = following
                else:
                    active += 1
                    covered |= runs[run, _SOURCE] - runs[run, _BEGIN] == source - at
                    before = run
                run = following
            if covered:
                continue
            if active >= CROWD:
                crowded += 1
                continue
            first = rows[slot, START] >> _SHIFT
            last = (rows[slot, STOP] - 1) >> _SHIFT
            walk = 0 if rows[slot, LISTED] >= 0 else last - first + 1
            if compared + walk >= allowance:
                starved += 1
                continue
            if walk:
                met = _grown(met, donors + 1)
                met[donors] = slot
                donors += 1
                blocks = _grown(blocks, listed + walk)
                list_blocks(rows[slot, TAIL], first, last, parents, blocks, listed)
                rows[slot, LISTED] = listed
                listed += walk
                compared += walk
            offset, base = rows[slot, LISTED], first << _SHIFT
            limit = min(size - at, rows[slot, STOP] - source)
            right = _equal_right(prompt, at, limit, tokens, blocks, offset, source - base)
            compared += min(right + 1, limit)
            if right < window:
                refuted += 1
                continue
            limit = min(at - start, source - rows[slot, START])
            left = _equal_left(prompt, at, limit, tokens, blocks, offset, source - base)
            compared += min(left + 1, limit)
            if left + right < min_run:
                continue
            runs = _grown_rows(runs, found + 1)
            runs[found, _BEGIN] = at - left
            runs[found, _END] = at + right
            runs[found, _SOURCE] = source - left
            runs[found, _SLOT] = slot
            runs[found, _NEXT] = rows[slot, HEAD]
            rows[slot, HEAD] = found
            reach = max(reach, at + right)
            found += 1
    for i in range(donors):
        rows[met[i], HEAD] = -1
        rows[met[i], LISTED] = -1
    return runs[:found], (probed, proposals, compared, found, refuted, crowded, starved, passed)


@kernel
def _choose(starts, stops, slots, max_runs, alternatives):
    """Mark which of the ranked runs to keep: first those that no better kept run contains, then the others while fewer
    than `alternatives` better kept runs contain them, none of the same donor."""
    size = len(starts)
    keep = np.zeros(size, np.bool_)
    kept = np.empty(max_runs, np.int64)
    count = 0
    for sweep in range(2):
        for run in range(size):
            if count == max_runs:
                return keep
            if keep[run]:
                continue
            within, twin = 0, False
            for i in range(count):
                other = kept[i]
                if other < run and starts[other] <= starts[run] and stops[run] <= stops[other]:
                    within += 1
                    twin |= slots[other] == slots[run]
            if within == 0 or (sweep == 1 and within < alternatives and not twin):
                keep[run] = True
                kept[count] = run
                count += 1
    return keep


def find_runs(
    prompt: np.ndarray,
    hashes: np.ndarray,
    start: int,
    *,
    window: int,
    min_run: int,
    factor: np.uint64,
    seed: np.uint64,
    tenant: int,
    keys: np.ndarray,
    values: np.ndarray,
    rows: np.ndarray,
    tokens: np.ndarray,
    parents: np.ndarray,
) -> tuple[np.ndarray, Work]:
    """All maximal runs of at least `min_run` tokens of `prompt[start:]` in `tenant`'s spans, within the module's
    bounds.

    prompt: int32 `[n]`, hashes: its `prefix_hashes`; seed: of the tenant's window keys; keys, values: the window table;
    rows: the donor rows, whose scratch columns are restored; tokens, parents: the block pool. Returns int64 `[runs, 5]`
    (first prompt position, last plus one, source position, donor row, scratch) in no useful order, and the work done.
    """
    arguments = (window, min_run, factor, seed, tenant, keys, values, rows, tokens, parents)
    runs, work = _find_runs(prompt, hashes, start, *arguments)
    return runs, Work(*work)


def rank(runs: np.ndarray, rows: np.ndarray, max_runs: int, alternatives: int) -> list[Run]:
    """Order the runs of `find_runs` (shallowest depth first, then longest, then most recently used donor, then start,
    then source) and keep at most `max_runs`: text covered by one donor before second choices for text already covered,
    and of these at most `alternatives` per piece of text."""
    donors = rows[runs[:, _SLOT]]
    keys = (runs[:, _SOURCE], runs[:, _BEGIN], -donors[:, USED], runs[:, _BEGIN] - runs[:, _END], donors[:, DEPTH])
    order = np.lexsort(keys)
    runs, donors = runs[order], donors[order]
    keep = _choose(runs[:, _BEGIN].copy(), runs[:, _END].copy(), runs[:, _SLOT].copy(), max_runs, alternatives)
    columns = (runs[:, _BEGIN], runs[:, _END], donors[:, ID], runs[:, _SOURCE], donors[:, DEPTH])
    return [Run(*run) for run in np.stack(columns, axis=1)[keep].tolist()]
