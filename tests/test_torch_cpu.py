"""The CPU platform: its ops against fp64, its defaults, and a served model against Hugging Face transformers."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import torch
from sglang_torch_cpu import defaults, ops, processes, sdpa
from tiny_model import make_tiny_llama
from transformers import AutoModelForCausalLM

from sglang_relay.measure.server import Server

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


def rounding(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(actual: torch.Tensor, expected: torch.Tensor, *, roundings: float) -> None:
    """`expected` is fp64; each element may be off by so many roundings of actual's dtype, relative to the largest."""
    assert actual.shape == expected.shape
    unit = rounding(actual.dtype) * expected.abs().amax().clamp(min=1e-3)
    worst = (actual.double() - expected).abs().amax()
    assert worst <= roundings * unit, f"off by {worst / unit:.1f} roundings"


# --- element-wise ops ---------------------------------------------------------------------------------------------


def norm_fp64(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (7, 576), (3, 4, 32)])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = normal(*shape, dtype=dtype) * 30, normal(shape[-1], dtype=dtype, seed=1)
    out = ops.rms_norm(x, weight, EPS)
    assert out.dtype == dtype
    assert_near(out, norm_fp64(x.double(), weight), roundings=4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm_sees_the_unrounded_sum(dtype: torch.dtype) -> None:
    # A residual far larger than x: rounding the sum first would lose most of x.
    x, residual, weight = normal(5, 96, dtype=dtype), normal(5, 96, dtype=dtype, seed=1) * 40, normal(96, dtype=dtype)
    before = residual.clone()
    out, total = ops.add_rms_norm(x, residual, weight, EPS)
    exact = x.double() + residual.double()
    assert total.dtype == out.dtype == dtype
    assert_near(total, exact, roundings=1.01)
    normed = norm_fp64(exact, weight)
    # Element by element: a sum that is rounded first costs each element up to a rounding more.
    allowed = normed.abs() * rounding(dtype) * (6 if dtype == torch.float32 else 1.05) + 1e-7
    assert ((out.double() - normed).abs() <= allowed).all()
    assert torch.equal(residual, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_and_mul(dtype: torch.dtype) -> None:
    x = normal(5, 192, dtype=dtype) * 4
    before = x.clone()
    gate, up = x.double().chunk(2, dim=-1)
    assert_near(ops.silu_and_mul(x), gate * torch.sigmoid(gate) * up, roundings=4)
    assert torch.equal(x, before)


def rotate_fp64(x: torch.Tensor, angles: torch.Tensor, *, neox: bool) -> torch.Tensor:
    """Rotation as multiplication by a complex number. x ``[tokens, heads, dim]``, angles ``[tokens, pairs]``."""
    pairs = angles.shape[1]
    turning, rest = x[..., : 2 * pairs].double(), x[..., 2 * pairs :].double()
    a, b = turning.chunk(2, -1) if neox else (turning[..., ::2], turning[..., 1::2])
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angles), angles)[:, None]
    parts = (turned.real, turned.imag)
    turned = torch.cat(parts, -1) if neox else torch.stack(parts, -1).flatten(-2)
    return torch.cat([turned, rest], -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [32, 16])
