"""A prefill of ours: chosen positions of rows of the request pool, through SGLang's own way to a ForwardBatch."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.sampling.sampling_params import SamplingParams

if TYPE_CHECKING:
    from sglang_relay.engine.tree import RelayCache


def extend_batch(
    runner: Any, tree: RelayCache, rows: list[int], tokens: torch.Tensor, slots: torch.Tensor, context: int
) -> ForwardBatch:
    """Positions ``[context, context + count)`` of each of the ``rows``. The pool must hold the slots of all positions.

    tokens, slots: int64 [rows, count], of these positions. On a server with LoRA adapters the base model's rows are
    prepared.
    """
    n, count = tokens.shape
    stop, device = context + count, tokens.device
    batch = ScheduleBatch.init_new(
        [_request(stop) for _ in rows],
        runner.req_to_token_pool,
        tree.token_to_kv_pool_allocator,
        tree,
        runner.model_config,
        False,
        runner.spec_algorithm,
    )
    batch.forward_mode = ForwardMode.EXTEND
    batch.input_ids = tokens.flatten()
    batch.req_pool_indices, batch.req_pool_indices_cpu = torch.tensor(rows, device=device), torch.tensor(rows)
    batch.seq_lens, batch.seq_lens_cpu = torch.tensor([stop] * n, device=device), torch.tensor([stop] * n)
    batch.orig_seq_lens = batch.seq_lens.to(torch.int32)
    batch.seq_lens_sum = stop * n
    batch.out_cache_loc = slots.flatten()
    batch.prefix_lens, batch.extend_lens, batch.extend_num_tokens = [context] * n, [count] * n, count * n
    batch.extend_logprob_start_lens = [count] * n
    return ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)


def _request(tokens: int) -> Req:
    """Of the base model, and at the end of its prompt."""
    req = Req("", "", array("q", bytes(8 * tokens)), SamplingParams(max_new_tokens=1))
    req.full_untruncated_fill_ids, req.extend_end = req.origin_input_ids, tokens
    return req
