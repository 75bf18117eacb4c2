"""SGLang attention backend over `sdpa`, under the stock name ``torch_native``.

The name is kept because SGLang keys special cases on it: no graphs (`arg_groups/attention_hook.py`) and slot look-ups
without Triton (`mem_cache/allocation.py`). Layers that `sdpa` does not cover (sliding window, cross and encoder
attention, K/V stored in another dtype) run on SGLang's own implementation, from which this one derives.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_torch_cpu import sdpa

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


class BatchPlan(NamedTuple):
    """What every layer of one forward shares."""

    batch: ForwardBatch
    sequences: list[sdpa.Sequence]
    masks: dict[torch.dtype, torch.Tensor]


class TorchCpuAttnBackend(TorchNativeAttnBackend):
    """Attention for extend and decode; slots are looked up once per forward instead of once per layer."""

    plan: BatchPlan | None = None

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__(model_runner)
        assert model_runner.req_to_token_pool is not None
        self.req_to_token_pool = model_runner.req_to_token_pool

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        super().init_forward_metadata(forward_batch)
        self.plan = self._make_plan(forward_batch)

    def _make_plan(self, batch: ForwardBatch) -> BatchPlan:
        kv_lens = batch.seq_lens.tolist()
        rows = [1] * len(kv_lens)
        if not batch.forward_mode.is_decode_or_idle():
            assert batch.extend_seq_lens is not None
            rows = batch.extend_seq_lens.tolist()
        table = self.req_to_token_pool.req_to_token
        sequences, start = [], 0
        for request, kv_len, n in zip(batch.req_pool_indices.tolist(), kv_lens, rows, strict=True):
            if n > 0:
                slots = sdpa.as_slots(table[request, :kv_len])
                sequences.append(sdpa.Sequence(start, start + n, kv_len, slots))
            start += n
        return BatchPlan(batch, sequences, {})

    def _attend(self, q: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch) -> torch.Tensor:
        plan = self.plan
        # A model may run a batch that it derived itself (split prefill, two-batch overlap).
        if plan is None or plan.batch is not forward_batch:
            plan = self.plan = self._make_plan(forward_batch)
        k_buffer = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        v_buffer = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        out = query.new_empty(query.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        for start, stop, _, slots in plan.sequences:
            key, value = sdpa.gather(k_buffer, slots), sdpa.gather(v_buffer, slots)
            if stop - start == 1:
                out[start] = sdpa.decode(query[start], key, value, layer.scaling)
            else:
                mask = _mask(plan, query.dtype)
                sdpa.extend(query[start:stop], key, value, layer.scaling, mask, out[start:stop])
        return out.flatten(1)

    def _covers(self, q: torch.Tensor, layer: RadixAttention, forward_batch: ForwardBatch) -> bool:
        window = layer.sliding_window_size
        return (
            not layer.is_cross_attention
            and layer.attn_type == AttentionType.DECODER
            and (window is None or window < 0)
            and forward_batch.encoder_lens is None
            and self.token_to_kv_pool.get_key_buffer(layer.layer_id).dtype == q.dtype
        )

    def _forward(self, stock, q, k, v, layer, forward_batch, save_kv_cache):
        if layer.logit_cap > 0:
            # SGLang's torch_native ignores the cap, and so would answer wrongly without a word.
            raise NotImplementedError(f"layer {layer.layer_id} caps its attention logits; no CPU attention here does")
        if not self._covers(q, layer, forward_batch):
            return stock(q, k, v, layer, forward_batch, save_kv_cache)
        if save_kv_cache and k is not None and v is not None:
            loc = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
            self.token_to_kv_pool.set_kv_buffer(layer, loc, k, v)  # pyright: ignore[reportArgumentType]
        return self._attend(q, layer, forward_batch)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        """See `AttentionBackend.forward_extend`; q ``[tokens, heads * dim]``, returns ``[tokens, heads * v_dim]``."""
        return self._forward(super().forward_extend, q, k, v, layer, forward_batch, save_kv_cache)

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True):
        """See `AttentionBackend.forward_decode`; shapes as in `forward_extend`, one token per sequence."""
        return self._forward(super().forward_decode, q, k, v, layer, forward_batch, save_kv_cache)


def _mask(plan: BatchPlan, dtype: torch.dtype) -> torch.Tensor:
    """The forward's right-aligned mask, as large as its largest sequence needs."""
    if dtype not in plan.masks:
        rows = min(sdpa.BLOCK_ROWS, max(s.stop - s.start for s in plan.sequences))
        plan.masks[dtype] = sdpa.causal_mask(rows, max(s.kv_len for s in plan.sequences), dtype)
    return plan.masks[dtype]


def register() -> None:
    """Replace SGLang's ``torch_native`` by this backend in the calling process."""
    register_attention_backend("torch_native")(TorchCpuAttnBackend)
