"""What SGLang prepares for a batch's own rows reaches no stage: each field of its ForwardBatch is replaced, shared, or
has to be empty."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

from sglang_relay.engine.batch_state import REPLACED, SHARED, require_own_rows_only
from sglang_relay.plan import Decline

NAMES = [f.name for f in fields(ForwardBatch)]
OTHERS = sorted(set(NAMES) - REPLACED - SHARED)


def batch(**given: object) -> ForwardBatch:
    rows = torch.arange(3)
    required = {"forward_mode": ForwardMode.EXTEND, "batch_size": 1, "input_ids": rows, "req_pool_indices": rows[:1]}
    required |= {"seq_lens": rows[2:], "out_cache_loc": rows, "seq_lens_sum": 3}
    return replace(ForwardBatch(**required), **given)  # type: ignore[arg-type]


def test_every_field_that_is_named_is_one_of_sglangs() -> None:
    assert not (REPLACED | SHARED) - set(NAMES)
    assert not REPLACED & SHARED
    assert {"lora_ids", "mm_inputs", "mrope_positions", "global_num_tokens_cpu", "spec_info"} <= set(OTHERS)


def test_a_batch_of_plain_requests_may_be_relayed() -> None:
    require_own_rows_only(batch(lora_ids=[None], mm_inputs=[None], rids=["a"], return_logprob=True))


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_prepared_for_other_rows_is_declined_by_name(name: str) -> None:
    with pytest.raises(Decline) as caught:
        require_own_rows_only(batch(**{name: ["something"]}))
    assert name in caught.value.detail
    assert caught.value.reason in ("prepared_rows", "lora_in_batch", "multimodal_in_batch", "embeddings_in_batch")


def test_adapters_beside_a_stage_without_their_rows() -> None:
    some = batch(lora_ids=[None, "adapter"])
    require_own_rows_only(some, adapters=True)
    with pytest.raises(Decline, match="lora_in_batch"):
        require_own_rows_only(some)
