"""Attention of scattered query rows against an fp64 loop over single queries and heads."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_relay.attention import Sequence, attend, plan_attention
from sglang_relay.attention.torch_sdpa import BLOCK_ROWS

SCALE = 0.3
CPU = torch.device("cpu")


def by_hand(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: list[int], slots: torch.Tensor
) -> torch.Tensor:
    """fp64; query: [rows, heads, dim] of one request."""
    group = query.shape[1] // keys.shape[1]
    out = torch.zeros(*query.shape[:2], values.shape[-1], dtype=torch.float64)
    for row, position in enumerate(positions):
        seen = slots[: position + 1]
        for head in range(query.shape[1]):
            k, v = keys[seen, head // group].double(), values[seen, head // group].double()
            out[row, head] = torch.softmax(k @ query[row, head].double() * SCALE, 0) @ v
    return out


def check(
    requests: list[tuple[list[int], torch.Tensor]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    v_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    pool_dtype: torch.dtype | None = None,
    seed: int = 0,
    atol: float = 2e-6,
) -> None:
    """``requests``: positions and slots of each. Whatever no row may see holds NaN, and so does the output at first."""
    generator = torch.Generator().manual_seed(seed)
    pool = 1 + max(int(slots.max()) for _, slots in requests) + 3
    pool_dtype = pool_dtype or dtype
    keys = torch.full((pool, kv_heads, dim), torch.nan, dtype=pool_dtype)
    values = torch.full((pool, kv_heads, v_dim), torch.nan, dtype=pool_dtype)
    for positions, slots in requests:
        used = slots[: positions[-1] + 1]
        keys[used] = torch.randn(len(used), kv_heads, dim, generator=generator).mul(2).to(pool_dtype)
        values[used] = torch.randn(len(used), kv_heads, v_dim, generator=generator).to(pool_dtype)
    rows = sum(len(positions) for positions, _ in requests)
    query = torch.randn(rows, heads, dim, generator=generator).to(dtype)
    sequences = [Sequence(np.array(p, dtype=np.int64), slots[: p[-1] + 1]) for p, slots in requests]
    out = torch.full((rows, heads, v_dim), torch.nan, dtype=dtype)
    attend(plan_attention(sequences, dtype=dtype, device=CPU), query, keys, values, SCALE, out)
    at = 0
    for positions, slots in requests:
        part = slice(at, at + len(positions))
        want = by_hand(query[part], keys, values, positions, slots)
        assert torch.allclose(out[part].double(), want, atol=atol), float((out[part].double() - want).abs().max())
        at += len(positions)
    assert at == rows


def shuffled(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randperm(2 * n, generator=torch.Generator().manual_seed(seed))[:n] + 1


def test_a_prompt_from_its_start() -> None:
    check([(list(range(70)), torch.arange(5, 75))])


def test_a_chunk_after_a_prefix() -> None:
    check([(list(range(40, 90)), torch.arange(5, 95))])


def test_one_scattered_row_sees_everything_before_it_and_nothing_after() -> None:
    check([([37], shuffled(60))])


def test_scattered_rows_over_scattered_slots() -> None:
    check([([0, 1, 2, 7, 8, 30, 59], shuffled(60))])


def test_rows_without_the_prompts_first_token() -> None:
    check([([3, 4, 5, 20], shuffled(30))])


def test_slots_that_rise_with_holes_are_no_run() -> None:
    check([([0, 1, 5, 9], torch.tensor([4, 5, 6, 7, 8, 9, 12, 13, 14, 15]))])


def test_slots_that_fall_or_swap_inside_their_ends_are_no_run() -> None:
    check([([2, 5, 7], torch.arange(9, 1, -1))])
    check([([2, 5, 7], torch.tensor([3, 4, 6, 5, 7, 8, 9, 10]))])


def test_blocks_beyond_the_first() -> None:
    n = 12 * BLOCK_ROWS
    positions = sorted(set(range(0, n, 2)) | set(range(100, 350)))
    check([(positions, shuffled(n))], heads=2, kv_heads=1, dim=8, v_dim=8)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (6, 2), (9, 3), (8, 2)])
def test_grouped_queries(heads: int, kv_heads: int) -> None:
    check([([0, 1, 4, 9, 10, 11], shuffled(12))], heads=heads, kv_heads=kv_heads)


def test_values_narrower_than_keys() -> None:
    check([([1, 3, 8], shuffled(9))], dim=24, v_dim=8)


def test_several_requests_do_not_see_each_other() -> None:
    slots = torch.randperm(200, generator=torch.Generator().manual_seed(2)) + 1
    check(
        [
            (list(range(50)), slots[:50]),
            ([9], slots[50:60]),
            ([20, 21, 40], slots[60:101]),
            ([0, 5, 98], slots[101:200]),
        ]
    )


@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision(dtype: torch.dtype, atol: float) -> None:
    check([([0, 1, 5, 30], shuffled(31)), (list(range(20, 25)), torch.arange(100, 130))], dtype=dtype, atol=atol)


def test_pool_of_another_dtype_than_the_query() -> None:
    check([([0, 4, 9], shuffled(10))], dtype=torch.float32, pool_dtype=torch.bfloat16)


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_any_rows_of_any_requests(data: st.DataObject) -> None:
    requests, taken = [], 1
    lengths = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=4))
    order = data.draw(st.sampled_from(["ascending", "shuffled"]))
    pool = torch.arange(1, sum(lengths) + 1) if order == "ascending" else shuffled(sum(lengths), 3)
    for n in lengths:
        positions = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
        requests.append((positions, pool[taken - 1 : taken - 1 + n]))
        taken += n
    kv_heads = data.draw(st.integers(1, 3))
    check(requests, heads=kv_heads * data.draw(st.integers(1, 3)), kv_heads=kv_heads, dim=8, v_dim=8)


def test_one_plan_serves_every_layer() -> None:
    plan = plan_attention([Sequence(np.array([0, 2, 5], dtype=np.int64), shuffled(6))], dtype=torch.float32, device=CPU)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        query = torch.randn(3, 2, 8, generator=generator)
        keys, values = torch.randn(2, 20, 1, 8, generator=generator)
        out = torch.empty_like(query)
        attend(plan, query, keys, values, SCALE, out)
        assert torch.allclose(out.double(), by_hand(query, keys, values, [0, 2, 5], shuffled(6)), atol=2e-6)


@pytest.mark.parametrize("positions", [[3, 2], [1, 1], [-1, 0]])
def test_rows_out_of_order_are_refused(positions: list[int]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        plan_attention(
            [Sequence(np.array(positions, dtype=np.int64), torch.arange(1, 6))], dtype=torch.float32, device=CPU
        )
