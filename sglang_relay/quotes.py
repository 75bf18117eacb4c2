"""What an answer quotes of its prompt, found by comparing tokens.

A probe asks before the answer begins, when nobody knows yet which phrase it will quote; recomputing a quote's tokens
when its first ones have been decoded costs a few rows and brings such answers back (docs/fidelity.md, "Answers that
quote").
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHORTEST = 2
"""Decoded tokens, the latest ones, that must stand in the prompt: one is mostly no quote."""
LONGEST = 16
"""A longer agreement makes no place in the prompt a better one."""
REACH = 2
"""Positions that each token of an agreement beyond the shortest is worth: a short one is often no quote."""
PLACES = 2
"""Where the text stands several times in the prompt, that many places count: the latest of the
longest agreements, then those that are next in length, the first of equal ones."""


MOST_PLACES = 128
"""Places in the prompt that are compared with the answer. Where more begin alike, the text repeats itself, and the
latest stale ones count."""

_BLOCK = 4096


def may_quote(tokens: np.ndarray, latest: int, stale: np.ndarray) -> bool:
    """Whether `quoted` could find something once the token behind ``latest`` is known."""
    return bool(((tokens[:-SHORTEST] == latest) & stale[SHORTEST:]).any())


def quoted(tokens: np.ndarray, answer: Sequence[int], stale: np.ndarray, ahead: int) -> np.ndarray:
    """Positions to recompute now, int64, ascending: of the tokens behind what the answer agrees with, if the next one
    is stale, those that are; at most ``ahead`` of them, and one for the shortest agreement with `REACH` for each token
    more.

    tokens: int [n], the prompt. answer: decoded tokens, at least the latest `LONGEST`. stale: bool [n], tokens whose KV
    was not computed for this prompt.
    """
    recent = np.asarray(answer[-LONGEST:])
    none = np.empty(0, dtype=np.int64)
    if len(recent) < SHORTEST or len(tokens) <= SHORTEST or not stale.any():
        return none
    same = tokens[SHORTEST - 1 : -1] == recent[-1]
    for back in range(1, SHORTEST):
        same &= tokens[SHORTEST - 1 - back : -1 - back] == recent[-1 - back]
    if np.count_nonzero(same) > MOST_PLACES:
        same &= stale[SHORTEST:]
        same = same[_last(same, MOST_PLACES) :]
    ends = np.flatnonzero(same) + len(tokens) - 1 - len(same)
    if not len(ends):
        return none
    lengths = _agreement(tokens, recent, ends)
    order = np.argsort(-lengths, kind="stable")
    latest = np.count_nonzero(lengths == lengths[order[0]]) - 1
    best = [order[latest], *np.delete(order, latest)[: PLACES - 1]]
    wanted: set[int] = set()
    for end, length in zip(ends[best].tolist(), lengths[best].tolist(), strict=True):
        if stale[end + 1]:
            wanted.update(range(end + 1, end + 2 + min(ahead - 1, REACH * (length - SHORTEST))))
    found = np.array(sorted(at for at in wanted if at < len(tokens)), dtype=np.int64)
    return found[stale[found]]


def _last(mask: np.ndarray, count: int) -> int:
    """Where the last ``count`` true ones begin; 0 where there are not more."""
    stop = len(mask)
    while stop > 0 and count > 0:
        begin = max(0, stop - _BLOCK)
        found = np.flatnonzero(mask[begin:stop])
        if len(found) >= count:
            return begin + int(found[-count])
        count -= len(found)
        stop = begin
    return 0


def _agreement(tokens: np.ndarray, recent: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """int64 [len(ends)]: how many tokens up to each end equal the latest ones of ``recent``."""
    back = np.arange(len(recent))
    at = ends[:, None] - back
    same = (tokens[np.maximum(at, 0)] == recent[::-1]) & (at >= 0)
    return np.where(same.all(1), len(recent), same.argmin(1))
