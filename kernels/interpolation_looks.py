"""What tokens are compared by: K without positions and V of a few layers, of unit length, side by side.

For n tokens, K and V rows of `b` bytes (`e` elements), of which `z` are turned: ``n (2 b + 4 e)`` bytes per layer, half
of the reads from L2; ``3 n e + 3 z n`` FLOPs. Elements of a key in the order of interpolation_heads.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpolation_heads import load_factors, load_pairs, store_pairs, turned
from .interpolation_plan import Rows, launch_options
from .realign_triton import _turn


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
        c, s = load_factors(cos, sin, rows, live, HALF, HALF_BLOCK)
        for head in tl.range(HEADS):
            a, b = load_pairs(key + head * DIM, live, NEOX, HALF, HALF_BLOCK, ROWS)
            x, y = _turn(a, b, c, s)
            store_pairs(to + head * DIM, x * scale[:, None], y * scale[:, None], live, HALF, HALF_BLOCK)
            _scaled(key + head * DIM, to + head * DIM, scale, live, 2 * HALF, DIM, REST_BLOCK)
    else:
        value = values + slot * (V_HEADS * V_DIM)
        for head in tl.range(V_HEADS):
            total += _squares(value + head * V_DIM, live, V_DIM, HALF_BLOCK, ROWS)
        scale = length / tl.maximum(tl.sqrt(total), 1e-12)
        for head in tl.range(V_HEADS):
            _scaled(value + head * V_DIM, to + HEADS * DIM + head * V_DIM, scale, live, 0, V_DIM, HALF_BLOCK)


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
        key = turned(keys[rows.slots].double(), rows, neox, rotary_dim)
        sides += [key.flatten(1), values[rows.slots].double().flatten(1)]
    return torch.cat([torch.nn.functional.normalize(side, dim=1) for side in sides], 1) * len(sides) ** -0.5
