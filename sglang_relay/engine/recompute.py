"""Full prefill of what earlier chunks of a prompt have placed, where its last chunk does not repair it.

A probe leaves the repair of a prompt to its last chunk. If that one runs stock, after a failure, for an audit of
another request of the batch, or beside one with which nothing can be reused, its answer would read donor KV as it was
copied. So that KV is computed in front of it, a chunk's rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sglang_relay.engine.accounting import chunk_end, count_recomputed
from sglang_relay.engine.donors import tokens_of
from sglang_relay.engine.extend import extend_batch
from sglang_relay.engine.requests import RelayRequest, relay_of

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_relay.engine.manager import RelayManager


def recompute_placed(
    forward: Callable[..., Any], relay: RelayManager, runner: Any, reqs: Sequence[Req], batch: ForwardBatch
) -> None:
    """``batch``, of ``reqs``, is about to run on the stock path: bring the prompts that end in it up to their last
    chunk. forward: ModelRunner.forward. After a failure they are answered over what was placed, and never published.
    """
    waiting = [(req, state) for req in reqs if (state := relay_of(req)) is not None and _ends_unrepaired(req, state)]
    if not waiting or not batch.forward_mode.is_extend():
        return
    for req, state in waiting:
        try:
            _recompute(forward, relay, runner, req, state)
            count_recomputed(req, state)
        except Exception as error:
            relay.failure("recompute", error)
        state.placed.clear()
    # What was prepared for the batch was prepared for these forwards in between.
    batch.forward_metadata_ready = False
    if runner.lora_manager is not None:
        runner.lora_manager.prepare_lora_batch(batch)
    if relay.influence is not None:
        relay.influence.begin(list(reqs), batch, relayed=False)


def _ends_unrepaired(req: Req, state: RelayRequest) -> bool:
    return bool(state.placed) and chunk_end(req) == len(req.full_untruncated_fill_ids)


@torch.no_grad()
def _recompute(forward: Callable[..., Any], relay: RelayManager, runner: Any, req: Req, state: RelayRequest) -> None:
    row, stop = req.kv.req_pool_idx, req.prefix_len
    assert row is not None
    slots = runner.req_to_token_pool.req_to_token[row, :stop].long()
    tokens = torch.from_numpy(tokens_of(req)[:stop].astype("int64")).to(slots.device)
    start, step = state.placed[0].start, relay.chunk or stop
    for at in range(start, stop, step):
        end = min(at + step, stop)
        batch = extend_batch(runner, relay.tree, [row], tokens[None, at:end], slots[None, at:end], at)
        if relay.influence is not None:
            relay.influence.begin([], batch, relayed=False)  # of nobody
        forward(runner, batch)