@pytest.mark.parametrize("layout", ["qkv", "qvk", "apart", "heads"])
@pytest.mark.parametrize("tokens", [6, 0])
def test_rotate_pair(dtype: torch.dtype, neox: bool, rotary_dim: int, layout: str, tokens: int) -> None:
    """Of no tokens, too: a batch of nothing but empty prompts."""
    heads, kv_heads, dim = 4, 2, 32
    qkv = normal(tokens, (heads + 2 * kv_heads) * dim, dtype=dtype)
    query, key, value = qkv.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    if layout == "apart":
        query, key = query.clone(), key.clone()
    elif layout == "qvk":
        key = value
    elif layout == "heads":
        query, key = query.unflatten(-1, (heads, dim)), key.unflatten(-1, (kv_heads, dim))
    before = qkv.clone()
    angles = torch.arange(tokens)[:, None] * 1000 ** -torch.linspace(0, 1, rotary_dim // 2, dtype=torch.float64)
    cos, sin = angles.cos().float()[:, None], angles.sin().float()[:, None]

    results = ops.rotate_pair(query, key, dim, cos, sin, neox=neox)

    for x, result in zip((query, key), results, strict=True):
        assert result.shape == x.shape and result.dtype == dtype
        if tokens:
            expected = rotate_fp64(x.reshape(tokens, -1, dim), angles, neox=neox).view(x.shape)
            assert_near(result, expected, roundings=4 if dtype == torch.float32 else 1.01)
    assert torch.equal(qkv, before)


# --- attention ----------------------------------------------------------------------------------------------------


def attention_fp64(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """query ``[rows, heads, dim]`` are the last rows of the sequence, key and value ``[kv_len, kv_heads, dim]``."""
    rows, heads, _ = query.shape
    kv_len, kv_heads, _ = key.shape
    group = heads // kv_heads
    out = torch.empty(rows, heads, value.shape[-1], dtype=torch.float64)
    for row in range(rows):
        seen = kv_len - rows + row + 1
        for head in range(heads):
            scores = key[:seen, head // group].double() @ query[row, head].double() * scale
            out[row, head] = scores.softmax(0) @ value[:seen, head // group].double()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "prefix"), [(1, 0), (1, 37), (2, 0), (5, 70), (64, 0), (65, 0), (63, 64), (130, 17), (200, 3)]
)
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4), (3, 1)])
def test_extend_equals_dense_attention(dtype: torch.dtype, rows: int, prefix: int, heads: int, kv_heads: int) -> None:
    kv_len, dim, dim_v = prefix + rows, 32, 16
    query = normal(rows, heads, dim, dtype=dtype) * 2
    key, value = (
        normal(kv_len, kv_heads, dim, dtype=dtype, seed=1),
        normal(kv_len, kv_heads, dim_v, dtype=dtype, seed=2),
    )
    out = torch.full((rows, heads, dim_v), math.nan, dtype=dtype)
    # Wider and longer than this sequence needs, as in a batch with longer ones.
    mask = sdpa.causal_mask(min(sdpa.BLOCK_ROWS, rows + 3), kv_len + 11, dtype)

    sdpa.extend(query, key.transpose(0, 1)[None], value.transpose(0, 1)[None], 0.2, mask, out)

    assert_near(out, attention_fp64(query, key, value, 0.2), roundings=16 if dtype == torch.float32 else 4)


def test_attention_of_no_rows() -> None:
    """Nothing but empty prompts: what fails then is SGLang's own (docs/situations.md), and not the platform."""
    from sglang_torch_cpu.attention import BatchPlan, TorchCpuAttnBackend

    batch: Any = object()
    layer: Any = SimpleNamespace(layer_id=0, tp_q_head_num=4, qk_head_dim=32, v_head_dim=16, scaling=1.0)
    backend = TorchCpuAttnBackend.__new__(TorchCpuAttnBackend)
    backend.plan = BatchPlan(batch, [], {})
    pool: Any = SimpleNamespace(get_key_buffer=lambda _: None, get_value_buffer=lambda _: None)
    backend.token_to_kv_pool = pool
    assert backend._attend(torch.zeros(0, 4 * 32), layer, batch).shape == (0, 4 * 16)


def test_only_the_sequences_own_slots_are_read() -> None:
    pool = torch.full((64, 2, 32), math.nan)
    rows = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 3, 20, 4]), torch.tensor([30]), torch.tensor([40, 42, 41, 43])]
    for i, row in enumerate(rows):
        pool[row] = normal(len(row), 2, 32, seed=i)
    for i, row in enumerate(rows):
        slots = sdpa.as_slots(row.to(torch.int32))
        assert torch.equal(sdpa.gather(pool, slots)[0].transpose(0, 1), normal(len(row), 2, 32, seed=i))


