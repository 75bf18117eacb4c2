"""Every reason for which a request is served without reuse: its cause, and what one can do.

``python -m sglang_relay.declines > docs/declines.md`` writes the page. Nothing that serves requests reads this table.
"""

from __future__ import annotations

from typing import NamedTuple


class Reason(NamedTuple):
    """A sentence or two each. remedy: what one can do; it begins with ``none:`` where that is nothing."""

    cause: str
    remedy: str


_MODEL = "none: such models are served stock."
_RESTART = "Read the traceback in the log, and restart the server."
_REPORT = "none: it is a fault of this extension. Report it with the line of the log that names it."
_STOCK = "none: such requests are served stock."
_ONCE = "none: the request is served stock. The next one may relay."
_EMBEDDINGS = "none: reused tokens enter as embeddings."
_TRACEBACK = "Read the traceback in the log, and report it. Where memory ran out, lower --mem-fraction-static."
_OWN_BATCH = (
    "none: prefill requests with this feature wait for a batch of their own. One that decodes joins a batch only under "
    "--enable-mixed-chunk."
)


def _without(flags: str) -> str:
    return f"Start the server without {flags}."


SERVER = {
    "pipeline_parallel": Reason("The model's layers are spread over pipeline stages.", "Start with --pp-size 1."),
    "dp_attention": Reason("Attention is data-parallel.", _without("--enable-dp-attention")),
    "context_parallel": Reason(
        "A prompt's tokens are spread over ranks.",
        "Start with --attn-cp-size 1 and --dcp-size 1, and without --enable-prefill-cp.",
    ),
    "sequence_parallel": Reason(
        "The model spreads a batch's rows over the ranks.",
        _without("--enable-layernorm-sp, --enable-attn-tp-input-scattered and --disable-attn-tp-gather"),
    ),
    "speculative_decoding": Reason("A draft model or algorithm is in use.", _without("--speculative-algorithm")),
    "pd_disaggregation": Reason("Prefill and decode run on different servers.", _without("--disaggregation-mode")),
    "two_batch_overlap": Reason(
        "A batch is split so that its parts overlap.",
        _without("--enable-two-batch-overlap and --enable-single-batch-overlap"),
    ),
    "pd_multiplexing": Reason("Prefill and decode share the GPU at the same time.", _without("--enable-pdmux")),
    "deterministic_inference": Reason(
        "The server promises equal answers to equal prompts. A relayed answer depends on what is cached.",
        _without("--enable-deterministic-inference"),
    ),
    "diffusion_llm": Reason("The model decodes by diffusion.", _without("--dllm-algorithm")),
    "elastic_ep": Reason("Expert parallelism may lose ranks while it runs.", _without("--elastic-ep-backend")),
    "expert_statistics": Reason(
        "SGLang counts the experts of its forwards. A relayed forward is none of those.",
        _without("--enable-eplb and --expert-distribution-recorder-mode"),
    ),
    "retraction_host_backup": Reason(
        "KV of retracted requests goes to the host's memory and comes back without a forward.",
        _without("--disaggregation-decode-retraction-backup"),
    ),
    "external_kv_store": Reason(
        "KV comes from outside the server.", _without("--enable-lmcache and --enable-unified-cache-external-linker")
    ),
    "unified_memory": Reason("KV pools share one memory.", _without("--enable-unified-memory")),
    "kv_canary": Reason(
        "SGLang checks who writes KV. The copies of a relay are not known to it.", "Start with --kv-canary none."
    ),
    "session_radix_cache": Reason("Sessions have a tree of their own.", _without("--enable-session-radix-cache")),
    "rust_front_end": Reason(
        "SGLang's Rust server answers. No Python plugin reaches it.", "Start without SGLANG_RUST_SERVER."
    ),
    "grpc_front_end": Reason(
        "The front end is gRPC. No Python plugin reaches it.", _without("--smg-grpc-mode and --grpc-mode")
    ),
    "padded_batches": Reason(
        "SGLang pads batches, or gathers them over the ranks, before the model runs.",
        _without("--moe-a2a-backend, --moe-dense-tp-size and --enable-dp-attention"),
    ),
    "radix_cache_disabled": Reason("There is no prefix tree to keep donors in.", _without("--disable-radix-cache")),
    "sliding_window": Reason("Some layers attend to a window only.", _MODEL),
    "state_space_model": Reason("Some layers keep a recurrent state instead of KV.", _MODEL),
    "sparse_attention": Reason("Attention picks its keys by an index of its own.", _MODEL),
    "embedding_model": Reason(
        "The server makes embeddings and generates nothing.", "Start without --is-embedding, if the model generates."
    ),
    "multimodal_model": Reason("The model takes images, audio or video.", _MODEL),
    "encoder_decoder": Reason("The model has an encoder.", _MODEL),
    "kv_pool_layout": Reason(
        "The KV pool is not the plain one of one K and one V per token, head and layer.",
        "Unset what changes its layout: SGLANG_USE_HND_KVCACHE, SGLANG_AITER_KV_CACHE_LAYOUT, "
        "--enable-page-major-kv-layout. For models with latent KV (MLA) there is none.",
    ),
    "quantised_kv": Reason("KV is kept in 8 bits or fewer.", "Start with --kv-cache-dtype auto."),
    "model_without_layer_split": Reason(
        "The model's code cannot run a range of its layers (no forward_split_prefill as the relay calls it).", _MODEL
    ),
    "model_prepares_batches": Reason("The model's code prepares something for each batch's rows.", _MODEL),
    "attention_layers": Reason("The model has not exactly one attention per layer, in order.", _MODEL),
    "attention_kind": Reason(
        "An attention layer is not plain causal attention over all tokens: cross attention, a window, a logit cap, or "
        "scaling by length.",
        _MODEL,
    ),
    "rotary_embedding": Reason(
        "The model has no rotary embedding, has several, or one whose angles depend on the input.", _MODEL
    ),
    "rotary_table_not_static": Reason("The rotary table depends on the prompt's length.", _MODEL),
    "rotary_table_short": Reason(
        "The rotary table has fewer positions than the context. A request says so, too, where one of its positions is "
        "outside the table.",
        "Start with a smaller --context-length.",
    ),
    "rotary_probe_failed": Reason("The start-up check of the rotary embedding failed.", _RESTART),
    "layers_without_rotation": Reason(
        "Keys of some layers do not follow the model's rotary embedding. The log names the layers.", _MODEL
    ),
    "rank_sums_failed": Reason("The tensor-parallel ranks cannot sum what they measure.", _RESTART),
    "layer_split_differs": Reason(
        "The model's layers, run in parts, gave other logits or KV than the whole model. The log says by how much.",
        _MODEL,
    ),
    "layer_split_failed": Reason("The start-up check that runs the model's layers in parts failed.", _RESTART),
    "relay_pass_failed": Reason(
        "A relayed pass of the cost model's calibration failed. It would fail in service, too.", _RESTART
    ),
    "hook_missing": Reason(
        "SGLang did not apply one of the extension's hooks. The log names it.",
        "Run sglang-relay doctor: it compares the installed SGLang with the one this extension is made for.",
    ),
}
"""Known when the server is started. Reported as ``unsupported:NAME``."""

