"""Which reused tokens of recent prompts were never recomputed, for their own decoding and for requests that find them
in the tree: forks, later turns."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sglang_relay.engine.donors import tokens_of
from sglang_relay.engine.selection import Unselected
from sglang_relay.quotes import quoted
from sglang_relay.transfer import on_device

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

REMEMBERED = 64
"""Prompts whose unselected tokens are known to requests that find them in the tree."""
_BEGINNING = 64
"""Tokens that are compared first."""


class _Left:
    """What one prefill left unrecomputed, shared by all prompts that go on from it.

    positions: int64 numpy [n], ascending; slots: int64 [n], where K and V were written; stale: bool numpy [n], which of
    them nobody has recomputed since.
    """

    def __init__(self, rest: Unselected) -> None:
        self.positions, self.slots = rest
        self.stale = np.ones(len(rest.positions), dtype=bool)


class _Part(NamedTuple):
    """The first ``count`` of what was left."""

    left: _Left
    count: int


class _Line:
    """changes: how often anything was recomputed of the prompts that share it."""

    def __init__(self) -> None:
        self.changes = 0


class Quotes:
    """Reused tokens of one prompt that were not recomputed. Prompts that share some of them share what is recomputed.

    tokens: int32 numpy [n], the prompt. parts: what was left of it, one prefill behind the other.
    """

    def __init__(self, tokens: np.ndarray, parts: list[_Part], line: _Line) -> None:
        self.tokens, self.parts, self.line = tokens, parts, line
        self._starts = [int(part.left.positions[0]) for part in parts]
        self._stale = np.zeros(len(tokens), dtype=bool)
        self._seen = -1

    def wanted(self, answer: Sequence[int], ahead: int) -> np.ndarray:
        """Positions to recompute now (``sglang_relay/quotes.py``), and never again."""
        found = quoted(self.tokens, answer, self.stale(), ahead)
        if len(found):
            self._done(found)
        return found

    def stale(self) -> np.ndarray:
        """bool [n]: those that nobody has recomputed so far."""
        if self._seen != self.line.changes:
            for left, count in self.parts:
                self._stale[left.positions[:count]] = left.stale[:count]
            self._seen = self.line.changes
        return self._stale

    def _done(self, positions: np.ndarray) -> None:
        for left, at in self._where(positions):
            left.stale[at] = False
        self._stale[positions] = False
        self.line.changes += 1
        self._seen = self.line.changes

    def slots(self, positions: np.ndarray) -> torch.Tensor:
        """int64: where K and V of ``positions``, ascending, were written when they were placed."""
        found = [left.slots.index_select(0, on_device(at, left.slots.device)) for left, at in self._where(positions)]
        return torch.cat(found)

    def _where(self, positions: np.ndarray) -> list[tuple[_Left, np.ndarray]]:
        """Of which prefill ``positions``, ascending, are, and where in what it left."""
        found = []
        at = 0
        while at < len(positions):
            part = bisect_left(self._starts, int(positions[at]) + 1) - 1
            stop = len(positions)
            if part + 1 < len(self._starts):
                stop = int(np.searchsorted(positions, self._starts[part + 1]))
            left = self.parts[part].left
            found.append((left, np.searchsorted(left.positions, positions[at:stop])))
            at = stop
        return found

    def before(self, stop: int) -> list[_Part]:
        """The parts of it before ``stop`` in which something is stale."""
        found = []
        for left, count in self.parts:
            inside = min(count, int(np.searchsorted(left.positions, stop)))
            if left.stale[:inside].any():
                found.append(_Part(left, inside))
        return found


class QuoteBook:
    """Slots are compared before they are written: a path that was evicted and computed again lies elsewhere. Only
    requests whose prefix is known to be approximate ask (``RelayRequest.depth``)."""

    def __init__(self) -> None:
        self._recent: deque[tuple[str | None, Quotes]] = deque(maxlen=REMEMBERED)

    def found(self, req: Req) -> Quotes | None:
        """Of what ``req`` found in the tree; None where nothing is known."""
        tokens = tokens_of(req)
        stop, shared = 0, None
        for key, quotes in self._recent:
            if key == req.extra_key and (common := _common(quotes.tokens, tokens[: req.prefix_len])) > stop:
                stop, shared = common, quotes
        if shared is None:
            return None
        parts = shared.before(stop)
        return Quotes(tokens, parts, shared.line) if parts else None

    def placed(self, req: Req, before: Quotes | None, rest: Unselected) -> Quotes:
        """``req`` has been prefilled and left ``rest``; ``before``: what it had found."""
        tokens = tokens_of(req)
        first = int(rest.positions[0]) if len(rest.positions) else len(tokens)
        parts = [] if before is None else before.before(first)
        if len(rest.positions):
            parts.append(_Part(_Left(rest), len(rest.positions)))
        quotes = Quotes(tokens, parts, _Line() if before is None else before.line)
        self._recent.appendleft((req.extra_key, quotes))
        return quotes

    def clear(self) -> None:
        self._recent.clear()


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Tokens up to the first that differs."""
    n = min(len(a), len(b))
    for stop in (min(n, _BEGINNING), n):
        differ = a[:stop] != b[:stop]
        if differ.any():
            return int(differ.argmax())
    return n
