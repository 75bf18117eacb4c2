"""What cannot be relayed is served stock, with a name for the reason, and a failure inside the relay never reaches a
client."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from plugins import Inspector, install_plugin
from sglang.srt.layers.moe.utils import initialize_moe_config
from sglang.srt.runtime_context import create_context, use_context
from sglang.srt.server_args import ServerArgs
from tiny_model import make_tiny_llama

from sglang_relay.engine import guards
from sglang_relay.measure.server import Server, ServerError

VOCAB = 1024


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("guards"), vocab=VOCAB)


@pytest.fixture(scope="module")
def inspector(tmp_path_factory: pytest.TempPathFactory) -> Inspector:
    return Inspector(tmp_path_factory.mktemp("inspector"))


@pytest.fixture(scope="module")
def server(model: Path, inspector: Inspector) -> Iterator[Server]:
    flags = ("--radix-cache-backend", "relay", "--enable-return-hidden-states")
    with Server(model, *flags, env=inspector.env) as server:
        yield server


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.node.name)


def tokens(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(n)]


def ask(server: Server, prompt: list[int], new: int = 8, fields: dict[str, Any] | None = None, **params: Any) -> Any:
    wanted = {"return_logprob": True, **(fields or {})}
    return server.generate(prompt, max_new_tokens=new, ignore_eos=True, fields=wanted, custom_params=params or None)


def consumer(server: Server, rng: random.Random) -> list[int]:
    """A prompt that a donor covers in its middle."""
    donor = ask(server, tokens(rng, 20), new=101)["output_ids"][:100]
    return [*tokens(rng, 12), *donor, *tokens(rng, 5)]


def report_of(answer: Any) -> dict[str, Any]:
    return answer["meta_info"]["relay"]


def stats(server: Server) -> dict[str, Any]:
    return server.get("/server_info")["internal_states"][0]["relay"]["stats"]


# ---------------------------------------------------------------------- requests


def test_prompt_logprobs_inside_a_segment_are_not_relayed(server: Server, rng: random.Random) -> None:
    """Only what lies before the first wanted row may be copied: a copied row has no hidden state."""
    prompt = consumer(server, rng)
    answer = ask(server, prompt, fields={"logprob_start_len": 60})
    report = report_of(answer)
    assert report["relayed"] + report["recomputed"] == 0, report
    exact = ask(server, prompt, fields={"logprob_start_len": 60}, relay="off")
    assert len(answer["meta_info"]["input_token_logprobs"]) == len(prompt) - 60
    assert answer["meta_info"]["input_token_logprobs"][1:] == exact["meta_info"]["input_token_logprobs"][1:]


def test_prompt_logprobs_behind_a_segment_go_with_relay(server: Server, rng: random.Random) -> None:
    prompt = consumer(server, rng)
    start = len(prompt) - 3
    answer = ask(server, prompt, fields={"logprob_start_len": start}, relay_policy="full")
    assert report_of(answer)["recomputed"] >= 90
    exact = ask(server, prompt, fields={"logprob_start_len": start}, relay="off")
    got, want = (a["meta_info"]["input_token_logprobs"] for a in (answer, exact))
    assert [g[1] for g in got] == [w[1] for w in want]
    assert all(abs(g[0] - w[0]) < 1e-4 for g, w in zip(got[1:], want[1:], strict=True))


def test_hidden_states_are_declined_by_name(server: Server, rng: random.Random) -> None:
    prompt = consumer(server, rng)
    answer = ask(server, prompt, fields={"return_hidden_states": True})
    assert report_of(answer)["declined"] == "hidden_states_requested"
    assert len(answer["meta_info"]["hidden_states"][0]) == len(prompt)


def test_hidden_states_behind_a_relayed_prefix(server: Server, rng: random.Random) -> None:
    """They are computed over the KV that a relayed request of the same tier left, as any next turn is."""
    prompt = consumer(server, rng)
    assert report_of(ask(server, prompt, relay_policy="rotate"))["segments"] == 1
    fields = {"return_hidden_states": True}
    over_relayed = ask(server, [*prompt, 7, 8, 9], fields=fields, relay_policy="rotate")
    report = report_of(over_relayed)
    assert (report["exact"] + report["approximate"], report["fresh"]) == (len(prompt), 3), report
    assert report["approximate"] > 32 and report["depth"] == 1
    exact = ask(server, [*prompt, 7, 8, 9], fields=fields, relay="off")
    last = [torch.tensor(a["meta_info"]["hidden_states"][0][-1]) for a in (over_relayed, exact)]
    assert 1e-4 < (last[0] - last[1]).norm() / last[1].norm() < 1


def test_input_embeddings_never_relay(server: Server, rng: random.Random) -> None:
    """SGLang refuses them beside a radix cache; the refusal harms nobody."""
    embeddings = [[0.0] * 128] * 9
    with pytest.raises(requests.HTTPError):
        server.post("/generate", {"input_embeds": embeddings, "sampling_params": {"max_new_tokens": 1}})
    assert report_of(ask(server, consumer(server, rng)))["segments"] == 1


# ---------------------------------------------------------------------- batches


def batch(server: Server, inspector: Inspector, wanted: list[tuple[list[int], dict[str, Any], dict[str, Any]]]) -> Any:
    """Answers of requests (prompt, fields, controls) that the scheduler finds in its queue at the same time."""
    inspector.ask(server, "gather", count=len(wanted))
    with ThreadPoolExecutor(len(wanted)) as pool:
        asked = [pool.submit(ask, server, prompt, 8, fields, **params) for prompt, fields, params in wanted]
        return [a.result() for a in asked]


def test_requests_of_other_policies_wait_for_a_batch_of_their_own(
    server: Server, inspector: Inspector, rng: random.Random
) -> None:
    policies = ("rotate", "relay", "rotate", "probe", "legolink", "relay")
    prompts, before = [consumer(server, rng) for _ in policies], stats(server)
    wanted = [(prompt, {}, {"relay_policy": policy}) for prompt, policy in zip(prompts, policies, strict=True)]
    for answer, policy in zip(batch(server, inspector, wanted), policies, strict=True):
        report = report_of(answer)
        assert (report["declined"], report["segments"], report["policy"]) == (None, 1, policy), report
    after = stats(server)
    assert after["batches"] - before["batches"] == len(set(policies))
    assert after["waits"] > before["waits"], "they were in one queue"


def test_hidden_states_of_one_request_do_not_keep_others_from_reusing(
    server: Server, inspector: Inspector, rng: random.Random
) -> None:
    prompt, before = consumer(server, rng), stats(server)
    with_states, relayed = batch(
        server,
        inspector,
        [(tokens(rng, 40), {"return_hidden_states": True}, {}), (prompt, {}, {"relay_policy": "rotate"})],
    )
    assert report_of(with_states)["declined"] == "hidden_states_requested"
    assert len(with_states["meta_info"]["hidden_states"][0]) == 40
    assert report_of(relayed)["declined"] is None and report_of(relayed)["segments"] == 1
    assert stats(server)["waits"] > before["waits"], "they were in one queue"
    assert relayed["output_ids"] == ask(server, prompt, relay_policy="rotate")["output_ids"]


def test_a_failure_makes_the_whole_batch_run_stock(server: Server, inspector: Inspector, rng: random.Random) -> None:
    prompts = [consumer(server, rng), consumer(server, rng), tokens(rng, 50)]
    inspector.break_(server, "forward")
    try:
        answers = batch(server, inspector, [(prompt, {}, {"relay_policy": "rotate"}) for prompt in prompts])
    finally:
        inspector.break_(server, None)
    declined = [report_of(a)["declined"] for a in answers]
    assert declined == ["internal_error:forward", "internal_error:forward", "nothing_to_reuse"]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["output_ids"] == ask(server, prompt, relay="off")["output_ids"]


# ---------------------------------------------------------------------- host failures

FAULTS = {
    "match": "internal_error:match",
    "plan": "internal_error:plan",
    "prepare": "internal_error:prepare",
    "place": "internal_error:place",
    "forward": "internal_error:forward",
    "attention": "internal_error:attention",
    "interpolate": "internal_error:attention",
    "hand_over": "internal_error:hand_over",
    "select": "internal_error:select",
    "slots": "bad_plan",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_is_named_and_answered_exactly(
    server: Server, inspector: Inspector, rng: random.Random, fault: str
) -> None:
    prompt = consumer(server, rng)
    inspector.break_(server, fault)
    before = stats(server)
    try:
        answers = [ask(server, [*tokens(rng, 3), *prompt]) for _ in range(2)]
    finally:
        inspector.break_(server, None)
    after = stats(server)
    for answer in answers:
        report = report_of(answer)
        assert report["declined"] == FAULTS[fault], report
        assert (report["relayed"], report["recomputed"], report["segments"]) == (0, 0, 0), report
        assert report["fresh"] + report["exact"] == answer["meta_info"]["prompt_tokens"]
    counted = after["declined"].get(FAULTS[fault], 0) - before["declined"].get(FAULTS[fault], 0)
    assert counted >= 2
    if FAULTS[fault].startswith("internal_error"):
        assert after["failures"] == before["failures"] + 2
        where = FAULTS[fault].partition(":")[2]
        assert server.log().count(f"relay: {where} failed; served by the stock path") == 1, "logged once"
    assert report_of(ask(server, [9, *prompt]))["declined"] is None, "it relays again once nothing fails"


@pytest.mark.parametrize("fault", ["prepare", "forward", "attention", "interpolate", "hand_over", "select"])
def test_a_failed_batch_answers_like_stock(
    server: Server, inspector: Inspector, rng: random.Random, fault: str
) -> None:
    prompt = consumer(server, rng)
    inspector.break_(server, fault)
    try:
        failed = ask(server, prompt, new=16)
    finally:
        inspector.break_(server, None)
    exact = ask(server, prompt, new=16, relay="off")
    assert failed["output_ids"] == exact["output_ids"]
    assert failed["meta_info"]["output_token_logprobs"] == exact["meta_info"]["output_token_logprobs"]


def test_a_request_whose_adoption_fails_is_served(server: Server, inspector: Inspector, rng: random.Random) -> None:
    prompt = consumer(server, rng)
    inspector.break_(server, "adopt")
    try:
        failed = ask(server, prompt)
    finally:
        inspector.break_(server, None)
    assert failed["output_ids"] == ask(server, prompt, relay="off")["output_ids"]


def test_what_cannot_be_learnt_is_not_reused(server: Server, inspector: Inspector, rng: random.Random) -> None:
    inspector.break_(server, "learn")
    try:
        prompt = consumer(server, rng)
    finally:
        inspector.break_(server, None)
    assert report_of(ask(server, prompt))["declined"] == "nothing_to_reuse"


# ---------------------------------------------------------------------- servers


@pytest.mark.parametrize(
    ("args", "reason"),
    [(("--disable-radix-cache",), "radix_cache_disabled"), (("--enable-session-radix-cache",), "session_radix_cache")],
    ids=["radix-cache-disabled", "session-radix-cache"],
)
def test_an_unsuitable_server_serves_stock_and_says_why(model: Path, args: tuple[str, ...], reason: str) -> None:
    with Server(model, "--radix-cache-backend", "relay", *args) as server:
        answer = server.generate([5, 6, 7], max_new_tokens=4, ignore_eos=True)
        state = server.get("/server_info")["internal_states"][0]["relay"]
        log = server.log()
    check_stock(answer, state, log, reason)


def check_stock(answer: Any, state: dict[str, Any], log: str, reason: str) -> None:
    report = report_of(answer)
    assert report["declined"] == f"unsupported:{reason}"
    assert report["exact"] + report["fresh"] == answer["meta_info"]["prompt_tokens"]
    assert state["unsupported"] == [reason] and not state["active"]
    assert f"relay: off, this server is served stock: {reason}" in log


NO_ROTATION = """
def load():
    from sglang.srt.models.llama import LlamaAttention

    def prepare(self, positions, hidden_states):
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        if self.attn.layer_id != 2:
            q, k = self.rotary_emb(positions, q, k)
        return q, k, v

    LlamaAttention.forward_prepare_native = prepare
