"""Value deviation and the choice of tokens against fp64 and by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_relay_kernels.deviation import (  # pyright: ignore[reportMissingImports]
    deviation_kernel,
    launch_options,
    reference,
    segment_thresholds,
    select_rows,
    value_deviation,
)
from triton_ahead import CAPABILITIES, REGISTERS_PER_SM, build
from triton_interpreter import interpreted

FP8 = torch.float8_e4m3fn


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_against_fp64(data: st.DataObject) -> None:
    n = data.draw(st.integers(0, 40), label="n")
    heads = data.draw(st.integers(1, 4), label="heads")
    dim = data.draw(st.sampled_from([8, 24, 64, 256]), label="dim")
    dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), label="dtype")
    pool = data.draw(st.sampled_from([dtype, FP8]), label="pool")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))
    slots = torch.randperm(90, generator=generator)[:n].to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    cached = torch.full((90, heads, dim), torch.nan).to(pool)
    values = torch.randn(n, heads, dim, generator=generator)
    cached[slots.long()] = values.to(pool)
    fresh = torch.full((n, heads + 1, dim), torch.nan, dtype=dtype)[:, :heads]  # a part of longer rows
    fresh.copy_(values + 0.3 * torch.randn(n, heads, dim, generator=generator))
    fresh[: n // 4] = cached[slots[: n // 4].long()].to(dtype)
    if n:
        fresh[-1] = 0.0
    out = torch.full((n,), torch.nan)
    with interpreted():
        value_deviation(fresh, cached, slots, out)
    want = reference(fresh, cached.float(), slots)
    assert ((out.double() - want).abs() <= heads * 2.0**-20).all()
    assert n == 0 or abs(float(out[-1]) - heads) < 1e-6, "a zero vector is at distance one"


def test_the_best_are_chosen_in_order() -> None:
    score = torch.tensor([0.1, 0.8, 0.5, 0.9, 0.0, 0.95])
    assert select_rows(score, 3).rows.tolist() == [1, 3, 5]
    # Equal scores: the earlier token.
    assert select_rows(torch.ones(1000), 7).rows.tolist() == list(range(7))


def test_those_below_the_threshold_are_padding() -> None:
    score = torch.tensor([0.1, 0.9, 0.5, 0.9, 0.0, 0.7])
    chosen = select_rows(score, 5, least=0.7)
    assert chosen.rows.tolist() == [1, 3, 5, 6, 6] and int(chosen.count) == 3
    per_token = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    chosen = select_rows(score, 4, least=per_token)
    # The budget goes to the highest scores; of these only those that reach their own threshold stay.
    assert chosen.rows.tolist() == [6, 6, 6, 6] and int(chosen.count) == 0


def test_more_budget_than_tokens_and_no_tokens() -> None:
    assert select_rows(torch.tensor([0.2, 0.1]), 4).rows.tolist() == [0, 1, 2, 2]
    assert select_rows(torch.empty(0), 2).rows.tolist() == [0, 0]
    assert select_rows(torch.ones(3), 0).rows.tolist() == []


def test_what_cannot_be_judged_is_recomputed() -> None:
    assert select_rows(torch.tensor([0.2, torch.nan, 0.3]), 1, least=0.25).rows.tolist() == [1]


def test_thresholds_of_segments_empty_and_of_one_token() -> None:
    score = torch.tensor([1.0, 3.0, 5.0, 2.0, 4.0])
    lengths = torch.tensor([2, 0, 1, 2])
    assert segment_thresholds(score, lengths, 1.5).tolist() == [3.0, 3.0, 7.5, 4.5, 4.5]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("pool", ["bf16", "u8"])
def test_ahead_of_time(pool: str, capability: int) -> None:
    row = torch.empty(1, 8, 128, dtype=FP8 if pool == "u8" else torch.bfloat16)
    signature = {
        "fresh": "*bf16",
        "cached": f"*{pool}",
        "slots": "*i64",
        "out": "*fp32",
        "n": "i32",
        "fresh_row": "i32",
    }
    built = build(
        deviation_kernel,
        signature,
        launch_options(row, capability >= 89),
        capability,
        aligned=("fresh", "cached", "fresh_row"),
    )
    built.assert_no_spills()
    assert built.registers <= REGISTERS_PER_SM // (4 * 128)
    assert built.widths["ld.global.v4.b32"] + built.widths["ld.global.v2.b64"] >= 2
