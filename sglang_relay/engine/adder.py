"""Prefill admission: SGLang's own, but requests that spoil each other's batch wait for a batch of their own.

The budgets are not touched. Chunks are what the server's memory and SGLang's own buffers are sized for, and only one
prompt may be unfinished at a time: a relayed prompt is admitted, and cut, as if it were computed. So whatever sends its
batch to the stock path afterwards finds a batch that the server was sized for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.managers.schedule_policy import AddReqResult

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.schedule_policy import PrefillAdder

    from sglang_relay.engine.manager import RelayManager
    from sglang_relay.policies import Policy


def adder_class(base: type[PrefillAdder], relay: RelayManager) -> type[PrefillAdder]:
    """``base`` (managers/schedule_policy.py), which lives for one batch.

    A batch reuses text under one policy, or under none where a request in it says so (``RelayManager.company``). The
    first request with such a wish decides. One with another wish stays in the queue, where its turn comes first. Of
    those behind it only such may join that have been left waiting as often: what came later does not keep it waiting.
    """

    class RelayPrefillAdder(base):  # type: ignore[valid-type,misc]
        relay_company: Policy | str | None = None
        relay_waited = 0
        """How often those that this batch leaves waiting have been left before."""

        def add_one_req(self, req: Req, has_chunked_req: bool, truncation_align_size: int | None) -> AddReqResult:
            wish = relay.guarded("company", None, relay.company, req)
            if wish is not None and self._bars(req, wish):
                self.relay_waited = max(self.relay_waited, relay.guarded("company", 0, relay.wait, req))
                return self.budget_state()
            result = super().add_one_req(req, has_chunked_req, truncation_align_size)
            self._note(req, wish)
            return result

        def add_chunked_req(self, req: Req) -> Req | None:
            wish = relay.guarded("company", None, relay.company, req)
            rest = super().add_chunked_req(req)
            self._note(req, wish)
            return rest

        def _bars(self, req: Req, wish: Policy | str) -> bool:
            if self.relay_company is None:
                return False
            return wish is not self.relay_company or relay.waited(req) < self.relay_waited

        def _note(self, req: Req, wish: Policy | str | None) -> None:
            if wish is not None and self.can_run_list and self.can_run_list[-1] is req:
                self.relay_company = wish

    return RelayPrefillAdder
