"""The device copy and re-rotation against fp64, in Triton's interpreter and ahead of time."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_relay_kernels import realign_triton  # pyright: ignore[reportMissingImports]
from sglang_relay_kernels.fp8 import decode_e4m3, encode_e4m3  # pyright: ignore[reportMissingImports]
from sglang_relay_kernels.kv_table import kv_table  # pyright: ignore[reportMissingImports]
from sglang_relay_kernels.realign import realign  # pyright: ignore[reportMissingImports]
from sglang_relay_kernels.realign_triton import (  # pyright: ignore[reportMissingImports]
    copy_rows_kernel,
    launch_options,
    realign_kernel,
    realign_on_device,
)
from torch import Tensor
from triton_ahead import CAPABILITIES, REGISTERS_PER_SM, build
from triton_interpreter import interpreted

FP8 = torch.float8_e4m3fn
DTYPES = (torch.bfloat16, torch.float16, torch.float32, FP8)
SLOTS = 96


def turned(keys: Tensor, cos: Tensor, sin: Tensor, neox: bool) -> Tensor:
    """Keys ``[n, heads, dim]``, rotated in fp64 as complex numbers."""
    half = cos.shape[1]
    out = keys.double().clone()
    first, second = (range(half), range(half, 2 * half)) if neox else (range(0, 2 * half, 2), range(1, 2 * half, 2))
    turn = torch.complex(cos.double(), sin.double())[:, None]
    pair = torch.complex(out[..., list(first)], out[..., list(second)]) * turn
    out[..., list(first)], out[..., list(second)] = pair.real, pair.imag
    return out


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8).view(*values.shape, values.element_size())


def pools(layers: int, heads: int, dim: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scale = 100.0 if dtype == FP8 else 1.0  # a quantised cache uses its range; some turned pairs pass its end
    return [(torch.randn(SLOTS, heads, dim, generator=generator) * scale).to(dtype) for _ in range(layers)]


def check(k, v, source, target, cos, sin, *, neox: bool, rotary_dim: int, disjoint: bool) -> None:
    k_before, v_before = [b.clone() for b in k], [b.clone() for b in v]
    if disjoint:
        for buffer in k + v:  # rows of all ones are NaN in every dtype
            buffer.view(torch.uint8)[target] = 0xFF
            assert buffer[target].isnan().all()
    with interpreted():
        realign_on_device(kv_table(k, v), source, target, cos, sin, neox=neox, rotary_dim=rotary_dim, disjoint=disjoint)
    untouched = torch.ones(SLOTS, dtype=torch.bool)
    untouched[target] = False
    for before, after in zip(k_before + v_before, k + v, strict=True):
        assert torch.equal(bits(before)[untouched], bits(after)[untouched]), "a slot that is no target changed"
    for before, after in zip(v_before, v, strict=True):
        assert torch.equal(bits(after)[target], bits(before)[source])
    still = (cos == 1) & (sin == 0)
    still = torch.cat((still, still), -1) if neox else still.repeat_interleave(2, -1)
    for before, after in zip(k_before, k, strict=True):
        keys, got = before[source], after[target]
        same = (bits(got) == bits(keys)).all(-1)
        assert same[..., rotary_dim:].all(), "the part without positions changed"
        assert same[..., :rotary_dim][still[:, None].expand(-1, keys.shape[1], -1)].all(), "an unmoved key lost bits"
        want = turned(keys, cos, sin, neox)
        info = torch.finfo(keys.dtype)
        want = want.clamp(info.min, info.max)
        # One rounding to the cache dtype, and a few fp32 roundings of terms as large as the pair.
        bound = info.eps / 2 * want.abs() + info.tiny * info.eps / 2
        bound = bound + 2.0**-21 * keys.double().abs().amax(-1, True) + 1e-30
        assert ((got.double() - want).abs() <= bound).all()


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_slots(data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 40), label="n")
    heads = data.draw(st.sampled_from([1, 2, 3, 9]), label="heads")
    half = data.draw(st.sampled_from([2, 5, 8, 32]), label="half")
    dim = 2 * half + data.draw(st.sampled_from([0, 2, 16]), label="rest")
    dtype = data.draw(st.sampled_from(DTYPES), label="dtype")
    disjoint = data.draw(st.booleans(), label="disjoint")
    seed = data.draw(st.integers(0, 1000), label="seed")
    generator = torch.Generator().manual_seed(seed)
    if disjoint:
        source, target = torch.randperm(SLOTS, generator=generator)[: 2 * n].view(2, n)
    else:
        source, target = (torch.randperm(SLOTS, generator=generator)[:n] for _ in range(2))
    angle = torch.rand(n, half, generator=generator) * 131072
    angle[torch.rand(n, generator=generator) < 0.2] = 0.0
    k, v = pools(2, heads, dim, dtype, seed), pools(2, heads + 1, half, dtype, seed + 1)
    neox = data.draw(st.booleans(), label="neox")
    check(k, v, source, target, angle.cos(), angle.sin(), neox=neox, rotary_dim=2 * half, disjoint=disjoint)


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotary_dim"), [(64, 64), (80, 80), (128, 32), (256, 256)])
def test_usual_head_dims(dim: int, rotary_dim: int, dtype: torch.dtype, neox: bool) -> None:
    source, target = torch.arange(50, 70), torch.arange(3, 23)
    angle = torch.rand(20, rotary_dim // 2, generator=torch.Generator().manual_seed(1)) * 6.28
    k, v = pools(1, 2, dim, dtype, 1), pools(1, 2, dim, dtype, 2)
    check(k, v, source, target, angle.cos(), angle.sin(), neox=neox, rotary_dim=rotary_dim, disjoint=True)


@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("stage_bytes", [0, 1 << 20])
def test_a_target_may_be_a_source(shift: int, stage_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every source is read before any target is written, also when the layers are staged one by one."""
    monkeypatch.setattr(realign_triton, "STAGE_BYTES", stage_bytes)
    source = torch.arange(10, 80)
    angle = torch.rand(70, 8, generator=torch.Generator().manual_seed(1)) * 6.28
    k, v = pools(3, 2, 16, torch.bfloat16, 1), pools(3, 2, 16, torch.bfloat16, 2)
    check(k, v, source, source + shift, angle.cos(), angle.sin(), neox=True, rotary_dim=16, disjoint=False)


