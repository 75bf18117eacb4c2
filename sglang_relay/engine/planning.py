"""Plans of one batch: segments inside each chunk, their donors locked, nothing that does not fit the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from sglang_relay.engine.accounting import chunk_end
from sglang_relay.engine.donors import EXACT_PREFIX, Donors, Held, tokens_of
from sglang_relay.engine.requests import RelayRequest
from sglang_relay.plan import Candidate, Decline, Pending, RelayPlan, Segment
from sglang_relay.policies import Policy

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    from sglang_relay.engine.tree import RelayCache


class Plans(NamedTuple):
    """One policy, and a plan per request that relays."""

    policy: Policy
    plans: list[RelayPlan]


class Planner:
    def __init__(self, tree: RelayCache, donors: Donors, policies: dict[str, Policy], pool_slots: int) -> None:
        self._tree = tree
        self._donors = donors
        self._policies = policies
        self._pool_slots = pool_slots

    def plan(
        self,
        batch: ScheduleBatch,
        states: list[RelayRequest | None],
        decline: Callable[[RelayRequest, str], None],
        held: list[Held],
    ) -> Plans | None:
        """None when nothing is reused. decline: called for requests that this batch leaves out. held: takes the donors'
        locks, whatever follows. Raises Decline."""
        policy: Policy | None = None
        plans: list[RelayPlan] = []
        for row, (req, state) in enumerate(zip(batch.reqs, states, strict=True)):
            if state is None or not state.relays or not (state.pieces or state.placed):
                continue
            own = self._policies[state.controls.policy]
            if policy is not None and own is not policy:
                decline(state, "other_policy_in_batch")
                continue
            plan = self._plan(row, req, state, held)
            if plan.segments or plan.pending is not None:
                policy = own
                plan.check(self._pool_slots)
                plans.append(plan)
        if policy is None:
            return None
        self._check_memory(batch)
        return Plans(policy, plans)

    def _plan(self, row: int, req: Req, state: RelayRequest, held: list[Held]) -> RelayPlan:
        stop, tokens = chunk_end(req), tokens_of(req)
        last, pending = stop == len(tokens), None
        if last and state.pending is not None:
            pending = Pending(state.pending, tuple(state.placed), tokens[state.pending : req.prefix_len])
        segments = tuple(self._segments(req, state, held))
        return RelayPlan(row, req.prefix_len, stop, segments, state.controls.budget, last, pending)

    def _segments(self, req: Req, state: RelayRequest, held: list[Held]) -> list[Segment]:
        # The chunk's last row stays fresh: the logits processor reads it.
        low, high = req.prefix_len, chunk_end(req) - 1
        parts, of_parts = [], []
        heads: dict[int, Candidate] = {}
        for piece in state.pieces:
            head = heads.setdefault(piece.donor, piece)
            if piece.source < head.source:  # told in another order: a text of its own
                head = heads[piece.donor] = piece
            part = piece.clip(low, high)
            if part.stop <= part.start or (piece.donor == EXACT_PREFIX and part.start != low):
                continue  # an exact prefix that is not continued from its start is no prefix any more
            parts.append(part)
            of_parts.append((piece, part.source - head.source))
        segments: list[Segment] = []
        found = self._donors.hold(req, state.prefix_key, parts)
        for (piece, index), part, run in zip(of_parts, parts, found, strict=True):
            if run is not None:
                held.append(run)
                stop, exact = part.start + run.slots.numel(), piece.donor == EXACT_PREFIX
                segments.append(
                    Segment(part.start, stop, part.source, piece.depth, run.slots, exact, piece.stop, index)
                )
        return segments

    def _check_memory(self, batch: ScheduleBatch) -> None:
        """Admission counted the donors as evictable; locked, they may no longer leave room for the batch."""
        allocator = self._tree.token_to_kv_pool_allocator
        page = allocator.page_size
        need = sum(-(-r.extend_len // page) * page + page for r in batch.reqs)
        if allocator.available_size() + self._tree.evictable_size() < need:
            raise Decline("pool_pressure", "locked donors would leave no room for the batch")