def test_consecutive_slots_are_viewed_not_copied() -> None:
    pool = normal(16, 2, 32)
    assert sdpa.gather(pool, sdpa.as_slots(torch.arange(3, 9))).untyped_storage().data_ptr() == pool.data_ptr()
    # First and last alone look consecutive.
    assert isinstance(sdpa.as_slots(torch.tensor([3, 5, 4, 6])), torch.Tensor)
    assert isinstance(sdpa.as_slots(torch.tensor([6, 5, 4])), torch.Tensor)


# --- activation and defaults --------------------------------------------------------------------------------------


def test_inactive_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_torch_cpu import activate

    for other in (None, "", "some_other_platform"):
        if other is None:
            monkeypatch.delenv("SGLANG_PLATFORM", raising=False)
        else:
            monkeypatch.setenv("SGLANG_PLATFORM", other)
        assert activate() is None


def test_inactive_means_no_import_and_no_setting() -> None:
    code = (
        "import os, sys; before = dict(os.environ); import sglang_torch_cpu as p; assert p.activate() is None;"
        "assert dict(os.environ) == before; assert not {'torch', 'sglang'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": ""})


@pytest.mark.parametrize(
    ("cores", "ranks", "threads", "binding"),
    [(1, 1, 1, "0"), (2, 1, 1, "0-1"), (2, 2, 1, "0|1"), (1, 2, 1, "0|0"), (8, 2, 2, "0-3|4-7"), (64, 1, 8, "0-63")],
)
def test_threads(cores: int, ranks: int, threads: int, binding: str) -> None:
    assert defaults.default_threads(cores, ranks) == threads
    assert defaults.thread_binding(cores, ranks) == binding


def test_start_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(processes.START_METHOD_VARIABLE, "spawn")
    assert processes.choose_start_method() == "spawn"
    monkeypatch.setenv(processes.START_METHOD_VARIABLE, "teleport")
    with pytest.raises(ValueError, match="teleport"):
        processes.choose_start_method()
    monkeypatch.delenv(processes.START_METHOD_VARIABLE)
    done = threading.Event()
    waiting = threading.Thread(target=done.wait)
    waiting.start()
    try:
        # A lock that another thread holds would stay locked in the child for ever.
        assert processes.choose_start_method() == "spawn"
    finally:
        done.set()
        waiting.join()


# --- served -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(3, 1024) for _ in range(n)] for n in (1, 2, 17, 63, 64, 65, 130, 200, 300)]


@pytest.fixture(scope="module")
def server(model: Path):
    """Default flags; the older start method, which GPU servers use."""
    flags = ("--enable-metrics", "--constrained-json-disable-any-whitespace")
    with Server(model, *flags, env={processes.START_METHOD_VARIABLE: "spawn"}) as running:
        yield running


def answers(server: Server, prompts: list[list[int]], *, concurrent: int) -> list[dict]:
    def ask(prompt: list[int]) -> dict:
        fields = {"return_logprob": True, "logprob_start_len": 0}
        return server.generate(prompt, fields=fields, max_new_tokens=16, ignore_eos=True)

    with ThreadPoolExecutor(concurrent) as pool:
        return list(pool.map(ask, prompts))


