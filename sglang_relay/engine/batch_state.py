"""What SGLang has prepared for a batch's own rows, and what of it a stage, which runs other rows, can do with.

A stage (stage.py) is a copy of the batch with other rows in it. Each field of SGLang's ForwardBatch is replaced in that
copy, or means the same for any rows of the batch's requests, or has to be empty: what is prepared row by row for the
batch would be read for rows that it does not belong to. A field that is in neither list here, of a later SGLang too,
has to be empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from typing import Any

import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from sglang_relay.plan import Decline

REPLACED = frozenset(
    (
        *("forward_mode", "input_ids", "positions", "out_cache_loc", "hidden_states", "residual_stream"),
        *("extend_num_tokens", "extend_seq_lens", "extend_start_loc", "extend_seq_lens_cpu"),
        *("extend_logprob_start_lens_cpu", "num_token_non_padded"),
        *("global_num_token_non_padded", "global_num_token_non_padded_cpu"),
    )
)
"""Fields that a stage gives values of its own."""

SHARED = frozenset(
    (
        # The requests, whichever of their rows run.
        *("batch_size", "req_pool_indices", "req_pool_indices_cpu", "seq_lens", "seq_lens_cpu", "seq_lens_sum"),
        *("orig_seq_lens", "extend_prefix_lens", "extend_prefix_lens_cpu", "rids", "max_seq_len_host"),
        # Logits, whose rows are in every stage, and what follows them.
        *("return_logprob", "top_logprobs_nums", "token_ids_logprobs", "extend_input_logprob_token_ids_gpu"),
        *("sampling_info", "temperature", "top_p", "next_token_logits_buffer", "capture_hidden_mode"),
        *("watermark_prompt_tail_ids", "watermark_context_hash_history", "return_hidden_states_before_norm"),
        # What kind of step it is, for schedulers and graphs.
        *("is_prefill_only", "is_extend_in_batch", "global_forward_mode", "contains_last_prefill_chunk"),
        *("spec_algorithm", "split_index"),
        *("can_run_decode_cuda_graph", "can_run_dp_draft_cuda_graph", "can_run_dp_prefill_cuda_graph"),
        # Of SGLang's attention backends, in whose place a stage has its own (backend.py).
        *("kv_loc_plan", "kv_loc_cols", "out_cache_loc_is_physical", "forward_metadata_ready"),
        *("forward_metadata_planned_bs", "forward_metadata_planned_num_tokens", "forward_metadata_replan_equivalent"),
    )
)
"""Fields that mean the same for any rows of the batch's requests, or that a stage does not read."""

_REASONS = {
    "lora_ids": "lora_in_batch",
    "mm_inputs": "multimodal_in_batch",
    "input_embeds": "embeddings_in_batch",
    "replace_embeds": "embeddings_in_batch",
}


def require_own_rows_only(batch: ForwardBatch, *, adapters: bool = False) -> None:
    """Raises Decline, named after what ``batch`` holds that no stage of its rows can run with.

    The batch is the one that is about to run: SGLang adds decoding requests to a prefill after it was planned.

    adapters: whether requests with a LoRA adapter may be in it, as none of their rows is in the stage.
    """
    for name, empty in _PREPARED:
        value = getattr(batch, name)
        if not (_is_empty(value, empty) or (adapters and name == "lora_ids")):
            raise Decline(_REASONS.get(name, "prepared_rows"), f"{name} is prepared for the batch's own rows")


def _empty_values() -> tuple[tuple[str, Any], ...]:
    found = ((f.name, None if f.default is MISSING else f.default) for f in fields(ForwardBatch))
    return tuple((name, empty) for name, empty in found if name not in REPLACED | SHARED)


_PREPARED = _empty_values()


def _is_empty(value: Any, empty: Any) -> bool:
    """None, the field's default, or a list with nothing in it."""
    if value is None or value is empty:
        return True
    if isinstance(value, (list, tuple)):
        return all(part is None for part in value)
    return not isinstance(value, torch.Tensor) and value == empty


@contextmanager
def without_adapters(runner: Any, batch: ForwardBatch) -> Iterator[None]:
    """Run rows of the base model: LoRA layers route rows as ``batch`` has them, those of its adapters too. Without a
    prepared batch they do nothing (sglang/srt/lora/lora_manager.py, ``reset_lora_batch``)."""
    if runner.lora_manager is None:
        yield
        return
    runner.lora_manager.reset_lora_batch()
    try:
        yield
    finally:
        runner.lora_manager.prepare_lora_batch(batch)