"""
"""A Llama whose third layer knows no positions, as some published models have."""


def test_a_layer_without_rotation_is_found(model: Path, tmp_path: Path) -> None:
    """Its modules look like the others': only its keys tell."""
    env = install_plugin(tmp_path / "no_rotation", "relay_test_no_rotation", NO_ROTATION)
    with Server(model, "--radix-cache-backend", "relay", env=env) as server:
        answers = [ask(server, [5, 6, 7] * 20) for _ in range(2)]
        state = server.get("/server_info")["internal_states"][0]["relay"]
        log = server.log()
    assert "keys of layers [2] do not follow" in log
    assert [report_of(a)["exact"] for a in answers] == [0, 59]
    for answer in answers:
        check_stock(answer, state, log, "layers_without_rotation")


LOST_RESIDUAL = """
def load():
    from sglang.srt.layers.layer_boundary.residual import batch as residual_batch
    from sglang.srt.models.llama import LlamaForCausalLM

    whole = LlamaForCausalLM.forward_split_prefill

    def forward_split_prefill(self, input_ids, positions, forward_batch, split_interval, input_embeds=None):
        if split_interval[0] == LAYER:
            stream = residual_batch.stream_of(forward_batch)
            if stream.residual is not None:
                stream.residual = stream.residual * 0
        return whole(self, input_ids, positions, forward_batch, split_interval, input_embeds)

    LlamaForCausalLM.forward_split_prefill = forward_split_prefill
"""
"""A Llama whose layers drop the residual where a part begins at LAYER, as SGLang's Gemma-3 does at any."""


