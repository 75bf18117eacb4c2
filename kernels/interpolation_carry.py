"""Carry what changed on recomputed tokens over to the others, by given weights, one layer at a time: one launch.

`carry_rows` multiplies, turns and adds. The product is not left to cuBLAS: its result would be as large as the K and V
that are corrected, written, read again and rounded on the way, and parts of unequal size would have to be padded to the
largest; the product itself is a few per cent of what a layer's projections cost.

For K and V rows of `b` bytes (`e` elements, `z` of them turned), a part's `u` kept and `m` chosen tokens, and `w` bytes
per weight: ``2 u b + m b + w u m`` bytes from memory; the changes again per `BLOCK_KEPT` kept tokens, and the weights
per head, from L2; ``2 u m e + 3 z u`` FLOPs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpolation_heads import load_factors, turns
from .interpolation_plan import Plan, Rows
from .realign_triton import _turn


@triton.jit
def _mixed(
    weights,
    changes,
    live,
    count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROW: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
    BLOCK_CHOSEN: tl.constexpr,
):
    """WIDTH columns of weights times changes: fp32 [BLOCK_KEPT, BLOCK].

    weights: pointers [BLOCK_KEPT, 1] to a row of each kept token. changes: pointer to the columns in the first of
    `count` rows of ROW elements.
    """
    cols = tl.arange(0, BLOCK)
    mixed = tl.zeros((BLOCK_KEPT, BLOCK), tl.float32)
    for start in tl.range(0, count, BLOCK_CHOSEN):
        some = start + tl.arange(0, BLOCK_CHOSEN)
        # Rows of weights are padded: a mask by `count` would forbid wide loads.
        weight = tl.load(weights + some[None, :], live[:, None], other=0.0)
        mask = (some < count)[:, None] & (cols < WIDTH)[None, :]
        change = tl.load(changes + some.to(tl.int64)[:, None] * ROW + cols[None, :], mask, other=0.0)
        mixed = tl.dot(weight, change, mixed, input_precision=PRECISION)
    return mixed


@triton.jit
def _add(to, addend, live, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """to: pointers [BLOCK_KEPT, 1]."""
    cols = tl.arange(0, BLOCK)
    mask = live[:, None] & (cols < WIDTH)[None, :]
    now = tl.load(to + cols[None, :], mask, other=0.0)
    tl.store(to + cols[None, :], (now.to(tl.float32) + addend).to(now.dtype), mask)


@triton.jit(do_not_specialize_on_alignment=["items", "slots"])
def carry_kernel(
    keys,
    values,
    change,
    weights,
    items,
    slots,
    cos,
    sin,
    weights_row,
    NEOX: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    V_HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_KEPT: tl.constexpr,
    BLOCK_CHOSEN: tl.constexpr,
):
    """Program (item, group of columns): the pairs of each K head, the rest of each K head if there is one, each V head.

    keys, values: [slots, heads, dim]. change: [m, HEADS * DIM + V_HEADS * V_DIM]. weights: [u, weights_row].
    items: int32 [items, 4], first and end kept token, first and end chosen token. slots: int64 [u].
    cos, sin: fp32 [u, HALF].
    """
    item = items + tl.program_id(0) * 4
    group = tl.program_id(1)
    rows = tl.load(item) + tl.arange(0, BLOCK_KEPT)
    live = rows < tl.load(item + 1)
    first = tl.load(item + 2)
    count = tl.load(item + 3) - first
    slot = tl.load(slots + rows, live, other=0)[:, None]
    row: tl.constexpr = HEADS * DIM + V_HEADS * V_DIM
    weight = weights + rows.to(tl.int64)[:, None] * weights_row
    source = change + first.to(tl.int64) * row
    others: tl.constexpr = 2 * HEADS if REST else HEADS
    if group < HEADS:
        to = keys + slot * (HEADS * DIM) + group * DIM
        left = source + group * DIM
        a = _mixed(weight, left, live, count, HALF, HALF_BLOCK, row, PRECISION, BLOCK_KEPT, BLOCK_CHOSEN)
        b = _mixed(weight, left + HALF, live, count, HALF, HALF_BLOCK, row, PRECISION, BLOCK_KEPT, BLOCK_CHOSEN)
        c, s = load_factors(cos, sin, rows, live, HALF, HALF_BLOCK)
        x, y = _turn(a, b, c, -s)
        if NEOX:
            _add(to, x, live, HALF, HALF_BLOCK)
            _add(to + HALF, y, live, HALF, HALF_BLOCK)
        else:
            both = tl.reshape(tl.join(x, y), (BLOCK_KEPT, 2 * HALF_BLOCK))
            _add(to, both, live, 2 * HALF, 2 * HALF_BLOCK)
    elif group < others:
        if REST:
            at = (group - HEADS) * DIM + 2 * HALF
            rest = _mixed(weight, source + at, live, count, REST, REST_BLOCK, row, PRECISION, BLOCK_KEPT, BLOCK_CHOSEN)
            _add(keys + slot * (HEADS * DIM) + at, rest, live, REST, REST_BLOCK)
    else:
        at = (group - others) * V_DIM
        mixed = _mixed(
            weight, source + HEADS * DIM + at, live, count, V_DIM, V_BLOCK, row, PRECISION, BLOCK_KEPT, BLOCK_CHOSEN
        )
        _add(values + slot * (V_HEADS * V_DIM) + at, mixed, live, V_DIM, V_BLOCK)


def carry_rows(plan: Plan, keys: Tensor, values: Tensor, change: Tensor) -> None:
    """Add the weighted `change` of `change_rows` to K and V of the kept tokens, in place, rounded once."""
    options = plan.options["carry"]
    if len(plan.items):
        groups = options["HEADS"] * (2 if options["REST"] else 1) + options["V_HEADS"]
        carry_kernel[(len(plan.items), groups)](
            keys,
            values,
            change,
            plan.weights,
            plan.items,
            *plan.kept,
            plan.weights.stride(0),
            num_warps=4,
            num_stages=2,
            **options,
        )


def reference_carry(
    keys: Tensor,
    values: Tensor,
    change: Tensor,
    parts: list[tuple[Tensor, Tensor, Tensor]],
    kept: Rows,
    *,
    neox: bool,
    rotary_dim: int,
) -> tuple[Tensor, Tensor]:
    """K and V of the kept tokens after `carry_rows`, in plain PyTorch, in fp64: ``[u, heads, dim]`` each.

    parts: (kept tokens, chosen tokens, weights ``[kept, chosen]``), indices into the rows of `kept` and of `change`.
    """
    mixed = change.new_zeros((len(kept.slots), change.shape[1]), dtype=torch.float64)
    for some, others, weights in parts:
        mixed[some] = weights.double() @ change[others].double()
    by_k, by_v = mixed.tensor_split([keys[0].numel()], 1)
    by_k, by_v = by_k.unflatten(1, keys.shape[1:]), by_v.unflatten(1, values.shape[1:])
    half = rotary_dim // 2
    pairs = torch.complex(by_k[..., :half], by_k[..., half:rotary_dim]) * turns(kept).conj()
    pair = torch.cat((pairs.real, pairs.imag), -1) if neox else torch.view_as_real(pairs).flatten(-2)
    by_k = torch.cat((pair, by_k[..., rotary_dim:]), -1)
    return keys[kept.slots].double() + by_k, values[kept.slots].double() + by_v
