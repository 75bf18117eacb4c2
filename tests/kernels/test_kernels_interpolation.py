"""The interpolation's kernels against fp64, in Triton's interpreter and ahead of time."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_relay_kernels.interpolation_carry import (  # pyright: ignore[reportMissingImports]
    carry_kernel,
    carry_rows,
    reference_carry,
)
from sglang_relay_kernels.interpolation_changes import (  # pyright: ignore[reportMissingImports]
    change_kernel,
    change_rows,
    reference_change,
    save_rows,
)
from sglang_relay_kernels.interpolation_looks import (  # pyright: ignore[reportMissingImports]
    look_kernel,
    look_rows,
    reference_look,
)
from sglang_relay_kernels.interpolation_plan import (  # pyright: ignore[reportMissingImports]
    DTYPES,
    Plan,
    Rows,
    launch_options,
    padded_width,
    plan_items,
)
from torch import Tensor
from triton_ahead import CAPABILITIES, REGISTERS_PER_SM, SHARED_PER_SM, Built, build
from triton_interpreter import interpreted

SLOTS = 160


class Shape(NamedTuple):
    heads: int = 2
    dim: int = 16
    rotary_dim: int = 16
    v_heads: int = 2
    v_dim: int = 16
    neox: bool = True
    dtype: torch.dtype = torch.float32

    @property
    def rotary(self) -> dict:
        return {"neox": self.neox, "rotary_dim": self.rotary_dim}

    @property
    def sides(self) -> tuple[tuple[int, int], tuple[int, int]]:
        return (self.heads, self.dim), (self.v_heads, self.v_dim)


SHAPES = st.builds(
    lambda heads, half, rest, v_heads, v_dim, neox, dtype: Shape(
        heads, 2 * half + rest, 2 * half, v_heads, v_dim, neox, dtype
    ),
    *(st.sampled_from(x) for x in ([1, 2, 3], [1, 5, 8, 32], [0, 2, 16, 40], [1, 2, 3], [1, 8, 40, 64])),
    st.booleans(),
    st.sampled_from(DTYPES),
)
SIZES = st.lists(st.tuples(st.integers(1, 70), st.integers(1, 40)), min_size=1, max_size=3).filter(
    lambda sizes: sum(map(sum, sizes)) <= SLOTS
)


def rows_at(slots: Tensor, shape: Shape, generator: torch.Generator) -> Rows:
    angle = torch.rand(len(slots), shape.rotary_dim // 2, generator=generator) * 131072
    return Rows(slots.contiguous(), angle.cos(), angle.sin())


def layer(used: Tensor, shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What nobody may read is NaN."""
    found = []
    for side in shape.sides:
        buffer = torch.full((SLOTS, *side), torch.nan)
        buffer[used] = torch.randn(len(used), *side, generator=generator)
        found.append(buffer.to(shape.dtype))
    return found[0], found[1]


def bits(buffer: Tensor) -> Tensor:
    return buffer.view(torch.uint8)


def near(got: Tensor, want: Tensor, dtype: torch.dtype, size: float | Tensor) -> None:
    """One rounding of the result to ``dtype``, and a few fp32 roundings of terms of ``size``."""
    eps = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    error = (got.double() - want).abs()
    assert (error <= eps / 2 * want.abs() + 2.0**-20 * size + torch.finfo(dtype).tiny).all(), float(error.max())