@torch.inference_mode()
def assert_equals_transformers(model: Path, prompts: list[list[int]], results: list[dict]) -> None:
    """Greedy tokens equal; every logprob of prompt and output within 1e-4."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for prompt, result in zip(prompts, results, strict=True):
        output = result["output_ids"]
        tokens = prompt + output
        logprobs = reference(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        assert output == logprobs.argmax(-1)[len(prompt) - 1 : -1].tolist()
        meta = result["meta_info"]
        served = [x[0] for x in meta["input_token_logprobs"][1:] + meta["output_token_logprobs"]]
        expected = logprobs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(served, dtype=torch.float64), expected, atol=1e-4, rtol=0)


def test_served_model_equals_transformers(server: Server, model: Path, prompts: list[list[int]]) -> None:
    results = answers(server, prompts, concurrent=1)
    assert_equals_transformers(model, prompts, results)
    assert len({tuple(r["output_ids"]) for r in results}) == len(prompts), "the model must tell the prompts apart"


def test_chunked_mixed_paged_and_tensor_parallel_equal_transformers(model: Path, prompts: list[list[int]]) -> None:
    flags = ("--tp-size", 2, "--page-size", 16, "--chunked-prefill-size", 64, "--enable-mixed-chunk")
    with Server(model, *flags, "--max-total-tokens", 2048, "--dtype", "float32") as server:
        results = answers(server, prompts, concurrent=4)
        assert_equals_transformers(model, prompts, results)
        info = server.get("/server_info")
        assert info["max_total_tokens"] == 2048, "an explicit value wins over the platform's default"
        assert re.search(r"#cached-token: [1-9]", server.log()) is None
        again = answers(server, prompts[-1:], concurrent=1)  # now over a cached prefix
        assert again[0]["output_ids"] == results[-1]["output_ids"]


def test_python_core_without_overlap_equals_transformers(model: Path, prompts: list[list[int]]) -> None:
    flags = ("--page-size", 64, "--disable-overlap-schedule", "--chunked-prefill-size", 128)
    with Server(model, *flags, env={"SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python"}) as server:
        assert "Tree Core: UnifiedTreeCore" in server.log()
        assert_equals_transformers(model, prompts, answers(server, prompts, concurrent=4))


def test_defaults_of_the_platform(server: Server) -> None:
    info = server.get("/server_info")
    shown = {name: info[name] for name in ("attention_backend", "sampling_backend", "dtype", "device", "sleep_on_idle")}
    assert shown == {
        "attention_backend": "torch_native",
        "sampling_backend": "pytorch",
        "dtype": "float32",  # of the checkpoint; SGLang would serve fp32 checkpoints in fp16
        "device": "cpu",
        "sleep_on_idle": True,
    }
    assert info["max_total_tokens"] == defaults.MAX_TOTAL_TOKENS


def test_structured_output(server: Server) -> None:
    answer = server.generate("say a number", max_new_tokens=12, regex="[1-9][0-9]{3} (yes|no)")
    assert re.fullmatch("[1-9][0-9]{3} (yes|no)", answer["text"])
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    answer = server.generate("say it", max_new_tokens=24, json_schema=json.dumps(schema))
    assert list(json.loads(answer["text"])) == ["ok"]


def test_sampling_streaming_abort_flush_and_weight_update(server: Server, model: Path) -> None:
    four = server.generate("bado", n=4, temperature=1.0, max_new_tokens=6)
    assert len({tuple(x["output_ids"]) for x in four}) > 1

    request = {"text": "bado", "sampling_params": {"temperature": 0, "max_new_tokens": 6}, "stream": True}
    with requests.post(server.url + "/generate", json=request, stream=True, timeout=60) as response:
        lines = [line for line in response.iter_lines() if line.startswith(b"data: {")]
    whole = server.generate("bado", max_new_tokens=6)
    assert len(lines) > 1 and json.loads(lines[-1][6:])["text"] == whole["text"]

    with ThreadPoolExecutor(1) as pool:
        endless = pool.submit(server.generate, "zu", fields={"rid": "endless"}, max_new_tokens=8000, ignore_eos=True)
        while not endless.done():
            server.post("/abort_request", {"rid": "endless"})
        assert endless.result()["meta_info"]["finish_reason"]["type"] == "abort"

    assert server.post("/update_weights_from_disk", {"model_path": str(model)})["success"]
    assert server.generate("bado", max_new_tokens=6)["text"] == whole["text"]
    assert "Cache flushed" in server.post("/flush_cache")
    assert "sglang:prompt_tokens_total" in server.get("/metrics")


def test_chat(server: Server) -> None:
    request = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "temperature": 0}
    answer = server.post("/v1/chat/completions", request)
    assert answer["usage"]["completion_tokens"] == 5 and answer["choices"][0]["message"]["content"]
