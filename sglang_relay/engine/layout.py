"""Rows of a relayed batch: which prompt positions may run, what holds donor KV, and where K and V lie.

The rows are those of the batch. Where a prompt's repair waited for its last chunk, they begin at its first segment:
rows of earlier chunks run again, with their tokens from the plan and their slots from the request's row of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sglang_relay.attention import Sequence
from sglang_relay.plan import Decline, RelayPlan
from sglang_relay.transfer import on_device

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


@dataclass(slots=True)
class Span:
    """Reused tokens of one segment: rows of the layout, and how far the segment goes on (``Segment``, ``Placed``).

    plan: index of the plan. row, stop: first row and the one behind the last. position: of the first row. source:
    the donor's position of the first row, None where the KV was placed by an earlier chunk; slots: int64 [n] then.
    """

    plan: int
    row: int
    stop: int
    position: int
    end: int
    index: int
    exact: bool
    source: int | None
    slots: torch.Tensor | None

    @property
    def length(self) -> int:
        return self.stop - self.row

    @property
    def rows(self) -> np.ndarray:
        return np.arange(self.row, self.stop)

    @property
    def positions(self) -> np.ndarray:
        return np.arange(self.position, self.position + self.length)

    @property
    def sources(self) -> np.ndarray:
        """Positions of the rows in the donor's path."""
        if self.source is None:
            raise ValueError("placed by an earlier chunk")
        return np.arange(self.source, self.source + self.length)


class Rows:
    """Rows of a batch's requests that a stage may run, and the KV that they may see.

    positions: int64 numpy [rows], prompt position of each row. starts: int64 [requests + 1], rows of each request.
    input_ids, row_positions, out_loc: tensors [rows]. slots: per request, int64, the KV slot of each position as far as
    rows of it see. is_batch: whether these are the rows of the batch itself.
    """

    batch: ForwardBatch
    device: torch.device
    positions: np.ndarray
    starts: np.ndarray
    input_ids: torch.Tensor
    row_positions: torch.Tensor
    out_loc: torch.Tensor
    slots: list[torch.Tensor]
    is_batch: bool

    def tensor(self, values: np.ndarray) -> torch.Tensor:
        """int64, on the batch's device; without waiting for it."""
        return on_device(np.asarray(values, dtype=np.int64), self.device)

    def per_request(self, rows: np.ndarray) -> np.ndarray:
        """int64 [requests]: how many of the ascending ``rows`` each request has."""
        return np.diff(np.searchsorted(rows, self.starts))

    def sequences(self, rows: np.ndarray, missing: np.ndarray | None = None) -> list[Sequence]:
        """Attention of the ascending ``rows`` over each request's KV. missing: bool [all rows], those whose K and V are
        not computed yet; nothing may see them."""
        cuts = np.searchsorted(rows, self.starts)
        return [self._sequence(i, self.positions[rows[a:b]], missing) for i, (a, b) in enumerate(_pairs(cuts))]

    def _sequence(self, request: int, positions: np.ndarray, missing: np.ndarray | None) -> Sequence:
        stop = int(positions[-1]) + 1 if len(positions) else 0
        slots = self.slots[request]
        keys = self.keys(request, stop, missing)
        return Sequence(positions, slots[:stop] if len(keys) == stop else slots[self.tensor(keys)], keys)

    def keys(self, request: int, stop: int, missing: np.ndarray | None) -> np.ndarray:
        """int64: positions below ``stop`` whose K and V exist."""
        there = np.ones(stop, dtype=bool)
        if missing is not None and stop:
            rows = slice(self.starts[request], self.starts[request + 1])
            absent = self.positions[rows][missing[rows]]
            there[absent[absent < stop]] = False
        return np.flatnonzero(there)