REQUEST = {
    "relay_off": Reason(
        'The request, or the setting default, says relay: "off".', 'Ask for relay: "on" where reuse is wanted.'
    ),
    "exact_requested": Reason(
        'The request, or the setting default, says relay: "exact".', 'Ask for relay: "on" where reuse is wanted.'
    ),
    "name_too_long": Reason(
        "extra_key or cache_salt has more than 1,024 characters; the index would have to remember it.",
        "Send a shorter one.",
    ),
    "no_cache_salt": Reason(
        "The server is relay-isolated, and the request has neither cache_salt nor relay_scope.", "Send one of them."
    ),
    "bad_custom_params": Reason(
        "A relay parameter of the request is unknown or has a value that is not allowed. The report's why says which, "
        "and what is allowed.",
        "Correct the parameter.",
    ),
    "streaming_session": Reason(
        "The request belongs to a streaming session, which keeps its KV outside the tree.",
        "Open the session without streaming.",
    ),
    "multimodal_input": Reason("The request brings images, audio or video.", _STOCK),
    "input_embeddings": Reason("The request brings embeddings in the place of tokens.", _STOCK),
    "lora": Reason("The request asks for a LoRA adapter.", _STOCK),
    "routed_experts_requested": Reason(
        "The request wants the experts or the sparse keys of every token. A copied token has none.",
        "Ask without return_routed_experts and return_indexer_topk.",
    ),
    "scoring": Reason(
        "The request scores its prompt, as /v1/score and /v1/rerank do. The score is full prefill's.", _STOCK
    ),
    "prefill_only": Reason(
        "The request generates nothing (max_new_tokens: 0). Its KV is that of full prefill.",
        "Send relay_primes: true where it computes KV for a relayed request that follows.",
    ),
    "cache_insert_disabled": Reason("SGLang keeps the request's KV out of the tree.", _STOCK),
}
"""Known when the request is made."""

