"""The neighbour-weighted correction against fp64, in Triton's interpreter and ahead of time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_relay_kernels import delta_correction as dc  # pyright: ignore[reportMissingImports]
from sglang_relay_kernels.kv_table import kv_table  # pyright: ignore[reportMissingImports]
from triton_ahead import CAPABILITIES, REGISTERS_PER_SM, build
from triton_interpreter import interpreted

FP8 = torch.float8_e4m3fn
SLOTS = 80
PADDING = 3


def check(
    segment: list[int],
    rows: list[int],
    *,
    heads: int = 2,
    dim: int = 16,
    rotary_dim: int = 16,
    v_dim: int = 16,
    neox: bool = True,
    dtype: torch.dtype = torch.float32,
    first_position: int = 0,
) -> None:
    """Two layers; values of the first one weigh the neighbours. `rows` get `PADDING` entries, as of a fixed budget."""
    n = len(segment)
    generator = torch.Generator().manual_seed(n)
    slots = torch.randperm(SLOTS, generator=generator)[:n]
    position = torch.arange(first_position, first_position + n)
    angle = position[:, None] * 10000.0 ** -torch.linspace(0, 1, rotary_dim // 2, dtype=torch.float64)
    cos, sin = angle.cos().float(), angle.sin().float()

    def pool(width: int) -> list[torch.Tensor]:
        whole = torch.full((2, SLOTS, heads, width), torch.nan)
        whole[:, slots] = torch.randn(2, n, heads, width, generator=generator) + 1
        return list(whole.to(dtype).unbind())

    k, v = pool(dim), pool(v_dim)
    table = kv_table(k, v)
    padded = torch.tensor(rows + [n] * PADDING)
    row_slots = slots[padded.clamp(max=n - 1)] if n else padded[:0]
    row_factors = [f[padded.clamp(max=n - 1)] if n else f for f in (cos, sin)]
    donor = [(a[slots], b[slots]) for a, b in zip(k, v, strict=True)]
    with interpreted():
        neighbours = dc.nearest_recomputed(padded, torch.tensor(segment, dtype=torch.int64))
        weights = dc.neighbour_weights(v[0], slots, padded, neighbours)
        saved = dc.save_rows(table, row_slots)
        for buffer in (*k, *v):  # the repair
            buffer[slots[rows]] = torch.randn(len(rows), heads, buffer.shape[2], generator=generator).to(dtype)
        repaired = [(a[slots], b[slots]) for a, b in zip(k, v, strict=True)]
        before = [buffer.clone() for buffer in (*k, *v)]
        deltas = dc.observe(table, saved, row_slots, *row_factors, neox=neox, rotary_dim=rotary_dim)
        dc.correct(table, slots, deltas, neighbours, weights, cos, sin, neox=neox, rotary_dim=rotary_dim)
    used = torch.zeros(SLOTS, dtype=torch.bool)
    used[slots] = True
    used[slots[rows]] = False
    for old, new in zip(before, (*k, *v), strict=True):
        assert torch.equal(old.view(torch.uint8)[~used], new.view(torch.uint8)[~used]), "a recomputed or foreign slot"
    # Changes and results are rounded to the pool's dtype (changes of an fp8 pool to bfloat16).
    eps = max(torch.finfo(dtype).eps, 2.0**-18)
    for layer in range(2):
        want = dc.reference(
            (donor[layer][0].float(), donor[layer][1].float()),
            (repaired[layer][0].float(), repaired[layer][1].float()),
            donor[0][1].float(),
            rows,
            segment,
            cos,
            sin,
            neox=neox,
            rotary_dim=rotary_dim,
        )
        for got, expected in zip((k[layer], v[layer]), want, strict=True):
            error = (got[slots].double() - expected).abs()
            assert (error <= eps * (expected.abs() + 2.0)).all(), float(error.max())


def test_one_segment() -> None:
    check([0] * 40, [0, 1, 2, 3, 9, 10, 20, 21, 22, 23, 24, 25, 39])


def test_neighbours_stay_in_their_segment() -> None:
    check([0] * 10 + [1] * 12 + [2] * 8, [0, 9, 21, 22])


def test_segments_without_recomputed_tokens_are_left_alone() -> None:
    check([0] * 5 + [1] + [2] * 6, [7])
    check([0] * 5, [])
    check([0], [0])
    check([], [])


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize(("dim", "rotary_dim", "v_dim"), [(40, 40, 8), (64, 16, 64), (18, 16, 24)])
def test_pairings_and_partial_rotary(dim: int, rotary_dim: int, v_dim: int, neox: bool) -> None:
    check([0] * 20, [1, 5, 6, 17], dim=dim, rotary_dim=rotary_dim, v_dim=v_dim, neox=neox)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, FP8])
def test_dtypes(dtype: torch.dtype) -> None:
    check([0] * 20, [1, 5, 6, 17], dtype=dtype)


def test_positions_to_128k() -> None:
    check([0] * 20, [1, 5, 6, 17], first_position=131050)


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_any_segments(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 16), max_size=3), label="lengths")
    segment = [number for number, length in enumerate(lengths) for _ in range(length)]
    tokens = st.integers(0, max(0, len(segment) - 1))
    rows = sorted(data.draw(st.sets(tokens, max_size=20), label="rows")) if segment else []
    check(segment, rows, heads=1, dim=8, rotary_dim=8, v_dim=8)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_nearest_by_trying_all(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 40), max_size=4))
    segment = [number for number, length in enumerate(lengths) for _ in range(length)]
    rows = sorted(data.draw(st.sets(st.integers(0, len(segment) - 1)))) if segment else []
    padded = rows + [len(segment)] * data.draw(st.integers(0, 3))
    got = dc.nearest_recomputed(torch.tensor(padded, dtype=torch.int64), torch.tensor(segment, dtype=torch.int64))
    for token, indices in enumerate(got.tolist()):
        near = sorted((i for i in rows if segment[i] == segment[token]), key=lambda i: (abs(i - token), i))
        want = [] if token in rows else near[: dc.NEIGHBOURS]
        assert [padded[i] for i in indices if i >= 0] == want
        assert indices[len(want) :] == [-1] * (dc.NEIGHBOURS - len(want))


TABLES = dict.fromkeys(("k_table", "v_table"), "*i64")
FACTORS = {"slots": "*i64", "cos": "*fp32", "sin": "*fp32", "m": "i32"}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("dim", "rotary_dim", "dtype"), [(128, 128, "bf16"), (64, 32, "fp16"), (128, 128, "fp8")])
def test_ahead_of_time(dim: int, rotary_dim: int, dtype: str, capability: int) -> None:
    row = torch.empty(1, 8, dim, dtype={"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": FP8}[dtype])
    change = {"bf16": "*bf16", "fp16": "*fp16", "fp8": "*bf16"}[dtype]
    changes = {"k_change": change, "v_change": change}
    aligned = ("cos", "sin", "k_change", "v_change")
    options = dc.launch_options(row, row, neox=True, rotary_dim=rotary_dim, native=capability >= 89, aligned=True)
    saved = dict.fromkeys(("k_saved", "v_saved"), "*i64")
    observed = build(dc.observe_kernel, TABLES | saved | changes | FACTORS, options, capability, aligned=aligned)
    applied = build(
        dc.correct_kernel,
        TABLES
        | changes
        | FACTORS
        | {"neighbours": "*i32", "weights": "*fp32", "n": "i32", "key_factor": "fp32", "value_factor": "fp32"},
        options | {"NEIGHBOURS": dc.NEIGHBOURS},
        capability,
        aligned=(*aligned, "neighbours", "weights"),
    )
    for built in (observed, applied):
        built.assert_no_spills()
        assert built.registers <= REGISTERS_PER_SM // (4 * 128)
        stores = {w for w in built.widths if w.startswith("st.")}
        assert stores <= {"st.global.v4.b32", "st.global.v2.b32"} and (dtype == "fp8" or len(stores) == 1)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_weights_ahead_of_time(capability: int) -> None:
    built = build(
        dc.neighbour_weights_kernel,
        {"values": "*bf16", "slots": "*i64", "rows": "*i64", "neighbours": "*i32", "weights": "*fp32"},
        {
            **{"SHARPNESS": dc.SHARPNESS, "REACH": dc.REACH, "FP8": False, "NATIVE": False},
            **{"ROW": 1024, "BLOCK": 512, "NEIGHBOURS": dc.NEIGHBOURS},
        },
        capability,
        aligned=("values", "neighbours", "weights"),
    )
    built.assert_no_spills()
    assert built.widths["ld.global.v4.b32"] >= 2
