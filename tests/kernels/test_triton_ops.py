"""The relay's device work on the Triton kernels against PyTorch, in Triton's interpreter."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_interpreter import interpreted

from sglang_relay.attention import Heads
from sglang_relay.ops import Pool, ProbeQueries, TorchCopier, TorchDeviation, TorchProbe, choice, choose_ops
from sglang_relay.ops import triton_ops as kernels
from sglang_relay.ops.choice import working_kernels
from sglang_relay.ops.triton_ops import TritonCopier, TritonDeviation, TritonProbe
from sglang_relay.rotary import DeltaRotary

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SLOTS = 200


def rotary(dim: int, rotary_dim: int, *, neox: bool = True) -> DeltaRotary:
    angle = torch.arange(3000)[:, None] * 10000.0 ** -(torch.arange(rotary_dim // 2) / (rotary_dim // 2))
    return DeltaRotary.from_table(
        torch.cat((angle.cos(), angle.sin()), 1), neox=neox, rotary_dim=rotary_dim, head_dim=dim
    )


def buffers(layers: int, heads: int, dim: int, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SLOTS, heads, dim, generator=generator).to(dtype) for _ in range(layers)]


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_copies(data: st.DataObject) -> None:
    """Of no token, and of many; keys that keep their position; heads of which a part is rotated."""
    n = data.draw(st.integers(0, 60), label="n")
    dim, rotary_dim = data.draw(st.sampled_from([(16, 16), (24, 8), (40, 40)]), label="dims")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    turn = rotary(dim, rotary_dim, neox=data.draw(st.booleans(), label="neox"))
    heads = data.draw(st.integers(1, 3), label="heads")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    donors, own = torch.randperm(SLOTS, generator=generator)[: 2 * n].view(2, n)
    source, target = torch.randint(turn.positions, (2, n), generator=generator)
    target[::4] = source[::4]
    pools = [Pool(buffers(3, heads, dim, dtype), buffers(3, heads, 8, dtype, 1)) for _ in range(2)]
    for buffer in (b for pool in pools for kind in pool for b in kind):
        buffer[own] = torch.nan
    (found, want) = pools
    with interpreted():
        TritonCopier(*found, turn).copy_turned(donors, own, source, target)
    TorchCopier(*want, turn).copy_turned(donors, own, source, target)
    for one, other in zip(found.keys, want.keys, strict=True):
        torch.testing.assert_close(one, other, rtol=torch.finfo(dtype).eps, atol=2e-6)
    for one, other in zip(found.values, want.values, strict=True):
        assert torch.equal(one, other)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_value_deviation(data: st.DataObject) -> None:
    n, heads = data.draw(st.integers(0, 50), label="n"), data.draw(st.integers(1, 4), label="heads")
    dtype, kept = (data.draw(st.sampled_from(DTYPES), label=name) for name in ("fresh", "pool"))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    rows, slots = (torch.randperm(m, generator=generator)[:n] for m in (70, SLOTS))
    fresh = torch.full((70, heads + 2, 24), torch.nan, dtype=dtype)[:, 1 : heads + 1]  # a part of fused q, k and v
    cached = torch.full((SLOTS, heads, 24), torch.nan, dtype=kept)
    fresh[rows] = torch.randn(n, heads, 24, generator=generator).to(dtype)
    cached[slots] = (fresh[rows].float() + torch.randn(n, heads, 24, generator=generator)).to(kept)
    with interpreted():
        found = TritonDeviation().distances(fresh, rows, cached, slots)
    torch.testing.assert_close(found, TorchDeviation().distances(fresh, rows, cached, slots), atol=1e-5, rtol=0)


def prompts(data: st.DataObject, slots: torch.Tensor) -> list[ProbeQueries]:
    """Prompts with holes in their keys, whose queries' own keys are there; and one without queries."""
    made, row = [], 0
    for number in range(data.draw(st.integers(0, 3), label="prompts")):
        stop = data.draw(st.integers(2, 120), label="tokens")
        count = data.draw(st.integers(1, min(stop, 9)), label="queries")
        positions = np.sort(data.draw(st.permutations(range(stop - min(stop, 12), stop)))[:count])
        keys = np.union1d(np.flatnonzero(np.arange(stop) % 7 != number), positions)
        keys = keys[keys <= positions[-1]]
        wanted = keys[:: data.draw(st.integers(1, 3), label="step")]
        at, slots = slots[: len(keys)], slots[len(keys) :]
        made.append(ProbeQueries(np.arange(row + 1, row + 1 + count), positions, keys, at, wanted))
        row += count + 2
    if data.draw(st.booleans(), label="empty"):
        none = np.empty(0, dtype=np.int64)
        made.append(ProbeQueries(none, none, none, slots[:0], none))
    return made


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_probe_scores(data: st.DataObject) -> None:
    """Two layers of different weight; keys that no query may see hold NaN, and what the kernels write did."""
    kv, group = data.draw(st.integers(1, 2), label="kv"), data.draw(st.sampled_from([1, 3, 4]), label="group")
    dim, v_dim = data.draw(st.sampled_from([(16, 16), (24, 8)]), label="dims")
    heads = Heads(kv * group, kv, dim, v_dim)
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    asked = prompts(data, torch.randperm(500, generator=generator))
    taken = torch.cat([torch.empty(0, dtype=torch.int64), *(p.slots for p in asked)])
    layers = []
    for _ in range(2):
        k, v = (torch.full((500, kv, dim), torch.nan, dtype=dtype) for dim in (heads.dim, heads.v_dim))
        k[taken], v[taken] = (torch.randn(len(taken), *b.shape[1:], generator=generator).to(dtype) for b in (k, v))
        layers.append((torch.randn(60, heads.query, heads.dim, generator=generator).to(dtype), k, v))
    exact = TorchProbe().plan(asked, dtype=torch.float32, device=CPU)
    with interpreted():
        engine = TritonProbe(heads, capability=90, multiprocessors=data.draw(st.sampled_from([1, 1000]), label="sms"))
        planned = engine.plan(asked, dtype=dtype, device=CPU)
        if asked:
            planned._unread.fill_(torch.nan)
            planned._mass.fill_(torch.nan)
        for weight, (q, k, v) in zip((0.5, 1.0), layers, strict=True):
            planned.add(q, k, v, 0.3, weight)
            exact.add(q.float(), k.float(), v.float(), 0.3, weight)
    assert len(planned.totals()) == len(asked)
    for found, want in zip(planned.totals(), exact.totals(), strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- the choice


@pytest.fixture(autouse=True)
def small_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "SLOTS", 400)


