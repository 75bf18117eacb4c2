"""Named reasons why a server, a request or a batch is served by the stock path (design: sglang-seams.md, 4.6)."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from sglang.srt.environ import envs
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.runner.eager_runner import EagerRunner
from sglang.srt.utils.common import require_mlp_sync
from torch import nn

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext

ADDITIVE_ERROR = 1e-4
"""Largest violation of cos/sin additivity that still is fp32 rounding; length-dependent tables exceed it by far."""


def server_reasons(ctx: TreeCacheBuildContext) -> list[str]:
    """Every reason why this server cannot relay; empty when it can."""
    reasons = [name for name, hit in _deployment(ctx.server_args) if hit]
    if pads_batches():
        reasons.append("padded_batches")
    reasons += [name for name, hit in _tree(ctx) if hit]
    reasons += _model(ctx.tp_worker.model_runner)
    return reasons


def _deployment(args: Any) -> list[tuple[str, bool]]:
    def on(name: str) -> bool:
        return bool(getattr(args, name))

    return [
        ("pipeline_parallel", args.pp_size > 1),
        ("dp_attention", on("enable_dp_attention")),
        ("context_parallel", args.attn_cp_size > 1 or args.dcp_size > 1 or on("enable_prefill_cp")),
        # Rows are spread over the ranks inside the model, in shares of the batch as it was scheduled.
        (
            "sequence_parallel",
            on("enable_layernorm_sp") or on("enable_attn_tp_input_scattered") or on("disable_attn_tp_gather"),
        ),
        ("speculative_decoding", args.speculative_algorithm is not None),
        ("pd_disaggregation", args.disaggregation_mode != "null"),
        ("two_batch_overlap", on("enable_two_batch_overlap") or on("enable_single_batch_overlap")),
        ("pd_multiplexing", on("enable_pdmux")),
        ("deterministic_inference", on("enable_deterministic_inference")),
        ("diffusion_llm", args.dllm_algorithm is not None),
        ("elastic_ep", args.elastic_ep_backend is not None),
        # A relayed forward is none of those whose experts are counted.
        ("expert_statistics", on("enable_eplb") or args.expert_distribution_recorder_mode is not None),
        ("retraction_host_backup", args.disaggregation_decode_retraction_backup not in (None, "none")),
        ("external_kv_store", on("enable_lmcache") or on("enable_unified_cache_external_linker")),
        ("unified_memory", on("enable_unified_memory")),
        ("kv_canary", str(args.kv_canary) not in ("None", "none", "off", "False")),
        ("session_radix_cache", on("enable_session_radix_cache")),
        # Front ends that are no Python, or another's: they know neither the report nor which requests prime.
        ("rust_front_end", envs.SGLANG_RUST_SERVER.get()),
        ("grpc_front_end", on("smg_grpc_mode") or on("grpc_mode")),
    ]


def pads_batches() -> bool:
    """Whether SGLang pads a batch, or spreads it over the ranks, before the model runs (``prepare_mlp_sync_batch``,
    ``attn_tp_sequence_sharded``): ``--moe-a2a-backend``, ``--moe-dense-tp-size``, data-parallel attention. A stage is a
    batch that nobody has padded, so its ranks would exchange other numbers of rows than they expect. SGLang's own
    condition, of the server that this process has published."""
    return bool(require_mlp_sync())


def _tree(ctx: TreeCacheBuildContext) -> list[tuple[str, bool]]:
    return [
        ("radix_cache_disabled", bool(ctx.disable_radix_cache)),
        ("sliding_window", bool(ctx.is_hybrid_swa)),
        ("state_space_model", bool(ctx.is_hybrid_ssm)),
        ("sparse_attention", bool(ctx.is_dsa)),
    ]


def _model(runner: Any) -> list[str]:
    model, config, pool = runner.model, runner.model_config, runner.token_to_kv_pool
    attention = [m for m in model.modules() if isinstance(m, RadixAttention)]
    checks = [
        ("embedding_model", not config.is_generation),
        ("multimodal_model", bool(config.is_multimodal)),
        ("encoder_decoder", bool(config.is_encoder_decoder)),
        # A subclass stores something else (latent KV, quantised KV, two sub-pools) behind the same methods.
        ("kv_pool_layout", type(pool) is not MHATokenToKVPool or pool.kv_cache_layout != "nhd"),
        ("quantised_kv", pool.dtype.itemsize < 2),
        ("model_without_layer_split", not splits_layers(model)),
        ("model_prepares_batches", hasattr(model, "prepare_forward_batch") or hasattr(model, "prepare_for_forward")),
        ("attention_layers", [a.layer_id for a in attention] != list(range(config.num_hidden_layers))),
        ("attention_kind", any(_unusual(a) for a in attention)),
    ]
    reasons = [name for name, hit in checks if hit]
    if find_rotary(model) is None:
        reasons.append("rotary_embedding")
    return reasons


def beside_slots_reason(runner: Any, args: Any) -> str | None:
    """Why nothing can be collected by hooks on the model's modules and kept by KV slot, or None. args: ServerArgs."""
    graphs = (runner.decode_cuda_graph_runner, runner.prefill_cuda_graph_runner)
    if any(r is not None and not isinstance(r, EagerRunner) for r in graphs):
        return "captured_graphs"  # a step that is replayed calls no hook
    # What is loaded from the host's memory is written without a forward.
    return "hierarchical_cache" if args.enable_hierarchical_cache else None