def check(sizes: list[tuple[int, int]], shape: Shape, seed: int = 0) -> None:
    """Three layers in order, each with its kept and chosen tokens in slots of no order."""
    generator = torch.Generator().manual_seed(seed)
    u, m = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (0, 0)
    slots = torch.randperm(SLOTS, generator=generator)
    kept, chosen = (rows_at(s, shape, generator) for s in (slots[:u], slots[u : u + m]))
    layers = [layer(slots[: u + m], shape, generator) for _ in range(3)]
    options = launch_options(*layers[0], **shape.rotary)
    width = padded_width(max((m for _, m in sizes), default=0))
    weights = torch.full((u, width), 7.0, dtype=shape.dtype)  # no part may see what is behind its own
    parts, some, others = [], 0, 0
    for a, b in sizes:
        weights[some : some + a, :b] = torch.randn(a, b, generator=generator) / b
        parts.append((torch.arange(some, some + a), torch.arange(others, others + b), weights[some : some + a, :b]))
        some, others = some + a, others + b
    items = torch.from_numpy(plan_items(sizes, options["carry"]["BLOCK_KEPT"]))
    plan = Plan(kept, chosen, weights, items, options)
    with interpreted():
        before = save_rows(plan, *layers[0])
    for i, (keys, values) in enumerate(layers):
        for got, buffer in zip(before, (keys, values), strict=True):
            assert torch.equal(bits(got), bits(buffer[chosen.slots]))
            buffer[chosen.slots] = (2 * torch.randn(m, *buffer.shape[1:], generator=generator)).to(shape.dtype)
        following = layers[i + 1] if i < 2 else None
        as_it_was = [buffer.clone() for pair in (layers[i], following or ()) for buffer in pair]
        with interpreted():
            change, after = change_rows(plan, keys, values, before, following)
        assert change.dtype == shape.dtype
        near(change, reference_change(keys, values, before, chosen, **shape.rotary), shape.dtype, 16.0)
        want = reference_carry(keys, values, change, parts, kept, **shape.rotary)
        with interpreted():
            carry_rows(plan, keys, values, change)
        untouched = torch.ones(SLOTS, dtype=torch.bool)
        untouched[kept.slots] = False
        for buffer, old, expected in zip((keys, values), as_it_was, want, strict=False):
            assert torch.equal(bits(buffer)[untouched], bits(old)[untouched]), "a chosen or a foreign slot changed"
            near(buffer[kept.slots], expected, shape.dtype, 16.0)
        for buffer, old in zip(following or (), as_it_was[2:], strict=True):
            assert torch.equal(bits(buffer), bits(old)), "the following layer is read only"
        assert (after is None) == (following is None)
        before = after or before


