"""The attention backend of one relay forward: writes K/V of the active rows, attends by absolute position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_relay.attention import (
    AttentionEngine,
    Heads,
    Interpolation,
    StageAttention,
    choose_engine,
)
from sglang_relay.ops import Deviation, Ops, Pool, ProbeScores, choose_ops
from sglang_relay.rotary import DeltaRotary

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


def attention_of(runner: Any, wanted: str) -> AttentionEngine:
    """The implementation ``wanted`` (setting ``attention``) for the model's heads. Raises ConfigError."""
    pool = runner.token_to_kv_pool.k_buffer[0]
    return choose_engine(wanted, _heads(runner), dtype=runner.dtype, kv_dtype=pool.dtype, device=pool.device)


def ops_of(runner: Any, rotary: DeltaRotary, queries: int) -> Ops:
    """What copies, measures and scores for the model's pool. queries: most probe queries of a prompt."""
    pool = runner.token_to_kv_pool
    return choose_ops(Pool(pool.k_buffer, pool.v_buffer), rotary, _heads(runner), dtype=runner.dtype, queries=queries)


def _heads(runner: Any) -> set[Heads]:
    layers = [m for m in runner.model.modules() if isinstance(m, RadixAttention)]
    return {Heads(a.tp_q_head_num, a.tp_k_head_num, a.qk_head_dim, a.v_head_dim) for a in layers}


class DeviationProbe:
    """Value deviation between fresh and donor V at one layer (method.md: ``d = 1 - mean over heads of cosine``).

    heads: KV heads of this rank. rows: int64 [n], rows of the stage that are reused tokens. donor_slots: int64 [n],
    where their donors' V lies; read there and not at the target, which a model with fused K/V writes has already
    overwritten.
    """

    def __init__(self, layer: int, heads: int, rows: torch.Tensor, donor_slots: torch.Tensor) -> None:
        self.layer = layer
        self._rows = rows
        self._donor_slots = donor_slots
        self.distance_sum = torch.zeros(rows.numel(), dtype=torch.float32, device=rows.device)
        """float32 [n], 1 - cosine summed over this rank's KV heads."""
        self.heads = heads
        self.measured = False

    def measure(self, deviation: Deviation, value: torch.Tensor, value_buffer: torch.Tensor) -> None:
        """value: [rows, kv_heads, v_dim], fresh; value_buffer: [slots, kv_heads, v_dim], not yet overwritten."""
        self.measured = True
        self.distance_sum = deviation.distances(value, self._rows, value_buffer, self._donor_slots)


class LayerDone(BaseException):
    """Leaves the model in the middle of a layer whose K and V are all that was wanted of it.

    Raised on every rank at the same layer, between two collectives. No Exception: nothing went wrong, and SGLang logs
    those that leave a graph as failures of it.
    """


class AttentionProbe:
    """What the probe queries look at, summed over the layers (design: policy-study.md, "The probe policy").

    scores: planned for the probe queries of each prompt; over this rank's heads. Layer ``l`` of ``L`` counts
    ``(l + 1) / L``.
    """

    def __init__(self, scores: ProbeScores, layers: int) -> None:
        self.scores = scores
        self._layers = layers

    def measure(self, layer: RadixAttention, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.scores.add(query, keys, values, layer.scaling, (layer.layer_id + 1) / self._layers)


class RelayAttentionBackend(AttentionBackend):
    """Swapped in through the forward context for one relay forward; the server's own backend is untouched."""

    def __init__(self, runner: Any, ops: Ops) -> None:
        super().__init__()
        self._ops = ops
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token_pool = runner.req_to_token_pool
        self.stage: StageAttention | None = None
        self.deviation: DeviationProbe | None = None
        self.probe: AttentionProbe | None = None
        self.interpolations: list[Interpolation] = []
        """Of the prompts whose selected tokens this pass recomputes."""
        self.last_of_rows: int | None = None
        """The layer that ends with K and V (``LayerDone``)."""
        self.failure: Exception | None = None
        """The first host failure in a layer's attention. It is kept and not raised: the ranks meet in collectives
        between two layers, and a rank that left the model's forward would leave the others waiting there."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Nothing: ``stage`` is planned by the staged forward."""

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """q, k, v: the stage's rows. Returns [rows, heads * v_dim]; zeros once something has failed (``failure``)."""
        out = None
        if self.failure is None:
            try:
                out = self._extend(q, k, v, layer, forward_batch, save_kv_cache, kwargs)
            except Exception as error:
                self.failure = error
        if layer.layer_id == self.last_of_rows:
            raise LayerDone
        if out is None:
            rows = q.numel() // (layer.tp_q_head_num * layer.qk_head_dim)
            out = q.new_zeros(rows, layer.tp_q_head_num * layer.v_head_dim)
        return out

    def _extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
        kwargs: dict[str, Any],
    ) -> torch.Tensor | None:
        """None in the layer that ends with K and V.

        Raises NotImplementedError for attention arguments that have no place here (sinks, sparse indices).
        """
        if any(value is not None for value in kwargs.values()):
            raise NotImplementedError(f"attention arguments {sorted(kwargs)}")
        if self.stage is None:
            raise RuntimeError("no attention stage is planned")
        pool = self.token_to_kv_pool
        keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        probe = self.deviation
        if probe is not None and probe.layer == layer.layer_id and not probe.measured:
            fresh = v.view(-1, layer.tp_v_head_num, layer.v_head_dim)
            probe.measure(self._ops.deviation, fresh, values)
        if save_kv_cache:
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        for interpolation in self.interpolations:
            interpolation.apply(layer.layer_id, keys, values)
        query = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        if self.probe is not None:
            self.probe.measure(layer, query, keys, values)
        if layer.layer_id == self.last_of_rows:
            return None
        out = query.new_empty(query.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        self.stage.attend(query, keys, values, layer.scaling, out)
        return out.flatten(1)
