"""Carry what changed on recomputed tokens over to the others, by given weights, one layer at a time: two launches.

A prompt's m recomputed tokens are `chosen`, the u others `kept`; a part relates the tokens of one piece of text only:

    change(s) = R(-p_s) (fresh K_s - donor K_s)            and the same of V, which carries no position
    K_u      += R(p_u) sum over s of weight(u, s) change(s)

`change_rows` takes the changes of layer l, and in the same launch keeps the donor's rows of layer l + 1, which the next
forward overwrites. The donor's rows are kept as they are: rotations are linear, so the difference is turned, once.
`carry_rows` multiplies, turns and adds. The product is not left to cuBLAS: its result would be as large as the K and V
that are corrected, written, read again and rounded on the way, and parts of unequal size would have to be padded to the
largest; the product itself is a few per cent of what a layer's projections cost. `look_rows` prepares, once per prompt,
what the weights are made from.

Changed keys lie with the first elements of all pairs before the second ones, and the rest of a head behind them: one
layout for NeoX and GPT-J, contiguous where products read it.

For rows of `b` bytes (K and V, `e` elements), a part's `u` kept and `m` chosen tokens, `w` bytes per weight, and `z`
turned elements per row:

    `change_rows`  ``5 m b`` bytes, ``e m + 3 z m`` FLOPs
    `carry_rows`   ``2 u b + m b + w u m`` bytes from memory; the changes again per `BLOCK_KEPT` kept tokens, and the
                   weights per head, from L2; ``2 u m e + 3 z u`` FLOPs
    `look_rows`    ``n (2 b + 4 e)`` bytes per layer of n tokens, half of the reads from L2; ``3 n e + 3 z n`` FLOPs

Nothing here waits for the device. K and V are bfloat16, float16 or float32; all arithmetic between loads and stores is
fp32, float16 and bfloat16 operands of the products aside, which accumulate in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .realign_triton import _turn

BLOCK_KEPT = 64
"""Kept tokens per program of `carry_kernel`."""
BLOCK_CHOSEN = 32
"""Chosen tokens per step; rows of weights are padded to a multiple of it."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Rows(NamedTuple):
    """Tokens by where their K and V are, contiguous."""

    slots: Tensor
    """int64 ``[t]``, distinct."""
    cos: Tensor
    """fp32 ``[t, rotary_dim // 2]``: the rotation from each token's position to position 0, unit norm."""
    sin: Tensor


class Saved(NamedTuple):
    """A layer's rows of the chosen tokens, as they were."""

    keys: Tensor
    """``[m, kv_heads, head_dim]``."""
    values: Tensor
    """``[m, v_heads, v_dim]``."""