@pytest.mark.parametrize("layer", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_layers_that_differ_when_they_run_in_parts(model: Path, tmp_path: Path, layer: int) -> None:
    """The method has the right name and returns logits: only comparing them, or K and V, tells. The last layer leaves
    no K and V that would. No cost model is calibrated here."""
    code = LOST_RESIDUAL.replace("LAYER", str(layer))
    env = install_plugin(tmp_path / "residual", "relay_test_residual", code)
    with Server(model, "--radix-cache-backend", "relay", env=env) as server:
        answers = [ask(server, [5, 6, 7] * 20) for _ in range(2)]
        state = server.get("/server_info")["internal_states"][0]["relay"]
        log = server.log()
    assert "layers run in parts are" in log
    assert [report_of(a)["exact"] for a in answers] == [0, 59]
    for answer in answers:
        check_stock(answer, state, log, "layer_split_differs")


def dressed(model: Path, path: Path, architecture: str, **config: Any) -> Path:
    """``model`` under the name of another one, for random weights."""
    other = shutil.copytree(model, path)
    settings = json.loads((other / "config.json").read_text())
    settings |= {"architectures": [architecture], "model_type": architecture.removesuffix("ForCausalLM").lower()}
    (other / "config.json").write_text(json.dumps(settings | config))
    return other


NO_PATTERN = """
def load():
    from transformers.models.exaone4.configuration_exaone4 import Exaone4Config

    made = Exaone4Config.__post_init__

    def without_pattern(self, **kwargs):
        made(self, **kwargs)
        self.sliding_window_pattern = None

    Exaone4Config.__post_init__ = without_pattern
"""
"""SGLang asks for a GPU's attention where the pattern is not None, which transformers makes it for a model without."""


def test_layers_that_cannot_hand_over(model: Path, tmp_path: Path) -> None:
    """EXAONE-4 norms what a layer adds, so what is between two of its parts is no plain sum."""
    windows = {"sliding_window": None, "layer_types": ["full_attention"] * 6}
    other = dressed(model, tmp_path / "exaone4", "Exaone4ForCausalLM", **windows)
    env = install_plugin(tmp_path / "plugin", "relay_test_no_pattern", NO_PATTERN)
    with Server(other, "--radix-cache-backend", "relay", "--load-format", "dummy", env=env) as server:
        answer = ask(server, [5, 6, 7] * 20)
        state = server.get("/server_info")["internal_states"][0]["relay"]
        check_stock(answer, state, server.log(), "layer_split_failed")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_layers_that_run_in_parts(model: Path, tmp_path: Path, architecture: str, dtype: str) -> None:
    other = dressed(model, tmp_path / "other", architecture)
    random_weights = () if architecture == "LlamaForCausalLM" else ("--load-format", "dummy")
    with Server(other, "--radix-cache-backend", "relay", "--dtype", dtype, *random_weights) as server:
        state = server.get("/server_info")["internal_states"][0]["relay"]
        assert state["active"], state["unsupported"]


@pytest.mark.slow
def test_a_model_that_cannot_run_a_range_of_its_layers(model: Path, tmp_path: Path) -> None:
    other = dressed(model, tmp_path / "olmo2", "Olmo2ForCausalLM")
    with Server(other, "--radix-cache-backend", "relay", "--load-format", "dummy") as server:
        answer = ask(server, [5, 6, 7] * 20)
        state = server.get("/server_info")["internal_states"][0]["relay"]
        check_stock(answer, state, server.log(), "model_without_layer_split")


@pytest.mark.slow
def test_quantised_kv(model: Path) -> None:
    with Server(model, "--radix-cache-backend", "relay", "--kv-cache-dtype", "fp8_e5m2") as server:
        answer = ask(server, [5, 6, 7] * 20)
        state = server.get("/server_info")["internal_states"][0]["relay"]
        check_stock(answer, state, server.log(), "quantised_kv")


@pytest.mark.slow
def test_an_embedding_server(model: Path) -> None:
    with Server(model, "--radix-cache-backend", "relay", "--is-embedding") as server:
        assert len(server.post("/encode", {"input_ids": [5, 6, 7]})["embedding"]) == 128
        state = server.get("/server_info")["internal_states"][0]["relay"]
    assert state["unsupported"] == ["embedding_model"] and not state["active"]


@pytest.mark.parametrize(
    ("reason", "field", "value"),
    [
        ("pipeline_parallel", "pp_size", 2),
        ("dp_attention", "enable_dp_attention", True),
        ("context_parallel", "attn_cp_size", 2),
        ("context_parallel", "dcp_size", 2),
        ("context_parallel", "enable_prefill_cp", True),
        ("sequence_parallel", "enable_layernorm_sp", True),
        ("sequence_parallel", "enable_attn_tp_input_scattered", True),
        ("sequence_parallel", "disable_attn_tp_gather", True),
        ("speculative_decoding", "speculative_algorithm", "NGRAM"),
        ("speculative_decoding", "speculative_algorithm", "EAGLE"),
        ("pd_disaggregation", "disaggregation_mode", "prefill"),
        ("pd_disaggregation", "disaggregation_mode", "decode"),
        ("two_batch_overlap", "enable_two_batch_overlap", True),
        ("two_batch_overlap", "enable_single_batch_overlap", True),
        ("pd_multiplexing", "enable_pdmux", True),
        ("deterministic_inference", "enable_deterministic_inference", True),
        ("diffusion_llm", "dllm_algorithm", "LowConfidence"),
        ("elastic_ep", "elastic_ep_backend", "mooncake"),
        ("expert_statistics", "enable_eplb", True),
        ("expert_statistics", "expert_distribution_recorder_mode", "stat"),
        ("retraction_host_backup", "disaggregation_decode_retraction_backup", "host_pool"),
        ("external_kv_store", "enable_lmcache", True),
        ("external_kv_store", "enable_unified_cache_external_linker", True),
        ("unified_memory", "enable_unified_memory", True),
        ("kv_canary", "kv_canary", "log"),
        ("session_radix_cache", "enable_session_radix_cache", True),
        ("grpc_front_end", "smg_grpc_mode", True),
        ("grpc_front_end", "grpc_mode", True),
    ],
)
def test_deployments_that_cannot_start_here_are_named(model: Path, reason: str, field: str, value: object) -> None:
    """On SGLang's own, unresolved arguments: the guard must know the field by its name."""
    args = ServerArgs(**{"model_path": str(model)})
    assert hasattr(args, field)
    assert not any(hit for _, hit in guards._deployment(args))
    setattr(args, field, value)
    assert [name for name, hit in guards._deployment(args) if hit] == [reason]


def test_a_front_end_in_rust_is_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ServerArgs(**{"model_path": str(model)})
    monkeypatch.setenv("SGLANG_RUST_SERVER", "1")
    assert [name for name, hit in guards._deployment(args) if hit] == ["rust_front_end"]


@pytest.mark.parametrize(
    ("fields", "padded"),
    [
        ({}, False),
        ({"tp_size": 2}, False),
        ({"tp_size": 2, "moe_dense_tp_size": 1}, True),
        ({"tp_size": 2, "moe_a2a_backend": "deepep"}, True),
        ({"tp_size": 2, "moe_a2a_backend": "mooncake"}, True),
        ({"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}, True),
    ],
    ids=str,
)
def test_batches_that_sglang_pads_are_named(model: Path, fields: dict[str, Any], padded: bool) -> None:
    """On what SGLang publishes of its own arguments, which its padding reads, too."""
    args = ServerArgs(**{"model_path": str(model)})
    for name, value in fields.items():
        assert hasattr(args, name)
        setattr(args, name, value)
    with use_context(create_context(args, role="scheduler")):
        initialize_moe_config()
        assert guards.pads_batches() == padded


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("SGLANG_RELAY_LAYER_RANGE", "1,2,9", "the last one allowed is 5"),
        ("SGLANG_RELAY_POLICY", "magic", "allowed are auto, probe, probe_only, relay"),
    ],
)
def test_a_setting_that_is_not_allowed_ends_the_start(model: Path, setting: str, value: str, allowed: str) -> None:
    with pytest.raises(ServerError) as caught, Server(model, "--radix-cache-backend", "relay", env={setting: value}):
        pass
    assert allowed in caught.value.args[0]