MATCH = {
    "nothing_to_reuse": Reason(
        "No donor holds a run of the prompt's tokens that is long enough (min_segment).",
        "See that the donor's tokens stand in the prompt unchanged, and that both requests share cache_salt, extra_key "
        "and relay_scope.",
    ),
    "below_min_relayed": Reason(
        "The donors hold fewer of the prompt's tokens than min_relayed.", "Lower the setting min_relayed."
    ),
    "long_suffix": Reason(
        "Under probe, too many fresh tokens follow the last segment per reused token.", "Raise the setting route_above."
    ),
    "repair_exceeds_chunk": Reason(
        "The repair would take more rows than a prefill chunk has.",
        "Raise --chunked-prefill-size, or ask for a smaller relay_budget.",
    ),
    "predicted_slower": Reason(
        "The cost model predicts that prefill is faster. The report's predicted_ms says by how much.",
        "none: reuse would cost time. The setting cost_model: false relays all the same.",
    ),
    "breaker_open": Reason(
        "Live audits found relayed answers of this policy, budget and tenant outside the certified band. Trials turn "
        "relay on again.",
        "Look at audit in /server_info. Measure the model with sglang-relay certify, or ask for a larger relay_budget.",
    ),
    "hidden_states_requested": Reason(
        "The request wants hidden states of every token. A copied token has none.",
        "Ask without return_hidden_states.",
    ),
}
"""Known when donors are looked for."""

BATCH = {
    "other_policy_in_batch": Reason("Another request of the batch reuses text under another policy.", _ONCE),
    "hidden_states_in_batch": Reason("A request of the batch wants hidden states.", _OWN_BATCH),
    "lora_in_batch": Reason("A request of the batch has a LoRA adapter.", _OWN_BATCH),
    "multimodal_in_batch": Reason("A request of the batch has images, audio or video.", _OWN_BATCH),
    "embeddings_in_batch": Reason("A request of the batch has embeddings in the place of tokens.", _OWN_BATCH),
    "routed_experts_in_batch": Reason("A request of the batch wants the experts of every token.", _OWN_BATCH),
    "scoring_in_batch": Reason("A request of the batch scores positions of its prompt.", _OWN_BATCH),
    "beam_search_in_batch": Reason("A request of the batch decodes by beam search.", _OWN_BATCH),
    "host_cache_load": Reason("The batch loads KV from the host's memory while it runs (hierarchical cache).", _ONCE),
    "prepared_rows": Reason(
        "SGLang has prepared something for the batch's own rows. The report's why names the field.", _ONCE
    ),
    "pool_pressure": Reason(
        "The donors, locked, would leave no room for the batch.",
        "Give the KV pool more memory (--mem-fraction-static), or send fewer requests at a time.",
    ),
    "input_logprobs": Reason(
        "Prompt logprobs are wanted inside a reused segment.", "Raise logprob_start_len, or ask without them."
    ),
    "audited": Reason(
        "A request of the batch was audited: the batch was computed both ways, and the exact answers were served.",
        "none: this is the price of live audits. The setting audit_every says how often.",
    ),
}
"""Known when a batch is planned or run."""

