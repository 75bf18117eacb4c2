"""Decode influence against fp64, in Triton's interpreter and ahead of time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_relay_kernels.influence import (  # pyright: ignore[reportMissingImports]
    add_influence,
    influence_kernel,
    launch_options,
    reference,
    stages,
)
from triton_ahead import CAPABILITIES, REGISTERS_PER_SM, SHARED_PER_SM, build
from triton_interpreter import interpreted

FP8 = torch.float8_e4m3fn


def check(
    spans: list[tuple[int, int]],
    *,
    kv_heads: int = 2,
    group: int = 2,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    pool_dtype: torch.dtype | None = None,
    programs: int = 2,
    steps: int = 1,
) -> None:
    """spans: first generated position and length of each request; (0, 0) is a padding row of a graph."""
    generator = torch.Generator().manual_seed(5)
    batch, longest = len(spans), max((length for _, length in spans), default=0) + steps
    # Each request has its own slots; slot 0 is what padding rows point to.
    slot_table = torch.zeros(2 * batch + 1, longest + 5, dtype=torch.int32)
    table_rows = torch.randperm(2 * batch + 1, generator=generator)[:batch]
    slots = 1 + torch.randperm(batch * longest, generator=generator).int().view(batch, longest)
    slot_table[table_rows, :longest] = slots
    starts, lengths = (torch.tensor([span[i] for span in spans], dtype=torch.int64) for i in (0, 1))
    k = torch.full((batch * longest + 1, kv_heads, dim), torch.nan).to(pool_dtype or dtype)
    influence = torch.rand(len(k), generator=generator)
    want, added = influence.double(), torch.zeros(len(k), dtype=torch.bool)
    k_scale = 0.5 if pool_dtype == FP8 else 1.0
    for _ in range(steps):
        for request, (start, _) in enumerate(spans):
            own = slots[request, start : max(start, int(lengths[request]) - 1)].long()
            k[own] = torch.randn(len(own), kv_heads, dim, generator=generator).to(k.dtype)
            added[own] = True
        q = torch.randn(batch, kv_heads * group + 1, dim, generator=generator).to(dtype)[:, : kv_heads * group]
        lse = torch.randn(batch, kv_heads * group, generator=generator) + 4
        with interpreted():
            add_influence(
                *(q, lse, k, slot_table, table_rows, starts, lengths.int(), 0.3, influence),
                programs=programs,
                k_scale=k_scale,
            )
        want += reference(q, lse, k.float() * k_scale, slot_table, table_rows, starts, lengths, 0.3)
        lengths = torch.where(lengths > 0, lengths + 1, 0)
    assert torch.equal(influence[~added].double(), want[~added]), "a slot outside the spans changed"
    assert ((influence.double() - want).abs() <= 2.0**-18 * want).all()


def test_steps_of_a_batch() -> None:
    check([(30, 50), (5, 6), (0, 0), (7, 40)], steps=3)


def test_spans_of_no_and_of_one_token() -> None:
    check([(9, 10), (9, 11), (0, 1)])
    check([])


@pytest.mark.parametrize("programs", [1, 3, 8])
def test_long_spans_are_shared_between_programs(programs: int) -> None:
    check([(3, 400), (20, 90)], kv_heads=1, group=1, programs=programs)


@pytest.mark.parametrize(("kv_heads", "group", "dim"), [(1, 1, 8), (3, 3, 64), (2, 7, 80), (1, 32, 16)])
def test_heads_and_dims(kv_heads: int, group: int, dim: int) -> None:
    check([(4, 30)], kv_heads=kv_heads, group=group, dim=dim)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fp8", [False, True])
def test_dtypes(dtype: torch.dtype, fp8: bool) -> None:
    check([(4, 30)], dtype=dtype, pool_dtype=FP8 if fp8 else None)


@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_any_spans(data: st.DataObject) -> None:
    span = st.tuples(st.integers(0, 100), st.integers(0, 90)).map(lambda s: (s[0], s[0] + s[1]))
    check(
        data.draw(st.lists(span, max_size=4), label="spans"),
        kv_heads=data.draw(st.integers(1, 2), label="kv_heads"),
        group=data.draw(st.integers(1, 5), label="group"),
        programs=data.draw(st.integers(1, 4), label="programs"),
    )


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("dim", "pool"), [(128, "bf16"), (64, "bf16"), (256, "bf16"), (128, "u8")])
def test_ahead_of_time(dim: int, pool: str, capability: int) -> None:
    q = torch.empty(1, 32, dim, dtype=torch.bfloat16)
    row = torch.empty(1, 8, dim, dtype=FP8 if pool == "u8" else torch.bfloat16)
    built = build(
        influence_kernel,
        {
            **{"q": "*bf16", "lse": "*fp32", "k_buffer": f"*{pool}", "slot_table": "*i32", "table_rows": "*i64"},
            **{"span_starts": "*i64", "lengths": "*i64", "influence": "*fp32"},
            **{"q_row": "i32", "table_row": "i32", "scale": "fp32"},
        },
        launch_options(q, row, 8, capability >= 89),
        capability,
        aligned=("q", "lse", "k_buffer", "slot_table", "influence", "q_row"),
        stages=stages(dim),
    )
    built.assert_no_spills()
    assert built.registers <= REGISTERS_PER_SM // (2 * 128)
    assert built.shared <= SHARED_PER_SM[capability] // 2 - 1024
    wide = built.widths["ld.global.v4.b32"] + sum(n for w, n in built.widths.items() if w.startswith("cp.async.cg"))
    assert wide >= 64 * dim * row.element_size() // (128 * 16)