def _unusual(layer: RadixAttention) -> bool:
    return bool(
        layer.is_cross_attention
        or layer.sliding_window_size > -1
        or layer.logit_cap
        or layer.use_irope
        or layer.xai_temperature_len > 0
        or layer.attn_type != AttentionType.DECODER
        or layer.tp_q_head_num % layer.tp_k_head_num
    )


def splits_layers(model: nn.Module) -> bool:
    """Whether the model can run a range of its layers (models/llama.py, ``forward_split_prefill``)."""
    method = getattr(model, "forward_split_prefill", None)
    if method is None:
        return False
    names = list(inspect.signature(method).parameters)
    return names[:4] == ["input_ids", "positions", "forward_batch", "split_interval"]


def find_rotary(model: nn.Module) -> RotaryEmbedding | None:
    """The one static rotary embedding of all layers, or None: none, several, or one whose table depends on the input.

    SGLang shares one module per parameter set (``get_rope``), so more than one object means more than one rotation.
    """
    found = {id(m): m for m in model.modules() if isinstance(m, RotaryEmbedding)}
    if len(found) != 1:
        return None
    (rotary,) = found.values()
    if "mrope" in type(rotary).__name__.lower() or hasattr(rotary, "mrope_section"):
        return None
    return rotary


def request_reason(req: Req, has_multimodal: bool, *, primes: bool) -> str | None:
    """Why this request cannot relay (known when it is made), or None.

    One that generates nothing is there for what it says about its prompt (``/v1/score``, ``/v1/rerank``, logprobs of
    given tokens), which is to be full prefill's word; or for KV that is donated. Unless it ``primes``.
    """
    prefill_only = req.sampling_params.max_new_tokens == 0 and not primes
    checks = (
        ("streaming_session", req.session is not None and req.session.streaming),
        ("multimodal_input", has_multimodal),
        ("input_embeddings", req.input_embeds is not None or req.positional_embed_overrides is not None),
        ("lora", req.lora_id is not None),
        ("routed_experts_requested", bool(req.return_routed_experts or req.return_indexer_topk)),
        ("scoring", _reads_positions(req) or (prefill_only and bool(req.logprob.token_ids_logprob))),
        ("prefill_only", prefill_only),
        ("cache_insert_disabled", bool(req.skip_radix_cache_insert)),
    )
    return next((name for name, hit in checks if hit), None)


def _reads_positions(req: Req) -> bool:
    """Whether scores are read at given positions of the prompt (several items, or anchors, in one sequence)."""
    return req.multi_item_delimiter_indices is not None or req.token_indices_to_pool is not None


def neighbour_reason(req: Req) -> str | None:
    """Why no batch with this request in it can relay, or None. Such a request and one that reuses text are not admitted
    into one batch (adder.py); a decoding one may join it all the same (mixed chunks)."""
    checks = (
        ("hidden_states_in_batch", bool(req.return_hidden_states)),
        ("lora_in_batch", req.lora_id is not None),
        ("multimodal_in_batch", req.multimodal_inputs is not None),
        ("embeddings_in_batch", req.input_embeds is not None or req.positional_embed_overrides is not None),
        ("routed_experts_in_batch", bool(req.return_routed_experts or req.return_indexer_topk)),
        ("scoring_in_batch", _reads_positions(req)),
        ("beam_search_in_batch", req.beam_group is not None),
    )
    return next((name for name, hit in checks if hit), None)


def batch_reason(batch: ScheduleBatch) -> str | None:
    """Why this batch cannot relay, or None. One such request makes the whole batch run stock."""
    if getattr(batch, "hicache_consumer_index", -1) >= 0:
        return "host_cache_load"
    return next(filter(None, map(neighbour_reason, batch.reqs)), None)
