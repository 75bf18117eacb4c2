"""The tree backend: SGLang's unified radix cache, which tells the relay what it publishes and when it is flushed."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_relay.engine.capture import Capture
from sglang_relay.engine.invariants import answered_too_early
from sglang_relay.engine.requests import relay_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.cache_init_params import CacheInitParams

    from sglang_relay.engine.manager import RelayManager


class RelayCache(UnifiedRadixCache):
    """UnifiedRadixCache, unchanged in what it stores and owns.

    ``checkpoint_into_tree`` is where finished outputs enter the tree (mem_cache/common.py, ``release_kv_cache``);
    streaming sessions and retraction bypass it, so nothing of theirs is learnt.
    """

    relay: RelayManager | None = None

    def __init__(self, params: CacheInitParams) -> None:
        super().__init__(params)
        self._capture = Capture.from_env(os.environ, params)

    def checkpoint_into_tree(self, req: Req, *, up_to: int, **kwargs) -> None:
        if self._capture is not None and req.finished():
            self._capture.take(req, up_to)  # before the insert, which may give slots up for the tree's own
        if (relay := self.relay) is None:
            super().checkpoint_into_tree(req, up_to=up_to, **kwargs)
            return
        # The insert continues what the request has locked, which ends at or before all that may not be published.
        locked = req.kv.cache_protected_len
        end = relay.guarded("publish", locked, self._publishable, relay, req, up_to)
        end = up_to if end >= up_to else max(end, locked)
        influence, before = relay.influence, None
        if influence is not None:
            before = relay.guarded("influence", None, influence.before_insert, req, end)
        super().checkpoint_into_tree(req, up_to=end, **kwargs)
        if influence is not None and before is not None:
            relay.guarded("influence", None, influence.after_insert, req, end, before)
        if req.finished() and end == up_to:
            relay.guarded("learn", None, relay.learning.learn, req, up_to)

    @staticmethod
    def _publishable(relay: RelayManager, req: Req, up_to: int) -> int:
        """The end of what the tree may have of ``[0, up_to)``: not what waits for its repair, and nothing behind a
        prompt that was not computed."""
        state = relay_of(req)
        if state is None:
            return up_to
        if answered_too_early(req, state, up_to):
            relay.log_once("host_invariant", f"request {req.rid!r} has an answer before its prompt was computed")
            up_to = min(up_to, state.reached)
        return up_to if state.pending is None else min(up_to, state.pending)

    def on_release(self, req: Req, *, checkpointed: bool) -> None:
        super().on_release(req, checkpointed=checkpointed)
        self._finished(req)

    def claim_kv_row(self, req: Req) -> bool:
        """Streaming sessions keep the row, and release nothing."""
        claimed = super().claim_kv_row(req)
        if claimed:
            self._finished(req)
        return claimed

    def _finished(self, req: Req) -> None:
        if self.relay is not None and req.finished():  # a retracted request is released, too
            self.relay.guarded("report", None, self.relay.finished, req)

    def reset(self) -> None:
        super().reset()
        if self.relay is not None:
            self.relay.guarded("flush", None, self.relay.learning.on_flush)