_STEPS = {
    "adopt": "Taking in a request",
    "match": "Looking for donors",
    "plan": "Planning a batch",
    "prepare": "Laying out a batch",
    "place": "Copying KV",
    "forward": "A relayed forward",
    "select": "Selecting the tokens to recompute",
    "hand_over": "Handing over from one set of rows to the next",
    "attention": "Attention of scattered rows",
    "report": "Counting what a repair did",
}

FAILURE = {
    "ranks_disagree": Reason(
        "The tensor-parallel ranks came to different decisions, or one of them failed.",
        "Read the log of every rank. Report it where none of them names a failure.",
    ),
    "bad_plan": Reason("A plan would have indexed outside its chunk or the KV pool.", _REPORT),
    "unexpected_forward_mode": Reason("The batch that ran is no prefill, but a prefill was planned.", _REPORT),
    "unexpected_batch_shape": Reason("The batch that ran has other rows than the one that was planned.", _REPORT),
    "host_invariant:unfinished_prompts": Reason(
        "A batch has an unfinished prompt that SGLang's scheduler does not know of.", _REPORT
    ),
    "host_invariant:chunk_rows": Reason("A batch has more rows than a prefill chunk.", _REPORT),
    **{f"internal_error:{step}": Reason(f"{does} failed.", _TRACEBACK) for step, does in _STEPS.items()},
    "internal_error:weights": Reason(
        "The weights changed, and what was learnt of the old ones could not be forgotten. Nothing relays any more "
        "(unsupported:internal_error:weights).",
        _RESTART,
    ),
}
"""Host failures inside the extension, which end in SGLang's stock path."""

UNAVAILABLE = {
    "off": Reason("The setting influence or entry does not ask for it.", "Set influence: auto, or entry: hidden."),
    "captured_graphs": Reason(
        "A step that is replayed from a CUDA graph calls no hook.", _without("CUDA graphs (--disable-cuda-graph)")
    ),
    "hierarchical_cache": Reason(
        "KV that comes from the host's memory brings nothing with it.", _without("--enable-hierarchical-cache")
    ),
    "first_layer": Reason(
        "layer_range starts at layer 0, where what enters are the embeddings.", "Give a layer_range that starts later."
    ),
    "not_held": Reason(
        "A reused token has no hidden state: it was computed before they were kept, or its state was lost.", _EMBEDDINGS
    ),
    "model_without_capture": Reason("The model's decoder layers do not give out what enters them.", _EMBEDDINGS),
}
"""Why ``influence`` or ``entry`` of policy ``relay`` is not to be had. The request is relayed all the same."""

SECTIONS = (
    (
        "Server",
        "Decided at start-up, for every request. A report names the first as `unsupported:NAME`; `unsupported` in "
        "`/server_info` lists all.",
        SERVER,
    ),
    ("Request", "Decided when a request arrives.", REQUEST),
    ("Match", "Decided when donors are looked for.", MATCH),
    ("Batch", "Decided when a batch is planned or run, most of them for all its requests.", BATCH),
    ("Failure", "A host failure in the extension: the request, or its whole batch, ran on the stock path.", FAILURE),
    (
        "Influence and entry",
        "No declines: why `influence` (`unavailable:NAME`) or `entry` (`embeddings:NAME`) is missing under policy "
        "`relay`. The request is relayed without it.",
        UNAVAILABLE,
    ),
)
"""Title, introduction and reasons, in the order in which they are decided."""

_HEAD = """\
# Declines

Why a request was served without reuse: `declined` in its report, the label `reason` of `sglang_relay:declined_total`,
`declined` under `internal_states[].relay.stats` in `/server_info`. A decline costs nothing but speed: SGLang prefills
the request, or the chunk. The report's `why` says more where the name alone does not.

Written by `python -m sglang_relay.declines > docs/declines.md`.
"""


def page() -> str:
    """The text of ``docs/declines.md``."""
    parts = [_HEAD]
    for title, text, reasons in SECTIONS:
        rows = [f"| `{name}` | {reason.cause} | {reason.remedy} |" for name, reason in reasons.items()]
        parts.append(
            "\n".join([f"\n## {title}\n", f"{text}\n", "| reason | cause | remedy |", "|---|---|---|", *rows, ""])
        )
    return "".join(parts)


if __name__ == "__main__":
    print(page(), end="")