@pytest.fixture(autouse=True)
def outputs_start_as_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write shows."""

    def filled(made: Tensor) -> Tensor:
        return made.fill_(torch.nan) if made.is_floating_point() else made

    empty, new_empty = torch.empty, Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: filled(empty(*a, **k)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *a, **k: filled(new_empty(*a, **k)))


@settings(max_examples=20, deadline=None)
@given(SIZES, SHAPES, st.integers(0, 99))
def test_any_parts_and_shapes(sizes: list[tuple[int, int]], shape: Shape, seed: int) -> None:
    check(sizes, shape, seed)


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "rotary_dim"), [(64, 64), (80, 80), (128, 32), (256, 256)])
def test_usual_head_dims(dim: int, rotary_dim: int, dtype: torch.dtype, neox: bool) -> None:
    check([(3, 2)], Shape(1, dim, rotary_dim, 1, dim, neox, dtype))


def test_one_token_no_token_and_more_than_a_block() -> None:
    check([(1, 1)], Shape())
    check([], Shape())
    check([(1, 100), (40, 1)], Shape(dtype=torch.bfloat16))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 40), SHAPES, st.integers(1, 3), st.integers(0, 99))
def test_looks(n: int, shape: Shape, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(SLOTS, generator=generator)[:n]
    layers = [layer(slots, shape, generator) for _ in range(count)]
    layers[0][1][slots[: n // 5]] = 0.0  # a token that looks like nothing
    rows = rows_at(slots, shape, generator)
    with interpreted():
        got = look_rows(layers, rows, **shape.rotary)
    torch.testing.assert_close(got.double(), reference_look(layers, rows, **shape.rotary), rtol=0, atol=2e-6)


def test_what_no_kernel_serves_is_refused() -> None:
    keys, values = torch.zeros(2, 4, 2, 16).unbind()
    for case in ((keys, values.half()), (keys.double(), values.double()), (keys.transpose(0, 1), values)):
        with pytest.raises(ValueError):
            launch_options(*case, neox=True, rotary_dim=16)
    for rotary_dim in (0, 7, 18):
        with pytest.raises(ValueError):
            launch_options(keys, values, neox=True, rotary_dim=rotary_dim)


NAMES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
FACTORS = {"slots": "*i64", "cos": "*fp32", "sin": "*fp32"}
AHEAD = pytest.mark.parametrize(
    ("dim", "rotary_dim", "dtype", "neox"),
    [
        (128, 128, torch.bfloat16, True),
        (128, 128, torch.bfloat16, False),
        (64, 32, torch.float16, True),
        (256, 64, torch.bfloat16, True),
        (128, 128, torch.float32, True),
    ],
)


def compiled(name: str, dim: int, rotary_dim: int, dtype: torch.dtype, neox: bool, capability: int) -> Built:
    row = torch.zeros(1, 8, dim, dtype=dtype)
    options = launch_options(row, row, neox=neox, rotary_dim=rotary_dim)[name]
    buffers = {"keys": NAMES[dtype], "values": NAMES[dtype]}
    if name == "change":
        names = ("k_before", "v_before", "change", "next_keys", "next_values", "k_after", "v_after")
        buffers |= dict.fromkeys(names, NAMES[dtype])
        signature, numbers = FACTORS | {"first_task": "i32", "m": "i32"}, ()
    elif name == "look":
        buffers |= {"out": "*fp32"}
        signature, numbers = FACTORS | {"n": "i32", "length": "fp32", "out_row": "i32"}, ("out_row",)
    else:
        buffers |= {"change": NAMES[dtype], "weights": NAMES[dtype]}
        signature, numbers = FACTORS | {"items": "*i32", "weights_row": "i32"}, ("weights_row",)
    kernel = {"change": change_kernel, "look": look_kernel, "carry": carry_kernel}[name]
    aligned, stages = (*buffers, "cos", "sin", *numbers), 2 if name == "carry" else 3
    built = build(kernel, buffers | signature, options, capability, aligned=aligned, stages=stages)
    built.assert_no_spills()
    return built


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["change", "look"])
@AHEAD
def test_rows_ahead_of_time(
    name: str, dim: int, rotary_dim: int, dtype: torch.dtype, neox: bool, capability: int
) -> None:
    built = compiled(name, dim, rotary_dim, dtype, neox, capability)
    assert built.registers <= REGISTERS_PER_SM // (4 * 128), "fewer than 4 blocks fit"
    assert built.shared <= 16 << 10
    # Slots are 8 bytes wide; everything else is 16.
    assert {w for w in built.widths if w.startswith("st.")} == {"st.global.v4.b32"}
    assert {w for w in built.widths if w.startswith("ld.")} <= {"ld.global.v4.b32", "ld.global.b64"}


@pytest.mark.parametrize("capability", CAPABILITIES)
@AHEAD
def test_product_ahead_of_time(dim: int, rotary_dim: int, dtype: torch.dtype, neox: bool, capability: int) -> None:
    built = compiled("carry", dim, rotary_dim, dtype, neox, capability)
    assert built.registers <= REGISTERS_PER_SM // (2 * 128), "fewer than 2 blocks fit"
    assert built.shared <= SHARED_PER_SM[capability] // 2 - 1024
    assert {w for w in built.widths if w.startswith("st.")} == {"st.global.v4.b32"}
    # K, V, changes and weights 16 bytes; slots are 8 bytes wide, an item's numbers 4.
    loads = {w for w in built.widths if w.startswith(("ld.", "cp."))}
    assert loads == {"ld.global.v4.b32", "cp.async.cg.shared.global", "ld.global.b64", "ld.global.b32"}
    assert built.widths["ld.global.b32"] == 4
