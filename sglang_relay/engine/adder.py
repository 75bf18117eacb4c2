"""Prefill admission that charges the compute budget with what is computed, not with what is copied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_policy import AddReqResult

from sglang_relay.engine.accounting import chunk_end
from sglang_relay.engine.matching import computed_tokens, reachable

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.schedule_policy import PrefillAdder

    from sglang_relay.engine.manager import RelayManager
    from sglang_relay.engine.requests import RelayRequest


def adder_class(base: type[PrefillAdder], relay: RelayManager) -> type[PrefillAdder]:
    """``base`` (managers/schedule_policy.py) with relayed prompts charged for fresh and repaired tokens only.

    The memory budget stays SGLang's: every token of a relayed prompt needs a slot.
    """

    class RelayPrefillAdder(base):  # type: ignore[valid-type,misc]
        def add_one_req(self, req: Req, has_chunked_req: bool, truncation_align_size: int | None) -> AddReqResult:
            state = relay.propose(req)
            if state is None or not state.pieces:
                return super().add_one_req(req, has_chunked_req, truncation_align_size)
            budget = _Budget(self, req, state, relay)
            result = super().add_one_req(req, has_chunked_req, truncation_align_size)
            return self.budget_state() if budget.settle() else result

        def add_chunked_req(self, req: Req) -> Req | None:
            state = relay.propose(req)
            if state is None or not state.pieces:
                return super().add_chunked_req(req)
            budget = _Budget(self, req, state, relay)
            rest = super().add_chunked_req(req)
            budget.settle()
            return rest

    return RelayPrefillAdder


class _Budget:
    """Widens an adder's compute budgets to the tokens they can reach, then charges what was really taken."""

    def __init__(self, adder: Any, req: Req, state: RelayRequest, relay: RelayManager) -> None:
        self._adder, self._req, self._pieces = adder, req, state.pieces
        self._share = relay.policy_of(state).expected_share(state.controls.budget)
        self._chunk, self._input = adder.rem_chunk_tokens, adder.rem_input_tokens
        self._admitted = len(adder.can_run_list)
        if self._chunk is not None and self._chunk > 0:
            start, stop = req.prefix_len, len(req.full_untruncated_fill_ids)
            end = reachable(state.pieces, self._share, start, stop, self._chunk)
            wide = max(self._chunk, adder.ceil_paged_tokens(end - start))
            # A continuing chunk must fit: SGLang falls back to the whole chunk budget when memory is short.
            if wide < adder.rem_total_tokens:
                adder.rem_chunk_tokens = wide

    def settle(self) -> bool:
        """Put the budgets right; True if the request was admitted."""
        adder, req = self._adder, self._req
        admitted = len(adder.can_run_list) > self._admitted and adder.can_run_list[-1] is req
        cost = 0
        if admitted:
            cost = computed_tokens(self._pieces, self._share, req.prefix_len, chunk_end(req))
            if not adder.exact_chunk_fill:
                cost = adder.ceil_paged_tokens(cost)
        if self._chunk is not None:
            adder.rem_chunk_tokens = self._chunk - cost
        adder.rem_input_tokens = self._input - cost
        return admitted