@pytest.mark.parametrize("neox", [True, False])
def test_unmoved_keys_keep_negative_zeros_and_long_rows_are_copied_whole(neox: bool) -> None:
    """``x * 1 - y * 0`` would turn -0 into +0; a long row of V is copied by several programs."""
    angle = torch.zeros(8, 8)
    angle[::2] = 1.0
    k, v = pools(1, 2, 16, torch.bfloat16, 1), pools(1, 10, 256, torch.bfloat16, 2)
    k[0][:10, :, ::3] = -0.0
    check(
        k, v, torch.arange(8), torch.arange(50, 58), angle.cos(), angle.sin(), neox=neox, rotary_dim=16, disjoint=True
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_the_reference(dtype: torch.dtype) -> None:
    """What serves CPU and what serves GPUs differ by fp32 roundings only (fused or not), one unit in the last place."""
    generator = torch.Generator().manual_seed(4)
    source, target = torch.randperm(SLOTS, generator=generator)[:80].view(2, 40)
    angle = torch.rand(40, 16, generator=generator) * 6.28
    k, v = pools(2, 3, 40, dtype, 1), pools(2, 3, 40, dtype, 2)
    k_other, v_other = [b.clone() for b in k], [b.clone() for b in v]
    realign(k_other, v_other, source, target, angle.cos(), angle.sin(), neox=True, rotary_dim=32)
    with interpreted():
        realign_on_device(kv_table(k, v), source, target, angle.cos(), angle.sin(), neox=True, rotary_dim=32)
    for one, other in zip(k + v, k_other + v_other, strict=True):
        torch.testing.assert_close(one, other, rtol=torch.finfo(dtype).eps, atol=1e-6)


@triton.jit
def _convert(source, decoded, encoded, N: tl.constexpr, NATIVE: tl.constexpr):
    at = tl.arange(0, N)
    value = decode_e4m3(tl.load(source + at), NATIVE)
    tl.store(decoded + at, value)
    tl.store(encoded + at, encode_e4m3(tl.load(decoded + N + at), NATIVE))


@pytest.mark.parametrize("native", [True, False])
def test_every_fp8_value(native: bool) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    values = every.view(FP8).float()
    # Every value, the midpoints between neighbours (ties), and values just off them.
    finite = values[values.isfinite()].sort().values
    middle = (finite[1:] + finite[:-1]) / 2
    probe = torch.cat(
        (finite, middle, middle * (1 + 2**-20), middle * (1 - 2**-20), torch.tensor([449.0, 470.0, -1e9]))
    )
    probe = torch.nn.functional.pad(probe, (0, 1024 - len(probe)))
    decoded, encoded = torch.full((2048,), torch.nan), torch.zeros(1024, dtype=torch.uint8)
    decoded[1024:] = probe
    with interpreted():
        _convert[(1,)](every.repeat(4), decoded, encoded, N=1024, NATIVE=native)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(decoded[:256], values, rtol=0, atol=0, equal_nan=True)
    # -0 compares equal to +0; the sign of a value that rounds to zero is kept.
    want = probe.clamp(-448, 448).to(FP8)
    assert torch.equal(encoded, want.view(torch.uint8))


def test_wrong_arguments_are_refused() -> None:
    k, v = pools(2, 2, 16, torch.float32, 1), pools(2, 2, 16, torch.float32, 2)
    slots, factors = torch.arange(4), torch.ones(4, 8)
    for case in (
        lambda: kv_table(k, v[:1]),
        lambda: kv_table([], []),
        lambda: kv_table([k[0], k[1].half()], v),
        lambda: kv_table([k[0], k[1][:, :1]], v),
        lambda: kv_table([b.transpose(0, 1) for b in k], v),
        lambda: kv_table([b.half() for b in k], v),
        lambda: realign_on_device(kv_table(k, v), slots.int(), slots, factors, factors, neox=True, rotary_dim=16),
        lambda: realign_on_device(kv_table(k, v), slots, slots, factors[:3], factors, neox=True, rotary_dim=16),
        lambda: realign_on_device(
            kv_table(k, v), slots, slots, torch.ones(4, 9), torch.ones(4, 9), neox=True, rotary_dim=18
        ),
    ):
        with pytest.raises(ValueError):
            case()


SIGNATURE: dict[str, str] = dict.fromkeys(("k_from", "v_from", "k_to", "v_to", "source_slots", "target_slots"), "*i64")
SIGNATURE |= {"cos": "*fp32", "sin": "*fp32", "n": "i32"}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("heads", "dim", "rotary_dim", "dtype", "neox"),
    [
        (8, 128, 128, torch.bfloat16, True),
        (8, 128, 128, torch.bfloat16, False),
        (4, 64, 64, torch.float16, True),
        (2, 256, 64, torch.bfloat16, True),
        (8, 128, 128, FP8, True),
    ],
)
def test_ahead_of_time(heads: int, dim: int, rotary_dim: int, dtype: torch.dtype, neox: bool, capability: int) -> None:
    row = torch.empty(1, heads, dim, dtype=dtype)
    options = launch_options(row, row, neox=neox, rotary_dim=rotary_dim, native=capability >= 89, aligned=True)
    built = build(realign_kernel, SIGNATURE, options, capability, aligned=("cos", "sin"))
    built.assert_no_spills()
    blocks = 4 if dtype == FP8 else 6  # of 4 warps; before 8.9 fp8 is converted by hand
    assert built.registers <= REGISTERS_PER_SM // (blocks * 128), f"fewer than {blocks} blocks fit"
    assert built.shared <= 16 << 10
    # Slots are 8 bytes wide, and so are the addresses; everything else is 16.
    assert {w for w in built.widths if w.startswith("st.")} == {"st.global.v4.b32"}
    assert {w for w in built.widths if w.startswith("ld.")} <= {"ld.global.v4.b32", "ld.global.b64"}


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_staged_copy_ahead_of_time(capability: int) -> None:
    signature = dict.fromkeys(("from_table", "to_table", "source_slots", "target_slots"), "*i64") | {"n": "i32"}
    constants = {"WORD": tl.int32, "ALIGNED": True, "WORDS": 512, "BLOCK": 128, "ROWS": 16}
    built = build(copy_rows_kernel, signature, constants, capability)
    built.assert_no_spills()
    assert {w for w in built.widths if w.startswith("st.")} == {"st.global.v4.b32"}
    assert set(built.widths) <= {"st.global.v4.b32", "ld.global.v4.b32", "ld.global.b64"}
