"""What changed on a prompt's recomputed tokens, one layer at a time: one launch.

`change_rows` takes the changes of layer l, and in the same launch keeps the donor's rows of layer l + 1, which the next
forward overwrites. The donor's rows are kept as they are: rotations are linear, so the difference is turned, once.

For m chosen tokens, K and V rows of `b` bytes (`e` elements), of which `z` are turned: ``5 m b`` bytes,
``e m + 3 z m`` FLOPs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpolation_heads import load_factors, load_pairs, store_pairs, turned
from .interpolation_plan import Plan, Rows
from .realign_triton import _turn


class Saved(NamedTuple):
    """A layer's rows of the chosen tokens, as they were."""

    keys: Tensor
    """``[m, kv_heads, head_dim]``."""
    values: Tensor
    """``[m, v_heads, v_dim]``."""


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
            a, b = load_pairs(now, live, NEOX, HALF, HALF_BLOCK, ROWS)
            old_a, old_b = load_pairs(then, live, NEOX, HALF, HALF_BLOCK, ROWS)
            c, s = load_factors(cos, sin, rows, live, HALF, HALF_BLOCK)
            x, y = _turn(a - old_a, b - old_b, c, s)
            store_pairs(to + head * DIM, x, y, live, HALF, HALF_BLOCK)
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
        The changes, in the pool's dtype ``[m, e]``, see interpolation_heads.py for the order of a key's elements; and
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


def reference_change(
    keys: Tensor, values: Tensor, before: Saved, chosen: Rows, *, neox: bool, rotary_dim: int
) -> Tensor:
    """The changes of `change_rows` in plain PyTorch, in fp64."""
    change = turned(keys[chosen.slots].double() - before.keys.double(), chosen, neox, rotary_dim)
    return torch.cat((change.flatten(1), (values[chosen.slots].double() - before.values.double()).flatten(1)), 1)
