"""Made-up requests for real passes of the model at start-up, on rows and slots borrowed from the pools.

SGLang builds the tree last of what a forward needs: pools, attention backends and graphs are there, and no request is.
The context of a made-up request is whatever its borrowed slots hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sglang_relay.engine.extend import extend_batch
from sglang_relay.engine.forward import StagedForward
from sglang_relay.engine.manager import BatchPlan
from sglang_relay.plan import Decline
from sglang_relay.policies.rotate import Rotate

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_relay.engine.consensus import Consensus
    from sglang_relay.engine.tools import ForwardTools
    from sglang_relay.engine.tree import RelayCache


class MadeUp:
    """rows: of the request pool, one per request. slots: int64 [requests, tokens]."""

    def __init__(self, runner: Any, tree: RelayCache, rows: list[int], slots: torch.Tensor) -> None:
        self._runner = runner
        self._tree = tree
        self.rows = rows
        self.slots = slots

    def batch(self, context: int, count: int, requests: slice = slice(None)) -> ForwardBatch:
        """Tokens ``[context, context + count)`` of each of the ``requests``."""
        runner, device, stop, rows = self._runner, self.slots.device, context + count, self.rows[requests]
        numbers = torch.arange(len(self.rows), device=device)[requests, None] * count
        tokens = (numbers + torch.arange(context, stop, device=device)) % runner.model_config.vocab_size
        return extend_batch(runner, self._tree, rows, tokens, self.slots[requests, context:stop], context)


@contextmanager
def borrowed(tree: RelayCache, consensus: Consensus, runner: Any, *, requests: int, tokens: int) -> Iterator[MadeUp]:
    """So many requests of so many tokens, or as much of it as there is. Raises RuntimeError, on every rank, where that
    is nothing."""
    allocator, pool = tree.token_to_kv_pool_allocator, runner.req_to_token_pool
    page = allocator.page_size
    each, taken, slots, error = 0, None, None, None
    try:
        try:
            free = allocator.available_size()
            each = min(-(-tokens // page) * page, free, pool.max_context_len) // page * page
            requests = min(requests, pool.available_size(), free // max(each, 1))
            taken = pool.alloc_rows(requests)
            slots = allocator.alloc(requests * each) if taken else None
            if taken and slots is not None:
                for row, own in zip(taken, slots.view(requests, each), strict=True):
                    pool.write((row, slice(0, each)), own.to(torch.int32))
        except Exception as caught:
            error = caught
        if not consensus.agree(error is None and slots is not None, each * requests) or not taken or slots is None:
            raise RuntimeError(f"no row of the request pool, or no {tokens} KV slots") from error
        yield MadeUp(runner, tree, taken, slots.long().view(requests, each))
    finally:
        if slots is not None:
            allocator.free(slots)
        if taken:
            pool.free_rows(taken)


@contextmanager
def forward_stream(runner: Any) -> Iterator[None]:
    """The stream on which the scheduler runs forwards when it overlaps, so that memory of these passes is found again
    there. What was launched before is done by then, and all of this when it is left."""
    if torch.device(runner.device).type == "cpu":
        yield
        return
    device = torch.get_device_module(runner.device)
    runner.forward_stream.wait_stream(device.current_stream())
    try:
        with device.stream(runner.forward_stream):
            yield
    finally:
        device.synchronize()


def prepared(tools: ForwardTools, batch: ForwardBatch) -> StagedForward:
    """A relay forward of a made-up batch: nothing is copied, every row runs. Raises Decline, on every rank, where one
    of them cannot prepare it."""
    planned = BatchPlan(Rotate(tools.runner.model_config.num_hidden_layers), [], [], [])
    staged, failure = StagedForward(tools, batch, planned), None
    try:
        staged.prepare()
    except Exception as error:
        failure = tools.failure("prepare", error)
    if not tools.consensus.agree(failure is None, 0):
        raise Decline(failure or "ranks_disagree", "start-up")
    return staged
