"""Copy and re-rotation of cached K and V against fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_relay_kernels.realign import realign  # pyright: ignore[reportMissingImports]
from torch import Tensor

SLOTS = 1024
DTYPES = (torch.bfloat16, torch.float32, torch.float16)


def pools(layers: int, heads: int, dim: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SLOTS, heads, dim, generator=generator).to(dtype) for _ in range(layers)]


def rotation(n: int, rotary_dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    angle = torch.rand(n, rotary_dim // 2, generator=torch.Generator().manual_seed(seed)) * 6.28
    return angle.cos(), angle.sin()


def turned(keys: Tensor, cos: Tensor, sin: Tensor, neox: bool) -> Tensor:
    """Keys ``[n, heads, dim]``, rotated in fp64 as complex numbers."""
    half = cos.shape[1]
    out = keys.double().clone()
    first, second = (range(half), range(half, 2 * half)) if neox else (range(0, 2 * half, 2), range(1, 2 * half, 2))
    pair = (
        torch.complex(out[..., list(first)], out[..., list(second)])
        * torch.complex(cos.double(), sin.double())[:, None]
    )
    out[..., list(first)], out[..., list(second)] = pair.real, pair.imag
    return out


def check(
    k: list[Tensor],
    v: list[Tensor],
    source: Tensor,
    target: Tensor,
    cos: Tensor,
    sin: Tensor,
    neox: bool,
    rotary_dim: int,
) -> None:
    k_before, v_before = [b.clone() for b in k], [b.clone() for b in v]
    realign(k, v, source, target, cos, sin, neox=neox, rotary_dim=rotary_dim)
    touched = torch.zeros(SLOTS, dtype=torch.bool)
    touched[target] = True
    for before, after in zip(k_before + v_before, k + v, strict=True):
        assert torch.equal(before[~touched], after[~touched]), "a slot that is no target changed"
    for before, after in zip(v_before, v, strict=True):
        assert torch.equal(after[target], before[source])
    still = ((cos == 1) & (sin == 0)).all(-1)
    for before, after in zip(k_before, k, strict=True):
        keys, got = before[source], after[target]
        same = (got.view(torch.uint8) == keys.view(torch.uint8)).view(*got.shape, got.element_size()).all(-1)
        assert same[still].all(), "an unmoved key lost its bits"
        assert same[..., rotary_dim:].all(), "the part without positions changed"
        want = turned(keys, cos, sin, neox)
        # One rounding to the cache dtype, and a few fp32 roundings of terms as large as the pair.
        bound = torch.finfo(keys.dtype).eps / 2 * want.abs() + 2.0**-21 * keys.double().abs().amax(-1, True) + 1e-7
        assert ((got.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim", "rotary_dim"), [(3, 64, 64), (2, 128, 32), (1, 80, 80), (5, 6, 4)])
@pytest.mark.parametrize("slots", ["scattered", "runs", "one run"])
def test_against_fp64(slots: str, heads: int, dim: int, rotary_dim: int, dtype: torch.dtype, neox: bool) -> None:
    n = 400
    if slots == "scattered":
        source, target = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(3))[: 2 * n].view(2, n)
    elif slots == "runs":  # the two sides break at different rows
        source = torch.arange(600, 1000)
        target = torch.cat((torch.arange(201, 401), torch.arange(1, 201)))
    else:
        source, target = torch.arange(600, 1000), torch.arange(1, 401)
    # A pool may hold V in another shape than K.
    k, v = pools(2, heads, dim, dtype, 1), pools(2, heads + 1, dim // 2, dtype, 2)
    check(k, v, source, target, *rotation(n, rotary_dim), neox, rotary_dim)


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_unmoved_tokens_keep_their_bits(share: float, neox: bool) -> None:
    n = 300
    cos, sin = rotation(n, 16)
    still = torch.rand(n, generator=torch.Generator().manual_seed(5)) < share
    cos[still], sin[still] = 1.0, 0.0
    k, v = pools(2, 2, 16, torch.bfloat16, 1), pools(2, 2, 16, torch.bfloat16, 2)
    k[0][:20] = -0.0  # x * 1 + y * 0 would turn -0 into 0
    check(k, v, torch.arange(n), torch.arange(500, 500 + n), cos, sin, neox, 16)


@pytest.mark.parametrize("shift", [-7, 7])
@pytest.mark.parametrize("shuffled", [True, False])
def test_a_target_may_be_a_source(shift: int, shuffled: bool) -> None:
    """Rows are read before any is written, whichever way the copy is done."""
    n = 400
    order = torch.randperm(n, generator=torch.Generator().manual_seed(7)) if shuffled else torch.arange(n)
    source = order + 100
    k, v = pools(1, 2, 16, torch.float32, 1), pools(1, 2, 16, torch.float32, 2)
    check(k, v, source, source + shift, *rotation(n, 16), True, 16)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_slots(data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 40))
    heads, half = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    dim = 2 * half + data.draw(st.integers(0, 3))
    slots = data.draw(st.lists(st.integers(0, SLOTS - 1), min_size=2 * n, max_size=2 * n, unique=True))
    source, target = torch.tensor(slots, dtype=torch.int64).view(2, n)
    dtype = data.draw(st.sampled_from(DTYPES))
    k, v = pools(1, heads, dim, dtype, n), pools(1, heads, dim, dtype, n + 1)
    check(k, v, source, target, *rotation(n, 2 * half, n), data.draw(st.booleans()), 2 * half)


def test_wrong_shapes_are_refused() -> None:
    k, v = pools(2, 2, 16, torch.float32, 1), pools(2, 2, 16, torch.float32, 2)
    slots, (cos, sin) = torch.arange(4), rotation(4, 16)
    wrong = [
        (k, v, slots.int(), slots, cos, sin, 16),
        (k, v, slots, slots[:3], cos, sin, 16),
        (k, v, slots, slots, cos[:3], sin[:3], 16),
        (k, v, slots, slots, cos, sin, 8),
        (k, v, slots, slots, cos.double(), sin.double(), 16),
        (k, v[:1], slots, slots, cos, sin, 16),
        ([k[0], k[1][..., :8]], v, slots, slots, cos, sin, 16),
    ]
    for k_buffers, v_buffers, source, target, c, s, rotary_dim in wrong:
        with pytest.raises(ValueError):
            realign(k_buffers, v_buffers, source, target, c, s, neox=True, rotary_dim=rotary_dim)
