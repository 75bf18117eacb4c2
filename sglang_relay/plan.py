"""What a relayed prefill will do, decided on the host before anything is launched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from sglang_relay.budget import Budget


class Decline(Exception):
    """Relay is declined for a named reason; the request or batch is served by the stock path."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class Candidate(NamedTuple):
    """A run of prompt tokens that a donor holds: prompt ``[start, stop)`` equals its path from ``source`` on."""

    start: int
    stop: int
    donor: int
    source: int
    depth: int

    def clip(self, start: int, stop: int) -> Candidate:
        """The part inside ``[start, stop)``; may be empty (``start >= stop``)."""
        low = max(self.start, start)
        return Candidate(low, min(self.stop, stop), self.donor, self.source + low - self.start, self.depth)


@dataclass(frozen=True, slots=True)
class Segment:
    """Prompt positions ``[start, stop)`` that receive donor KV.

    slots: int64 [stop - start], the donor's KV slots, locked until the copy has been launched.
    source: position of the first token in the donor's path. A segment with ``source == start`` whose donor is
    exact (``depth == 0``) and that continues the exact prefix is a copy without approximation (``exact``).
    end: where the whole segment ends in the prompt; beyond ``stop`` when a chunk cuts it.
    index: how many tokens of the same donor's text stand before the segment in the prompt.
    """

    start: int
    stop: int
    source: int
    depth: int
    slots: torch.Tensor
    exact: bool
    end: int
    index: int

    @property
    def length(self) -> int:
        return self.stop - self.start


class Placed(NamedTuple):
    """Prompt positions ``[start, stop)`` that an earlier chunk has given donor KV; ``end``, ``index`` as in Segment."""

    start: int
    stop: int
    end: int
    index: int


@dataclass(frozen=True, slots=True)
class Pending:
    """What earlier chunks of a prompt have placed and the last one has to repair.

    start: from here on KV may not be published yet; the rows from here on are the request's own. placed: where donor KV
    lies. tokens: int32 numpy, the prompt's tokens ``[start, prefix)``.
    """

    start: int
    placed: tuple[Placed, ...]
    tokens: np.ndarray


@dataclass(frozen=True, slots=True)
class RelayPlan:
    """One request in one chunk.

    row: index of the request in the batch. Positions ``[prefix, stop)`` of the prompt are extended in this chunk;
    ``segments`` are disjoint, sorted, inside ``[prefix, stop - 1)``: the chunk's last row stays fresh, because the
    logits processor reads it.
    last: whether the prompt ends with this chunk. pending: repair that earlier chunks have left to it; such a plan may
    have no segments of its own.
    """

    row: int
    prefix: int
    stop: int
    segments: tuple[Segment, ...]
    budget: Budget | None
    last: bool
    pending: Pending | None = None

    def check(self, pool_slots: int) -> None:
        """Bounds-check everything a kernel will index with. Raises Decline("bad_plan")."""
        at = self.prefix
        for s in self.segments:
            if not at <= s.start < s.stop <= self.stop - 1:
                raise Decline("bad_plan", f"segment [{s.start}, {s.stop}) in chunk [{self.prefix}, {self.stop})")
            if not (s.source >= 0 and s.end >= s.stop and s.slots.dtype == torch.int64 and s.slots.numel() == s.length):
                raise Decline("bad_plan", f"segment [{s.start}, {s.stop}) has {s.slots.numel()} slots")
            at = s.stop
        if self.segments:
            # One read-back for all segments: the slots are the device's.
            low, high = torch.stack(torch.aminmax(torch.cat([s.slots for s in self.segments]))).tolist()
            if low <= 0 or high >= pool_slots:
                raise Decline("bad_plan", f"slots {low}..{high} outside (0, {pool_slots})")
        if self.pending is not None:
            self._check_pending(self.pending)

    def _check_pending(self, pending: Pending) -> None:
        at = pending.start
        for p in pending.placed:
            if not at <= p.start < p.stop <= self.prefix - 1:
                raise Decline("bad_plan", f"placed [{p.start}, {p.stop}) in [{pending.start}, {self.prefix})")
            at = p.stop
        if len(pending.tokens) != self.prefix - pending.start:
            raise Decline("bad_plan", f"{len(pending.tokens)} tokens for [{pending.start}, {self.prefix})")

    @property
    def first(self) -> int:
        """First prompt position that may run in this chunk."""
        return self.prefix if self.pending is None else self.pending.start


def cover(candidates: Iterable[Candidate], start: int, stop: int, min_length: int, limit: int) -> list[Candidate]:
    """Choose disjoint pieces of ``candidates`` (best first) inside ``[start, stop)``, sorted by position.

    A piece shorter than ``min_length`` is dropped; at most ``limit`` pieces are chosen.
    """
    free = [(start, stop)] if stop - start >= min_length else []
    chosen: list[Candidate] = []
    for candidate in candidates:
        if not free or len(chosen) >= limit:
            break
        rest: list[tuple[int, int]] = []
        for low, high in free:
            piece = candidate.clip(low, high)
            if piece.stop - piece.start < min_length or len(chosen) >= limit:
                rest.append((low, high))
                continue
            chosen.append(piece)
            rest.extend(gap for gap in ((low, piece.start), (piece.stop, high)) if gap[1] - gap[0] >= min_length)
        free = rest
    return sorted(chosen)
