"""Scores of segment tokens by probe queries against fp64, in Triton's interpreter and ahead of time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_relay_kernels.probe_scores import (  # pyright: ignore[reportMissingImports]
    add_probe_scores,
    launch_options,
    plan_probe,
    probe_scores_kernel,
    reference,
)
from triton_ahead import CAPABILITIES, REGISTERS_PER_SM, SHARED_PER_SM, build
from triton_interpreter import interpreted

FP8 = torch.float8_e4m3fn
CPU = torch.device("cpu")


def check(
    requests: list[tuple[list[int], list[int]]],
    *,
    kv_heads: int = 2,
    group: int = 2,
    dim: int = 16,
    v_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    pool_dtype: torch.dtype | None = None,
    window_left: int = -1,
) -> None:
    """The queries' log-sum-exp runs over more keys than the segments': each has a mass of its own beside them."""
    generator = torch.Generator().manual_seed(3)
    work = [(np.array(q, dtype=np.int64), np.array(k, dtype=np.int64)) for q, k in requests]
    queries, keys = sum(len(q) for q, _ in work), sum(len(k) for _, k in work)
    slots = torch.randperm(2 * keys + 2, generator=generator)[:keys]

    def pool(width: int) -> torch.Tensor:
        buffer = torch.full((2 * keys + 2, kv_heads, width), torch.nan).to(pool_dtype or dtype)
        buffer[slots] = torch.randn(keys, kv_heads, width, generator=generator).to(buffer.dtype)
        return buffer

    k, v = pool(dim), pool(v_dim)
    q = torch.randn(queries, kv_heads * group + 1, dim, generator=generator).to(dtype)[:, : kv_heads * group]
    lse = torch.randn(queries, kv_heads * group, generator=generator) + 3
    scores = torch.rand(kv_heads, keys, generator=generator)
    before = scores.double()
    k_scale, v_scale = (0.5, 1.5) if pool_dtype == FP8 else (1.0, 1.0)
    with interpreted():
        plan = plan_probe(work, device=CPU, window_left=window_left)
        add_probe_scores(plan, q, lse, k, v, slots, 0.3, 0.25, scores, k_scale=k_scale, v_scale=v_scale)
    added = reference(work, q, lse, k.float() * k_scale, v.float() * v_scale, slots, 0.3, window_left=window_left)
    want = before + 0.25 * added
    assert ((scores.double() - want).abs() <= 2.0**-18 * want.abs() + 1e-7).all()


def test_one_request() -> None:
    check([(list(range(90, 98)), list(range(10, 90)))])


def test_segments_with_holes_between_and_after_the_queries() -> None:
    """A probe row sees no key behind it; keys of two segments are not adjacent."""
    check([([40, 41, 99, 100], [*range(5, 30), *range(60, 70), 99, 100, 101])])


def test_empty_and_one_token_segments() -> None:
    check([([5], []), ([7, 8], [3]), ([], [1, 2]), ([1], [0])])
    check([])


def test_several_requests_do_not_see_each_other() -> None:
    check([([70], list(range(70))), ([9, 10], list(range(9))), (list(range(200, 240)), list(range(100, 170)))])


@pytest.mark.parametrize(("kv_heads", "group", "dim", "v_dim"), [(1, 1, 8, 8), (3, 3, 64, 64), (1, 7, 80, 40)])
def test_heads_and_dims(kv_heads: int, group: int, dim: int, v_dim: int) -> None:
    check([([30, 31], list(range(20)))], kv_heads=kv_heads, group=group, dim=dim, v_dim=v_dim)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fp8", [False, True])
def test_dtypes(dtype: torch.dtype, fp8: bool) -> None:
    check([([30, 31], list(range(20)))], dtype=dtype, pool_dtype=FP8 if fp8 else None)


def test_positions_to_128k_and_a_window() -> None:
    check([([131070, 131071], [0, 5, 70000, 131000, 131071])])
    check([([131070, 131071], [0, 5, 70000, 131000, 131071])], window_left=70)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_queries_and_keys(data: st.DataObject) -> None:
    positions = st.sets(st.integers(0, 150), max_size=90).map(sorted)
    check(
        data.draw(st.lists(st.tuples(positions, positions), max_size=3), label="requests"),
        kv_heads=data.draw(st.integers(1, 2), label="kv_heads"),
        group=data.draw(st.integers(1, 5), label="group"),
        window_left=data.draw(st.sampled_from([-1, 0, 12]), label="window"),
    )


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("dim", "pool"), [(128, "bf16"), (64, "bf16"), (256, "bf16"), (128, "u8")])
def test_ahead_of_time(dim: int, pool: str, capability: int) -> None:
    q = torch.empty(1, 32, dim, dtype=torch.bfloat16)
    row = torch.empty(1, 8, dim, dtype=FP8 if pool == "u8" else torch.bfloat16)
    built = build(
        probe_scores_kernel,
        {
            **{"q": "*bf16", "lse": "*fp32", "k_buffer": f"*{pool}", "v_buffer": f"*{pool}", "scores": "*fp32"},
            **{"items": "*i32", "query_positions": "*i32", "key_positions": "*i32", "kv_slots": "*i64"},
            **{"keys": "i32", "q_row": "i32", "window_left": "i32", "scale": "fp32", "weight": "fp32"},
        },
        launch_options(q, row, row, -1, capability >= 89),
        capability,
        aligned=("q", "lse", "k_buffer", "v_buffer", "scores", "items", "q_row"),
        stages=2,
    )
    built.assert_no_spills()
    assert built.registers <= REGISTERS_PER_SM // (2 * 128)
    assert built.shared <= SHARED_PER_SM[capability] // 2 - 1024
    assert built.widths["ld.global.v4.b32"] >= 2 * 64 * dim * row.element_size() // (128 * 16)