class Layout(Rows):
    """The rows of a relayed prefill. owner: int64 numpy [rows], request of each row. spans: reused tokens, by plan and
    position. fresh: bool [rows], tokens that no donor holds. prefixes: int64 [requests], where each request's chunk
    begins. slots: of every position up to the chunk's end.

    Raises Decline when the batch is not what was planned.
    """

    def __init__(self, runner: Any, batch: ForwardBatch, plans: list[RelayPlan]) -> None:
        self.batch = batch
        self.plans = plans
        self.device = batch.out_cache_loc.device
        if not batch.forward_mode.is_extend() or batch.extend_seq_lens_cpu is None:
            raise Decline("unexpected_forward_mode", str(batch.forward_mode))
        lens, prefixes = list(batch.extend_seq_lens_cpu), list(batch.extend_prefix_lens_cpu or ())
        if len(lens) != batch.batch_size or len(prefixes) != len(lens) or sum(lens) != batch.input_ids.shape[0]:
            raise Decline("unexpected_batch_shape", f"{lens} {prefixes} {tuple(batch.input_ids.shape)}")
        self.prefixes = np.array(prefixes, dtype=np.int64)
        firsts = list(prefixes)
        for plan in plans:
            if prefixes[plan.row] != plan.prefix or lens[plan.row] != plan.stop - plan.prefix:
                raise Decline("unexpected_batch_shape", f"row {plan.row} extends {prefixes[plan.row]}+{lens[plan.row]}")
            firsts[plan.row] = plan.first
        self.stops = [p + n for p, n in zip(prefixes, lens, strict=True)]
        counts = [stop - first for stop, first in zip(self.stops, firsts, strict=True)]
        self.starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        self.positions = np.concatenate([np.arange(a, b) for a, b in zip(firsts, self.stops, strict=True)])
        self.owner = np.repeat(np.arange(len(counts)), counts)
        table = runner.req_to_token_pool.req_to_token
        self.slots = [table[row, :end].long() for row, end in zip(pool_rows(batch), self.stops, strict=True)]
        self.is_batch = firsts == prefixes
        self.input_ids, self.row_positions, self.out_loc = batch.input_ids, batch.positions, batch.out_cache_loc
        if not self.is_batch:
            self._add_earlier_rows(lens)
        self.spans = [span for number, plan in enumerate(plans) for span in self._spans(number, plan)]
        self.fresh = np.ones(len(self.positions), dtype=bool)
        for span in self.spans:
            self.fresh[span.row : span.stop] = False

    def _add_earlier_rows(self, lens: list[int]) -> None:
        ids, locs = list(self.input_ids.split(lens)), list(self.out_loc.split(lens))
        for plan in self.plans:
            if plan.pending is not None:
                row = plan.row
                tokens = on_device(plan.pending.tokens, self.device).to(self.input_ids.dtype)
                ids[row] = torch.cat((tokens, ids[row]))
                locs[row] = torch.cat((self.slots[row][plan.first : plan.prefix].to(self.out_loc.dtype), locs[row]))
        self.input_ids, self.out_loc = torch.cat(ids), torch.cat(locs)
        self.row_positions = self.tensor(self.positions).to(self.batch.positions.dtype)

    def _spans(self, number: int, plan: RelayPlan) -> list[Span]:
        first = int(self.starts[plan.row]) - plan.first
        found = [
            Span(number, p.start + first, p.stop + first, p.start, p.end, p.index, False, None, None)
            for p in (plan.pending.placed if plan.pending is not None else ())
        ]
        for s in plan.segments:
            rows = s.start + first, s.stop + first
            found.append(Span(number, *rows, s.start, s.end, s.index, s.exact, s.source, s.slots))
        return found

    def approximate(self, number: int | None = None) -> list[Span]:
        """Spans of plan ``number``, or of all, whose KV is not exact."""
        return [s for s in self.spans if not s.exact and number in (None, s.plan)]

    def rows_of(self, spans: list[Span]) -> np.ndarray:
        """int64: their rows, one span after another."""
        return np.concatenate([s.rows for s in spans]) if spans else np.empty(0, dtype=np.int64)

    def donor_slots(self, spans: list[Span]) -> torch.Tensor:
        """int64, on the batch's device: where the KV of their donors lies, one span after another."""
        return torch.cat([s.slots for s in spans if s.slots is not None]).to(self.device)


def pool_rows(batch: ForwardBatch) -> list[int]:
    """Rows of the requests in req_to_token; from the host's copy where it is complete, which spares a sync."""
    known = batch.req_pool_indices_cpu
    complete = known is not None and len(known) == batch.batch_size
    return (known if complete else batch.req_pool_indices).tolist()  # type: ignore[union-attr]


def _pairs(cuts: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True))