def chosen(pool: Pool, heads: set[Heads] | None = None) -> dict[str, str]:
    dtype, dim = pool.keys[0].dtype, pool.keys[0].shape[-1]
    heads = {Heads(4, 2, dim, dim)} if heads is None else heads
    with interpreted():
        made = working_kernels(pool, rotary(dim, dim), heads, dtype=dtype, queries=20, capability=90, multiprocessors=4)
    return {work: name for work, name in made.names().items() if work != "interpolation"}


def pool_of(dtype: torch.dtype = torch.float32) -> Pool:
    return Pool(buffers(2, 2, 16, dtype), buffers(2, 2, 16, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_that_work_are_taken(dtype: torch.dtype) -> None:
    assert chosen(pool_of(dtype)) == {"copy": "triton", "deviation": "triton", "probe": "triton"}


@pytest.mark.parametrize(
    ("broken", "result", "work"),
    [
        ("realign_on_device", lambda call, *a, **k: call(*a[:3], a[3] * 0 + 1, a[4] * 0, **k), "copy"),
        ("realign_on_device", lambda call, *a, **k: None, "copy"),
        ("value_deviation", lambda call, a, b, slots, out: call(a, b, slots.flip(0), out), "deviation"),
        ("add_probe_scores", lambda call, *a: call(a[0], a[1], a[2] + 0.1, *a[3:]), "probe"),
        ("attend_scattered", lambda call, *a: 1 / 0, "probe"),
    ],
)
def test_a_kernel_that_differs_or_fails_is_passed_over(
    broken: str, result: Any, work: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = getattr(kernels, broken)
    monkeypatch.setattr(kernels, broken, lambda *a, **k: result(original, *a, **k))
    with caplog.at_level(logging.WARNING):
        names = chosen(pool_of())
    assert names == {"copy": "triton", "deviation": "triton", "probe": "triton"} | {work: "torch"}
    (record,) = caplog.records
    assert work in record.getMessage()


def test_a_pool_that_the_kernels_do_not_take() -> None:
    apart = [b.transpose(0, 1).contiguous().transpose(0, 1) for b in buffers(2, 2, 16, torch.float32)]
    assert chosen(Pool(apart, apart))["copy"] == "torch"
    uneven = Pool(
        [*buffers(1, 2, 16, torch.float32), *buffers(1, 1, 16, torch.float32)], buffers(2, 2, 16, torch.float32)
    )
    assert chosen(uneven)["copy"] == "torch"
    assert chosen(pool_of(), {Heads(4, 2, 16, 16), Heads(2, 2, 16, 16)})["probe"] == "torch"


def test_pytorch_without_a_cuda_device() -> None:
    made = choose_ops(pool_of(), rotary(16, 16), {Heads(4, 2, 16, 16)}, dtype=torch.float32, queries=4)
    assert set(made.names().values()) == {"torch"}
