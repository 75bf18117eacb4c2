"""Rows of a stage as sequences for a paged prefill kernel: which rows go together, which keys they read, what masks.

Such a kernel knows two masks: bottom-right causal (row ``i`` of ``n`` sees all but the last ``n - 1 - i`` of the
sequence's keys) and one bit per row and key; one launch has one kind. A sequence's keys are the first keys of its
request, up to those that its last row sees. Three forms, the cheapest is taken:

    runs     rows that see one key more each are one causal sequence. A row alone reads all keys before it for itself
    mask     all rows of a request are one sequence, masked by bits
    merged   runs, cut where they are longer than a tile, and put together with their neighbours while that is cheaper;
             rows in the gaps are not computed, so what is put together is masked by bits

Estimated cost of a form, in rows times keys, each query head counted: a kernel works through tiles of `TILE` rows,
loads a tile's keys for as much as `LOAD` rows compute, skips keys above the diagonal in causal form only, and pays
`MASKED` times as much where every score asks for a bit. The heads of a group share a tile (FlashInfer's FA2 kernels,
attention/prefill.cuh). The constants are estimates; nothing here has been timed on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sglang_relay.attention.torch_sdpa import Sequence, seen_keys

TILE = 128
LOAD = 64
MASKED = 1.5
"""Reading a byte of the mask per score, and no tile without a mask."""


class RunPlan(NamedTuple):
    """Sequences of a stage, in the order of its rows; host arrays.

    form: ``runs``, ``mask`` or ``merged``. qo_indptr, kv_indptr: int32 [sequences + 1], rows and keys before each.
    owner: int64 [sequences], its request; it reads that request's first keys. mask: uint8, the bits of each sequence
    (row by row, bit ``row * keys + key``, lowest bit of a byte first) from the byte that mask_indptr, int32
    [sequences + 1], names; None where all are causal. costs: estimate per form.
    """

    form: str
    qo_indptr: np.ndarray
    kv_indptr: np.ndarray
    owner: np.ndarray
    mask: np.ndarray | None
    mask_indptr: np.ndarray
    costs: dict[str, float]


class _Rows(NamedTuple):
    """Rows of a stage. seen: int64 [rows], how many of its request's keys each sees. owner: int64 [rows]."""

    seen: np.ndarray
    owner: np.ndarray


def plan_runs(sequences: list[Sequence], *, group: int) -> RunPlan:
    """Choose the form for the rows of ``sequences`` and lay it out. group: query heads per KV head.

    Raises ValueError where rows or keys are out of order or a row's own key is missing.
    """
    counts = [seen_keys(s) for s in sequences]
    owner = np.repeat(np.arange(len(counts)), [len(c) for c in counts])
    rows = _Rows(np.concatenate(counts) if counts else np.empty(0, np.int64), owner)
    changes = np.diff(rows.owner, prepend=-1) != 0
    starts = {
        "runs": np.flatnonzero(changes | (np.diff(rows.seen, prepend=-1) != 1)),
        "mask": np.flatnonzero(changes),
    }
    starts["merged"] = _merge(rows, starts["runs"], group)
    causal = {"runs": True, "mask": False, "merged": False}
    costs = {form: _cost(rows, starts[form], group, causal[form]) for form in starts}
    form = min(costs, key=lambda name: (costs[name], len(starts[name])))
    return _lay_out(rows, starts[form], form, causal[form], costs)


def _padded(rows: np.ndarray) -> np.ndarray:
    """What the tiles of this many packed rows cost per key."""
    return np.where(rows <= LOAD, LOAD, -(-rows // TILE) * TILE)


def _cost(rows: _Rows, starts: np.ndarray, group: int, causal: bool) -> float:
    n = np.diff(starts, append=len(rows.seen))
    keys = rows.seen[starts + n - 1]
    if not causal:
        return MASKED * float((_padded(n * group) * keys).sum())
    packed = n * group
    tiles = -(-packed // TILE)
    # Tile t of a causal sequence ends at key ``keys - n + (t + 1) TILE / group``, the last one at ``keys``.
    per_tile = _padded(packed) / tiles
    visits = tiles * (keys - n) + TILE / group * tiles * (tiles - 1) / 2 + n
    return float((per_tile * visits).sum())


def tiles_cost(seen: np.ndarray, group: int) -> float:
    """Of one request's rows where every tile of `TILE` packed rows reads the keys that its last row sees.

    seen: as of `seen_keys`.
    """
    most = max(1, TILE // group)
    first = np.arange(0, len(seen), most)
    stops = np.minimum(first + most, len(seen))
    return float((_padded((stops - first) * group) * seen[stops - 1]).sum()) if len(seen) else 0.0


def _merge(rows: _Rows, runs: np.ndarray, group: int) -> np.ndarray:
    """int64, first row of each sequence of the form ``merged``."""
    total, most = len(rows.seen), max(1, TILE // group)
    ends = runs + np.diff(runs, append=total)
    pieces = np.concatenate([np.arange(a, b, most) for a, b in zip(runs, ends, strict=True)] or [runs])
    lengths = np.diff(pieces, append=total)
    last, owner = rows.seen[pieces + lengths - 1].tolist(), rows.owner[pieces].tolist()
    dear = _padded(np.arange(total + 1) * group).tolist()
    starts: list[int] = []
    n = keys = 0
    for i, (first, length, end) in enumerate(zip(pieces.tolist(), lengths.tolist(), last, strict=True)):
        alone = dear[n] * keys + dear[length] * end
        if i and owner[i] == owner[i - 1] and dear[n + length] * end <= alone:
            n += length
        else:
            starts.append(first)
            n = length
        keys = end
    return np.array(starts, dtype=np.int64)


def _lay_out(rows: _Rows, starts: np.ndarray, form: str, causal: bool, costs: dict[str, float]) -> RunPlan:
    n = np.diff(starts, append=len(rows.seen))
    keys = rows.seen[starts + n - 1]
    bits = np.zeros(len(n), np.int64) if causal else n * keys
    mask_indptr = _indptr(-(-bits // 8))
    mask = None
    if not causal and len(n):
        row = np.arange(len(rows.seen)) - np.repeat(starts, n)
        first = 8 * np.repeat(mask_indptr[:-1].astype(np.int64), n) + row * np.repeat(keys, n)
        mask = _ones(first, first + rows.seen, int(mask_indptr[-1]))
    return RunPlan(form, _indptr(n), _indptr(keys), rows.owner[starts], mask, mask_indptr, costs)


def _indptr(counts: np.ndarray) -> np.ndarray:
    total = np.concatenate(([0], np.cumsum(counts)))
    if total[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"{total[-1]} entries in one stage: more than int32 counts")
    return total.astype(np.int32)


def _ones(first: np.ndarray, stop: np.ndarray, size: int) -> np.ndarray:
    """uint8 [size]: the bits of each ``[first, stop)`` set, ranges ascending and disjoint, none empty."""
    packed = np.zeros(size, np.uint8)
    low, high = first >> 3, (stop - 1) >> 3
    head = (0xFF << (first & 7)) & 0xFF
    tail = 0xFF >> (7 - ((stop - 1) & 7))
    same = low == high
    np.bitwise_or.at(packed, low, np.where(same, head & tail, head).astype(np.uint8))
    np.bitwise_or.at(packed, high, np.where(same, head & tail, tail).astype(np.uint8))
    for a, b in zip((low + 1).tolist(), high.tolist(), strict=True):
        packed[a:b] = 0xFF
    return packed
