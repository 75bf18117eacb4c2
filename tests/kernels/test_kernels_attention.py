"""Attention of scattered rows against fp64, in Triton's interpreter and ahead of time."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_relay_kernels.scattered_attention import (  # pyright: ignore[reportMissingImports]
    ScatteredSequence,
    Tiling,
    attend_scattered,
    choose_tiling,
    launch_options,
    merge_kernel,
    plan_scattered,
    reference,
    scattered_attention_kernel,
)
from triton_ahead import CAPABILITIES, REGISTERS_PER_SM, SHARED_PER_SM, build
from triton_interpreter import interpreted

FP8 = torch.float8_e4m3fn
CPU = torch.device("cpu")
SMALL = Tiling(16, 16, 4, 1)
MANY = 10**6
"""Multiprocessors enough to split every tile of more than 8 steps."""


def sequence(query: list[int] | range, key: list[int] | range) -> ScatteredSequence:
    return ScatteredSequence(np.array(query, dtype=np.int64), np.array(key, dtype=np.int64))


def check(
    sequences: list[ScatteredSequence],
    *,
    kv_heads: int = 2,
    group: int = 2,
    dim: int = 16,
    v_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    pool_dtype: torch.dtype | None = None,
    window_left: int = -1,
    tiling: Tiling = SMALL,
    multiprocessors: int = 1,
    seed: int = 0,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, keys = (sum(len(positions) for positions in kind) for kind in zip(*sequences, strict=True))
    slots = torch.randperm(2 * keys + 3, generator=generator)[:keys].int()
    pool_dtype = pool_dtype or dtype

    def pool(width: int) -> torch.Tensor:
        buffer = torch.full((2 * keys + 3, kv_heads, width), torch.nan).to(pool_dtype)  # whatever no list names is NaN
        buffer[slots] = torch.randn(keys, kv_heads, width, generator=generator).mul(2).to(pool_dtype)
        return buffer

    k, v = pool(dim), pool(v_dim)
    # As a projection leaves it: the query is a part of a longer row.
    q = torch.randn(rows, kv_heads * group + 3, dim, generator=generator).to(dtype)[:, : kv_heads * group]
    out = torch.full((rows, kv_heads * group, v_dim), torch.nan, dtype=dtype)
    lse = torch.full((rows, kv_heads * group), torch.nan)
    k_scale, v_scale = (0.5, 1.5) if pool_dtype == FP8 else (1.0, 1.0)
    with interpreted():
        plan = plan_scattered(
            sequences,
            group=group,
            kv_heads=kv_heads,
            tiling=tiling,
            multiprocessors=multiprocessors,
            device=CPU,
            window_left=window_left,
        )
        attend_scattered(plan, q, k, v, slots, 0.3, out, lse, k_scale=k_scale, v_scale=v_scale)
    want, mass = reference(sequences, q, k.float() * k_scale, v.float() * v_scale, slots, 0.3, window_left=window_left)
    # Scores to 10 in fp32; probabilities and outputs are rounded to the query's dtype once each.
    eps = 2.0**-19 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    assert _near(out, want, eps * 6)
    empty = mass.isinf()
    assert torch.equal(lse.isinf(), empty)
    assert (out[empty] == 0).all()
    assert _near(lse[~empty], mass[~empty], 2.0**-17)


def _near(got: torch.Tensor, want: torch.Tensor, bound: float) -> bool:
    return bool(((got.double() - want).abs() <= bound).all())


def test_reference_against_pytorch() -> None:
    """The reference is held to PyTorch's own causal attention."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(9, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    out, mass = reference([sequence(range(9), range(9))], q, k, v, torch.arange(9), 0.3)
    batch = [x.transpose(0, 1)[None] for x in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(
        batch[0], batch[1], batch[2], is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(out, want[0].transpose(0, 1))
    scores = torch.einsum("qhd,khd->qkh", q, k.repeat_interleave(2, 1)) * 0.3
    torch.testing.assert_close(mass[8], scores[8].exp().sum(0).log())


def test_a_whole_prompt() -> None:
    check([sequence(range(50), range(50))])


def test_a_chunk_after_a_prefix() -> None:
    check([sequence(range(40, 75), range(75))], dtype=torch.bfloat16)


def test_scattered_rows_see_everything_before_them_and_nothing_after() -> None:
    check([sequence([0, 1, 2, 7, 33, 59], range(60))])


def test_keys_with_holes() -> None:
    check([sequence([5, 20, 21, 90], [0, 3, 4, 5, 19, 20, 22, 60, 89, 91])])


def test_rows_that_see_no_key() -> None:
    check([sequence([0, 2, 9], [5, 7]), sequence([1, 2], [])])


def test_several_sequences_do_not_see_each_other() -> None:
    check(
        [sequence([3], range(4)), sequence([], range(7)), sequence(range(20), range(20)), sequence([9, 30], range(31))]
    )


@pytest.mark.parametrize("window_left", [0, 5, 40])
def test_sliding_window(window_left: int) -> None:
    check([sequence([*range(30), 100, 101, 180], range(190))], window_left=window_left)
    check([sequence([60, 99], range(0, 100, 3))], window_left=window_left, multiprocessors=MANY)


@pytest.mark.parametrize("rows", [[299], [100, 180, 299], range(200, 300)])
def test_few_queries_over_many_keys_are_split(rows: list[int]) -> None:
    check([sequence(rows, range(300)), sequence([2], range(3))], multiprocessors=MANY, dtype=torch.float16)


def test_positions_to_128k() -> None:
    keys = [*sorted(np.random.default_rng(1).choice(131072, 90, replace=False).tolist()), 131072]
    check([sequence([4, 70000, 131071, 131072], keys)])


@pytest.mark.parametrize(("kv_heads", "group"), [(1, 1), (3, 3), (2, 7), (1, 16), (5, 1)])
def test_grouped_queries(kv_heads: int, group: int) -> None:
    check([sequence([0, 1, 4, 9, 10, 11], range(12))], kv_heads=kv_heads, group=group)


@pytest.mark.parametrize(("dim", "v_dim"), [(8, 8), (24, 8), (80, 64), (192, 128)])
def test_dims(dim: int, v_dim: int) -> None:
    check([sequence([1, 3, 8, 30], range(31))], dim=dim, v_dim=v_dim, kv_heads=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp8_pool(dtype: torch.dtype) -> None:
    check([sequence([1, 3, 8, 30], range(31))], dtype=dtype, pool_dtype=FP8)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_rows_and_keys(data: st.DataObject) -> None:
    sequences = []
    for _ in range(data.draw(st.integers(1, 3), label="sequences")):
        end = data.draw(st.integers(1, 70), label="end")
        query = sorted(data.draw(st.sets(st.integers(0, end), max_size=12), label="query"))
        key = sorted(data.draw(st.sets(st.integers(0, end)) | st.just(set(range(end + 1))), label="key"))
        sequences.append(sequence(query, key))
    check(
        sequences,
        kv_heads=data.draw(st.integers(1, 2), label="kv_heads"),
        group=data.draw(st.integers(1, 5), label="group"),
        dtype=data.draw(st.sampled_from([torch.bfloat16, torch.float32]), label="dtype"),
        window_left=data.draw(st.sampled_from([-1, -1, 3, 20]), label="window"),
        multiprocessors=data.draw(st.sampled_from([1, MANY]), label="multiprocessors"),
    )


def _plan(sequences: list[ScatteredSequence], multiprocessors: int, window_left: int = -1):
    return plan_scattered(
        sequences,
        group=1,
        kv_heads=1,
        tiling=SMALL,
        multiprocessors=multiprocessors,
        device=CPU,
        window_left=window_left,
    )


def test_tiles_above_the_diagonal_are_skipped_and_below_it_not_masked() -> None:
    items = _plan([sequence(range(160), range(160))], 1).items
    begin, full_begin, full_end, end = items[:, 2:6].T
    # Ten tiles of 16 rows, the longest first; tile t reads 16 (t + 1) keys, the last 16 with a mask.
    assert end.tolist() == [16 * t for t in range(10, 0, -1)]
    assert full_end.tolist() == [16 * t for t in range(9, -1, -1)]
    assert not begin.any() and not full_begin.any()
    # Row 144 sees keys 97 to 144, row 159 keys 112 to 159: both see 112 to 144, of which the step 113 to 144 is whole.
    window = _plan([sequence(range(144, 160), range(160))], 1, window_left=47).items[0]
    assert window[2:6].tolist() == [97, 113, 145, 160]


def test_pieces_cover_each_key_once() -> None:
    plan = _plan([sequence([999], range(1000)), sequence([4], range(5))], MANY)
    pieces = plan.items[plan.items[:, 6] >= 0]
    spans = sorted(pieces[:, [2, 5]].tolist())
    assert spans[0][0] == 0 and spans[-1][1] == 1000
    assert all(left[1] == right[0] for left, right in pairwise(spans))
    assert all(stop - start <= 8 * 16 for start, stop in spans)
    assert plan.merges.tolist() == [[0, 1, 0, len(spans)]] and plan.partials == len(spans)
    assert sorted(pieces[:, 6].tolist()) == list(range(len(spans)))


@pytest.mark.parametrize("positions", [[3, 2], [1, 1], [-1, 0], [0, 2**31 - 1]])
def test_positions_out_of_order_are_refused(positions: list[int]) -> None:
    for wrong in (sequence(positions, [0]), sequence([0], positions)):
        with pytest.raises(ValueError, match="ascending"):
            _plan([wrong], 1)


SIGNATURE: dict[str, str] = {
    **{"lse": "*fp32", "partial_out": "*fp32", "partial_lse": "*fp32", "items": "*i32", "kv_slots": "*i32"},
    **{"query_positions": "*i32", "key_positions": "*i32", "q_row": "i32", "window_left": "i32"},
    **{"scale": "fp32", "v_scale": "fp32"},
}
ALIGNED = ("q", "k_buffer", "v_buffer", "out", "lse", "partial_out", "partial_lse", "items", "q_row")


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("packed_rows", "dim", "group", "pool", "window_left"),
    [
        (4096, 128, 4, "bf16", -1),
        (16, 128, 4, "bf16", -1),
        (64, 64, 3, "bf16", -1),
        (64, 128, 8, "bf16", -1),
        (4096, 64, 7, "bf16", -1),
        (4096, 256, 8, "bf16", 1023),
        (4096, 128, 4, "u8", -1),
    ],
)
def test_ahead_of_time(packed_rows: int, dim: int, group: int, pool: str, window_left: int, capability: int) -> None:
    q = torch.empty(1, 2 * group, dim, dtype=torch.bfloat16)
    row = torch.empty(1, 2, dim, dtype=FP8 if pool == "u8" else torch.bfloat16)
    tiling = choose_tiling(packed_rows, dim, dim, 2, capability)
    options = launch_options(q, row, row, tiling, window_left, capability >= 89)
    signature = SIGNATURE | {"q": "*bf16", "out": "*bf16", "k_buffer": f"*{pool}", "v_buffer": f"*{pool}"}
    built = build(
        scattered_attention_kernel,
        signature,
        options,
        capability,
        aligned=ALIGNED,
        warps=tiling.warps,
        stages=tiling.stages,
    )
    built.assert_no_spills()
    assert built.registers * 32 * tiling.warps <= REGISTERS_PER_SM
    assert built.shared <= SHARED_PER_SM[capability] - 1024
    # K and V arrive in shared memory by asynchronous copies of 16 bytes (some of fp8's of 8); those of 4 bytes fetch
    # slots and positions.
    copies = Counter(re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*?, 0x(\w+)[,;]", built.ptx))
    assert set(copies) <= ({"10", "8", "4"} if pool == "u8" else {"10", "4"}), copies
    copied = (16 * copies["10"] + 8 * copies["8"]) * 32 * tiling.warps
    assert copied >= 2 * tiling.block_n * dim * row.element_size()
    # The matrix units of each generation.
    unit = "mma.sync" if tiling.block_m < 64 else {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}[capability]
    assert unit in built.ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_merge_ahead_of_time(capability: int) -> None:
    signature = {"out": "*bf16", "lse": "*fp32", "partial_out": "*fp32", "partial_lse": "*fp32", "merges": "*i32"}
    constants = {"KV_HEADS": 8, "GROUP": 4, "V_DIM": 128, "BLOCK_DV": 128, "BLOCK_M": 16, "ROWS": 16}
    built = build(merge_kernel, signature, constants, capability, aligned=("out", "partial_out"))
    built.assert_no_spills()
    assert built.registers <= REGISTERS_PER_SM // (4 * 128)
    assert "ld.global.v4.b32" in built.widths