@triton.jit
def _pairs(head, live, NEOX: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """First and second elements of all pairs: fp32 [ROWS, HALF_BLOCK] each. head: pointers [ROWS, 1] to its start."""
    if NEOX:
        pairs = tl.arange(0, HALF_BLOCK)
        mask = live[:, None] & (pairs < HALF)[None, :]
        a = tl.load(head + pairs[None, :], mask, other=0.0)
        b = tl.load(head + HALF + pairs[None, :], mask, other=0.0)
    else:
        cols = tl.arange(0, 2 * HALF_BLOCK)
        wide = live[:, None] & (cols < 2 * HALF)[None, :]
        a, b = tl.split(tl.reshape(tl.load(head + cols[None, :], wide, other=0.0), (ROWS, HALF_BLOCK, 2)))
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _store_pairs(head, a, b, live, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr):
    """Write first elements, then second ones. head: pointers [ROWS, 1]."""
    pairs = tl.arange(0, HALF_BLOCK)
    mask = live[:, None] & (pairs < HALF)[None, :]
    tl.store(head + pairs[None, :], a.to(head.dtype.element_ty), mask)
    tl.store(head + HALF + pairs[None, :], b.to(head.dtype.element_ty), mask)


@triton.jit
def _factors(cos, sin, rows, live, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr):
    pairs = tl.arange(0, HALF_BLOCK)
    mask = live[:, None] & (pairs < HALF)[None, :]
    at = rows.to(tl.int64)[:, None] * HALF + pairs[None, :]
    return tl.load(cos + at, mask, other=1.0), tl.load(sin + at, mask, other=0.0)


@triton.jit
def _difference(now, then, to, live, FIRST: tl.constexpr, STOP: tl.constexpr, BLOCK: tl.constexpr):
    """Columns ``[FIRST, STOP)``. now, then, to: pointers [ROWS, 1]."""
    for start in tl.static_range(FIRST, STOP, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = live[:, None] & (cols < STOP)[None, :]
        new = tl.load(now + cols[None, :], mask, other=0.0).to(tl.float32)
        old = tl.load(then + cols[None, :], mask, other=0.0).to(tl.float32)
        tl.store(to + cols[None, :], (new - old).to(to.dtype.element_ty), mask)


@triton.jit
def _keep(source, to, live, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    mask = live[:, None] & (cols < WIDTH)[None, :]
    tl.store(to + cols[None, :], tl.load(source + cols[None, :], mask), mask)


# Left out of the specialisation: what varies from call to call, and would compile anew.
@triton.jit(do_not_specialize=["first_task", "m"], do_not_specialize_on_alignment=["slots"])
def change_kernel(
    keys,
    values,
    k_before,
    v_before,
    change,
    next_keys,
    next_values,
    k_after,
    v_after,
    slots,
    cos,
    sin,
    first_task,
    m,
    NEOX: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    V_HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (rows, head, task): heads below HEADS are of K, the others of V. Task 0 takes this layer's changes,
    task 1 keeps the next layer's rows; the grid's third axis counts from first_task.

    keys, values, next_keys, next_values: [slots, heads, dim]. k_before, v_before, k_after, v_after: [m, heads, dim].
    change: [m, HEADS * DIM + V_HEADS * V_DIM]. slots: int64 [m]. cos, sin: fp32 [m, HALF].
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1)
    live = rows < m
    # Slot times row length passes 2^31 in a large pool: slots are int64, and so are the offsets.
    slot = tl.load(slots + rows, live, other=0)[:, None]
    row = rows.to(tl.int64)[:, None]
    if first_task + tl.program_id(2) == 0:
        to = change + row * (HEADS * DIM + V_HEADS * V_DIM)
        if head < HEADS:
            now = keys + slot * (HEADS * DIM) + head * DIM
            then = k_before + row * (HEADS * DIM) + head * DIM
            a, b = _pairs(now, live, NEOX, HALF, HALF_BLOCK, ROWS)
            old_a, old_b = _pairs(then, live, NEOX, HALF, HALF_BLOCK, ROWS)
            c, s = _factors(cos, sin, rows, live, HALF, HALF_BLOCK)
            x, y = _turn(a - old_a, b - old_b, c, s)
            _store_pairs(to + head * DIM, x, y, live, HALF, HALF_BLOCK)
            _difference(now, then, to + head * DIM, live, 2 * HALF, DIM, REST_BLOCK)
        else:
            at = (head - HEADS) * V_DIM
            now = values + slot * (V_HEADS * V_DIM) + at
            _difference(now, v_before + row * (V_HEADS * V_DIM) + at, to + HEADS * DIM + at, live, 0, V_DIM, V_BLOCK)
    else:
        if head < HEADS:
            at = head * DIM
            _keep(next_keys + slot * (HEADS * DIM) + at, k_after + row * (HEADS * DIM) + at, live, DIM, K_BLOCK)
        else:
            at = (head - HEADS) * V_DIM
            source = next_values + slot * (V_HEADS * V_DIM) + at
            _keep(source, v_after + row * (V_HEADS * V_DIM) + at, live, V_DIM, V_BLOCK)


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
        c, s = _factors(cos, sin, rows, live, HALF, HALF_BLOCK)
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


@triton.jit
def _squares(head, live, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Sum over a head: fp32 [ROWS]. head: pointers [ROWS, 1]."""
    total = tl.zeros((ROWS,), tl.float32)
    for start in tl.range(0, WIDTH, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        value = tl.load(head + cols[None, :], live[:, None] & (cols < WIDTH)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(value * value, 1)
    return total


@triton.jit
def _scaled(source, to, scale, live, FIRST: tl.constexpr, STOP: tl.constexpr, BLOCK: tl.constexpr):
    for start in tl.static_range(FIRST, STOP, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = live[:, None] & (cols < STOP)[None, :]
        value = tl.load(source + cols[None, :], mask, other=0.0).to(tl.float32)
        tl.store(to + cols[None, :], value * scale[:, None], mask)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["slots"])
def look_kernel(
    keys,
    values,
    out,
    slots,
    cos,
    sin,
    n,
    length,
    out_row,
    NEOX: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    V_HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    K_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (rows, side): K or V. Reads the rows twice, once for their norm, which no rotation changes.

    keys, values: [slots, heads, dim]. out: fp32 [n, >= HEADS * DIM + V_HEADS * V_DIM], rows out_row apart.
    slots: int64 [n]. cos, sin: fp32 [n, HALF].
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < n
    slot = tl.load(slots + rows, live, other=0)[:, None]
    to = out + rows.to(tl.int64)[:, None] * out_row
    total = tl.zeros((ROWS,), tl.float32)
    if tl.program_id(1) == 0:
        key = keys + slot * (HEADS * DIM)
        for head in tl.range(HEADS):
            total += _squares(key + head * DIM, live, DIM, HALF_BLOCK, ROWS)
        scale = length / tl.maximum(tl.sqrt(total), 1e-12)
        c, s = _factors(cos, sin, rows, live, HALF, HALF_BLOCK)
        for head in tl.range(HEADS):
            a, b = _pairs(key + head * DIM, live, NEOX, HALF, HALF_BLOCK, ROWS)
            x, y = _turn(a, b, c, s)
            _store_pairs(to + head * DIM, x * scale[:, None], y * scale[:, None], live, HALF, HALF_BLOCK)
            _scaled(key + head * DIM, to + head * DIM, scale, live, 2 * HALF, DIM, REST_BLOCK)
    else:
        value = values + slot * (V_HEADS * V_DIM)
        for head in tl.range(V_HEADS):
            total += _squares(value + head * V_DIM, live, V_DIM, HALF_BLOCK, ROWS)
        scale = length / tl.maximum(tl.sqrt(total), 1e-12)
        for head in tl.range(V_HEADS):
            _scaled(value + head * V_DIM, to + HEADS * DIM + head * V_DIM, scale, live, 0, V_DIM, HALF_BLOCK)


def launch_options(keys: Tensor, values: Tensor, *, neox: bool, rotary_dim: int) -> dict[str, dict]:
    """Constants of each kernel, by its name, for layers with such buffers.

    Raises:
        ValueError: a dtype, shape or layout that the kernels do not serve.
    """
    for buffer in (keys, values):
        if buffer.dtype not in DTYPES or buffer.dtype != keys.dtype:
            raise ValueError(f"no kernel for KV of {keys.dtype} and {values.dtype}")
        if buffer.dim() != 3 or not buffer.is_contiguous():
            raise ValueError("buffers must be contiguous [slots, heads, dim]")
    heads, dim = keys.shape[1:]
    v_heads, v_dim = values.shape[1:]
    half, rest = rotary_dim // 2, dim - rotary_dim
    if rotary_dim % 2 or not 0 < rotary_dim <= dim:
        raise ValueError(f"rotary_dim {rotary_dim} does not fit head_dim {dim}")
    size = keys.element_size()
    # What multiplies matrices has at least 16 columns.
    half_block, v_block = (max(16, triton.next_power_of_2(width)) for width in (half, v_dim))
    k_block = max(16, triton.next_power_of_2(dim))
    widest = max(k_block, v_block)
    shape = {"NEOX": neox, "HEADS": heads, "DIM": dim, "HALF": half, "HALF_BLOCK": half_block}
    shape |= {"V_HEADS": v_heads, "V_DIM": v_dim, "V_BLOCK": v_block}
    by_rows = shape | {
        "K_BLOCK": k_block,
        "REST_BLOCK": triton.next_power_of_2(max(1, min(rest, 32))),
        # One 16-byte vector per thread, load and pair half: enough in flight, few registers.
        "ROWS": max(1, min(64, 4 * 32 * 16 // (size * half_block))),
    }
    product = shape | {
        "REST": rest,
        "REST_BLOCK": max(16, triton.next_power_of_2(rest)),
        "PRECISION": "ieee" if keys.dtype == torch.float32 else "tf32",
        # For products of 16 columns the compiler (Triton 3.8, sm_100) puts a word on the stack.
        "HALF_BLOCK": max(32, half_block),
        # The sums of a wide head must fit the registers, and so must fp32 operands, which no tensor core multiplies.
        "BLOCK_KEPT": BLOCK_KEPT // (4 if size == 4 else 2 if widest > 128 else 1),
        "BLOCK_CHOSEN": BLOCK_CHOSEN,
    }
    return {"change": by_rows, "look": by_rows, "carry": product}


class Plan(NamedTuple):
    """Of one prompt, for all layers."""

    kept: Rows
    chosen: Rows
    weights: Tensor
    """In the pool's dtype ``[u, >= m of the largest part]``, contiguous; row i holds the weights of kept token i over
    the chosen tokens of its part, and anything finite behind them up to a multiple of `BLOCK_CHOSEN`."""
    items: Tensor
    """int32 ``[items, 4]``, of `plan_items`, on the device."""
    options: dict[str, dict]
    """Of `launch_options`."""


def plan_items(sizes: list[tuple[int, int]], block: int) -> np.ndarray:
    """int32 ``[items, 4]``: first and end kept token, first and end chosen token, in blocks of kept tokens of one part.

    sizes: kept and chosen tokens of each part, in the order of the rows. block: ``BLOCK_KEPT`` of the options.
    """
    items, kept, chosen = [np.zeros((0, 4), np.int64)], 0, 0
    for u, m in sizes:
        first = kept + np.arange(0, u, block)
        stop = np.minimum(first + block, kept + u)
        both = np.broadcast_to([chosen, chosen + m], (len(first), 2))
        items.append(np.concatenate((np.stack((first, stop), 1), both), 1))
        kept, chosen = kept + u, chosen + m
    return np.concatenate(items).astype(np.int32)


def padded_width(most_chosen: int) -> int:
    """Columns of `Plan.weights`."""
    return triton.cdiv(most_chosen, BLOCK_CHOSEN) * BLOCK_CHOSEN


def save_rows(plan: Plan, keys: Tensor, values: Tensor) -> Saved:
    """The chosen tokens' rows of a layer, before it is computed."""
    saved = _new_rows(plan, keys, values)
    _launch_change(plan, 1, 1, (keys, values), saved, keys, (keys, values), saved)
    return saved


def change_rows(
    plan: Plan,
    keys: Tensor,
    values: Tensor,
    before: Saved,
    following: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Saved | None]:
    """What changed on the chosen tokens since `before` was saved, and their rows in the `following` layer, if any.

    Returns:
        The changes, in the pool's dtype ``[m, e]``, see the module's docstring for the order of a key's elements; and
        rows of the following layer, which is not computed yet.
    """
    m = len(plan.chosen.slots)
    change = keys.new_empty((m, keys[0].numel() + values[0].numel()))
    if following is None:
        _launch_change(plan, 0, 1, (keys, values), before, change, (keys, values), before)
        return change, None
    after = _new_rows(plan, *following)
    _launch_change(plan, 0, 2, (keys, values), before, change, following, after)
    return change, after


def _new_rows(plan: Plan, keys: Tensor, values: Tensor) -> Saved:
    return Saved(*(b.new_empty((len(plan.chosen.slots), *b.shape[1:])) for b in (keys, values)))


def _launch_change(
    plan: Plan,
    first_task: int,
    tasks: int,
    layer: tuple[Tensor, Tensor],
    before: Saved,
    change: Tensor,
    following: tuple[Tensor, Tensor],
    after: Saved,
) -> None:
    m, options = len(plan.chosen.slots), plan.options["change"]
    if m:
        change_kernel[(triton.cdiv(m, options["ROWS"]), options["HEADS"] + options["V_HEADS"], tasks)](
            *layer, *before, change, *following, *after, *plan.chosen, first_task, m, num_warps=4, **options
        )


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


def look_rows(layers: list[tuple[Tensor, Tensor]], rows: Rows, *, neox: bool, rotary_dim: int) -> Tensor:
    """What tokens are compared by: products of two rows are the mean cosine of K (without positions) and V.

    layers: K and V buffers of those that are looked at. Returns fp32 ``[t, len(layers) e]``: rounded to half precision,
    products of hundreds of rows could make a singular matrix of them.
    """
    keys, values = layers[0]
    options = launch_options(keys, values, neox=neox, rotary_dim=rotary_dim)["look"]
    n, e = len(rows.slots), keys[0].numel() + values[0].numel()
    out = torch.empty((n, len(layers) * e), dtype=torch.float32, device=keys.device)
    if n:
        for i, layer in enumerate(layers):
            look_kernel[(triton.cdiv(n, options["ROWS"]), 2)](
                *layer,
                out[:, i * e :],
                *rows,
                n,
                (2 * len(layers)) ** -0.5,
                out.stride(0),
                num_warps=4,
                **options,
            )
    return out


def reference_look(layers: list[tuple[Tensor, Tensor]], rows: Rows, *, neox: bool, rotary_dim: int) -> Tensor:
    """`look_rows` in plain PyTorch, in fp64."""
    sides = []
    for keys, values in layers:
        key = _turned(keys[rows.slots].double(), rows, neox, rotary_dim)
        sides += [key.flatten(1), values[rows.slots].double().flatten(1)]
    return torch.cat([torch.nn.functional.normalize(side, dim=1) for side in sides], 1) * len(sides) ** -0.5


def reference_change(
    keys: Tensor, values: Tensor, before: Saved, chosen: Rows, *, neox: bool, rotary_dim: int
) -> Tensor:
    """The changes of `change_rows` in plain PyTorch, in fp64."""
    change = _turned(keys[chosen.slots].double() - before.keys.double(), chosen, neox, rotary_dim)
    return torch.cat((change.flatten(1), (values[chosen.slots].double() - before.values.double()).flatten(1)), 1)


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
    pairs = torch.complex(by_k[..., :half], by_k[..., half:rotary_dim]) * _turns(kept).conj()
    pair = torch.cat((pairs.real, pairs.imag), -1) if neox else torch.view_as_real(pairs).flatten(-2)
    by_k = torch.cat((pair, by_k[..., rotary_dim:]), -1)
    return keys[kept.slots].double() + by_k, values[kept.slots].double() + by_v


def _turns(rows: Rows) -> Tensor:
    """complex128 [t, 1, half]."""
    return torch.complex(rows.cos.double(), rows.sin.double())[:, None]


def _turned(keys: Tensor, rows: Rows, neox: bool, rotary_dim: int) -> Tensor:
    """fp64 keys [t, heads, dim] at position 0, elements in the order of the changes."""
    half = rotary_dim // 2
    a, b = (
        (keys[..., :half], keys[..., half:rotary_dim])
        if neox
        else (keys[..., :rotary_dim:2], keys[..., 1:rotary_dim:2])
    )
    pairs = torch.complex(a, b) * _turns(rows)
    return torch.cat((pairs.real, pairs.imag, keys[..., rotary_dim:]), -1)
