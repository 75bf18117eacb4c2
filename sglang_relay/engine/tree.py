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
        state = relay_of(req)
        early = state is not None and answered_too_early(req, state, up_to)
        if early and self.relay is not None:
            self.relay.log_once("host_invariant", f"request {req.rid!r} has an answer before its prompt was computed")
        if state is not None and (early or state.pending is not None):
            end = state.reached if early else up_to
            end = end if state.pending is None else min(end, state.pending)
            # The insert continues what the request has locked, which ends at or before the first placed span.
            up_to = max(min(up_to, end), req.kv.cache_protected_len)
        influence = None if self.relay is None else self.relay.influence
        if influence is None:
            super().checkpoint_into_tree(req, up_to=up_to, **kwargs)
        else:
            influence.checkpoint(
                req, up_to, lambda: super(RelayCache, self).checkpoint_into_tree(req, up_to=up_to, **kwargs)
            )
        if self.relay is not None and req.finished() and not early:
            self.relay.learning.learn(req, up_to)

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
            self.relay.finished(req)

    def reset(self) -> None:
        super().reset()
        if self.relay is not None:
            self.relay.learning.on_flush()
