"""Correct the tokens that were not recomputed by what was seen to change on their recomputed neighbours.

policy-study.md, "Delta correction": a token j that was not recomputed gets

    V_j += value_factor * sum_i w_ij dV_i
    K_j += key_factor * R(p_j) sum_i w_ij dK_i        dK_i = R(-p_i) (fresh K_i - donor K_i)

over the 8 recomputed tokens i of its segment nearest to it, ``w_j = softmax_i(20 cos(V_i, V_j) - |i - j| / 32)`` with
the donor's values of one layer. Keys change in the frame without rotation, where they do not depend on the position:
the changes of a neighbour are turned back once by its own position, and their sum once by the token's.

All layers are corrected in one launch. Steps of a stage, none of which waits for the device:

1. before the repair: `save_rows` keeps the donor's rows of the tokens to be recomputed; `nearest_recomputed` and
   `neighbour_weights` choose the neighbours;
2. after it: `observe` takes the differences, `correct` applies them.

For `n` tokens, `m` of them recomputed, `L` layers, K and V rows of `b_k` and `b_v` bytes (`e` elements together):

    bytes moved  `observe` ``3 m L (b_k + b_v)``; `correct` ``(n - m) L (2 + 8) (b_k + b_v)``, the changes from L2
    FLOPs        `correct` ``16 (n - m) L e``

Everything is in units of stored elements: an fp8 pool has one scale per layer, and all of this is linear.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fp8 import decode_e4m3, encode_e4m3, native_fp8
from .kv_table import KVTable, element_type, layer_buffer, new_rows
from .realign_triton import copy_rows

NEIGHBOURS = 8
SHARPNESS = 20.0
"""Of the softmax, per unit of cosine."""
REACH = 32.0
"""Tokens of distance that weigh as much as one unit of the exponent."""


class Deltas(NamedTuple):
    """Changes of recomputed rows, contiguous; bfloat16 for an fp8 pool, else in the pool's dtype."""

    keys: Tensor
    """``[layers, m, kv_heads, head_dim]``, turned back to position 0."""
    values: Tensor
    """``[layers, m, v_heads, v_dim]``."""


def save_rows(table: KVTable, slots: Tensor) -> KVTable:
    """A copy of rows `slots`, int64 ``[m]``, of every layer: ``[m, heads, dim]`` each."""
    saved = new_rows(table, len(table.keys), len(slots))
    copy_rows(table, saved, slots, torch.arange(len(slots), device=slots.device))
    return saved


def nearest_recomputed(rows: Tensor, segment: Tensor) -> Tensor:
    """The `NEIGHBOURS` recomputed tokens nearest to each token within its segment, ties to the earlier one.

    Args:
        rows: int64 ``[m]``, ascending, the recomputed tokens; entries of n (padding of a fixed budget) come last.
        segment: int32 or int64 ``[n]``, segment of each token; a segment's tokens are consecutive.

    Returns:
        int32 ``[n, NEIGHBOURS]``: indices into `rows`, -1 where there are fewer. A recomputed token has none.
    """
    n, m = segment.shape[0], rows.shape[0]
    if m == 0 or n == 0:
        return torch.full((n, NEIGHBOURS), -1, dtype=torch.int32, device=rows.device)
    token = torch.arange(n, device=rows.device)
    # The nearest ones are among the same number on each side.
    around = torch.arange(-NEIGHBOURS, NEIGHBOURS, device=rows.device)
    candidate = torch.searchsorted(rows, token)[:, None] + around
    index = candidate.clamp(0, m - 1)
    row = rows[index]
    valid = (candidate == index) & (row < n)
    valid &= segment[row.clamp(max=n - 1)] == segment[:, None]
    distance = (row - token[:, None]).abs().where(valid, n)
    # Recomputed tokens themselves: their distance to themselves is zero.
    distance = distance.where(distance.amin(1, keepdim=True) > 0, n)
    distance, order = distance.sort(dim=1, stable=True)
    nearest = index.gather(1, order)[:, :NEIGHBOURS]
    return nearest.where(distance[:, :NEIGHBOURS] < n, -1).int()


@triton.jit(do_not_specialize_on_alignment=["slots", "rows"])
def neighbour_weights_kernel(
    values,
    slots,
    rows,
    neighbours,
    weights,
    SHARPNESS: tl.constexpr,
    REACH: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    """Program (token). values: [slots, ROW]. neighbours: int32 [n, NEIGHBOURS]. weights: fp32, of the same shape."""
    token = tl.program_id(0)
    i = tl.arange(0, NEIGHBOURS)
    neighbour = tl.load(neighbours + token * NEIGHBOURS + i)
    valid = neighbour >= 0
    row = tl.load(rows + neighbour, valid, other=0)
    own = tl.load(slots + token).to(tl.int64) * ROW
    other = tl.load(slots + row, valid, other=0).to(tl.int64) * ROW
    dot = tl.zeros((NEIGHBOURS,), tl.float32)
    square = tl.zeros((NEIGHBOURS,), tl.float32)
    own_square = tl.zeros((NEIGHBOURS,), tl.float32)
    for start in tl.range(0, ROW, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        mask = cols < ROW
        a = tl.load(values + own + cols, mask, other=0)
        b = tl.load(values + other[:, None] + cols[None, :], valid[:, None] & mask[None, :], other=0)
        a = decode_e4m3(a, NATIVE) if FP8 else a.to(tl.float32)
        b = decode_e4m3(b, NATIVE) if FP8 else b.to(tl.float32)
        dot += tl.sum(a[None, :] * b, 1)
        square += tl.sum(b * b, 1)
        own_square += tl.sum(a * a)
    cosine = dot / tl.maximum(tl.sqrt(square) * tl.sqrt(own_square), 1e-8)
    score = SHARPNESS * cosine - tl.abs(row - token).to(tl.float32) / REACH
    score = tl.where(valid, score, float("-inf"))
    peak = tl.max(score, 0)
    mass = tl.where(valid, tl.exp(score - tl.where(peak == float("-inf"), 0.0, peak)), 0.0)
    total = tl.sum(mass, 0)
    tl.store(weights + token * NEIGHBOURS + i, mass / tl.where(total == 0.0, 1.0, total))


def neighbour_weights(values: Tensor, slots: Tensor, rows: Tensor, neighbours: Tensor) -> Tensor:
    """Softmax weights of the neighbours, float32 ``[n, NEIGHBOURS]``, zero where there is none.

    values: one layer's V buffer, ``[slots, heads, dim]``, contiguous, still holding the donor's rows (the study takes
    layer 8). slots: int32 or int64 ``[n]``, slot of each token. rows, neighbours: as of `nearest_recomputed`.
    """
    weights = torch.empty(neighbours.shape, dtype=torch.float32, device=values.device)
    if len(slots) == 0:
        return weights
    fp8 = values.dtype == torch.float8_e4m3fn
    row = values.stride(0)
    neighbour_weights_kernel[(len(slots),)](
        values.view(torch.uint8) if fp8 else values,
        slots,
        rows,
        neighbours,
        weights,
        SHARPNESS=SHARPNESS,
        REACH=REACH,
        FP8=fp8,
        NATIVE=native_fp8(values.device),
        ROW=row,
        BLOCK=min(512, triton.next_power_of_2(row)),
        NEIGHBOURS=NEIGHBOURS,
        num_warps=4,
    )
    return weights


@triton.jit
def _value(pointers, mask, FP8: tl.constexpr, NATIVE: tl.constexpr):
    raw = tl.load(pointers, mask, other=0)
    return decode_e4m3(raw, NATIVE) if FP8 else raw.to(tl.float32)


@triton.jit
def _change(now, then, mask, FP8: tl.constexpr, NATIVE: tl.constexpr):
    return _value(now, mask, FP8, NATIVE) - _value(then, mask, FP8, NATIVE)


@triton.jit
def _pair_columns(pairs, NEOX: tl.constexpr, HALF: tl.constexpr):
    """Columns of the first and of the second element of each pair."""
    if NEOX:
        return pairs, pairs + HALF
    else:
        return 2 * pairs, 2 * pairs + 1


@triton.jit(do_not_specialize=["m"], do_not_specialize_on_alignment=["k_table", "v_table", "slots"])
def observe_kernel(
    k_table,
    v_table,
    k_saved,
    v_saved,
    k_change,
    v_change,
    slots,
    cos,
    sin,
    m,
    ELEMENT: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    ALIGNED: tl.constexpr,
    NEOX: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    V_HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (rows, layer, head): heads below HEADS are of K, the others of V."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    layer = tl.program_id(1)
    head = tl.program_id(2)
    live = row < m
    slot = tl.load(slots + row, live, other=0)
    packed = layer.to(tl.int64) * m + row
    if head < HEADS:
        now = layer_buffer(k_table, layer, ELEMENT, ALIGNED) + slot[:, None] * (HEADS * DIM) + head * DIM
        then = layer_buffer(k_saved, layer, ELEMENT, ALIGNED) + row.to(tl.int64)[:, None] * (HEADS * DIM) + head * DIM
        to = k_change + packed[:, None] * (HEADS * DIM) + head * DIM
        pairs = tl.arange(0, HALF_BLOCK)
        mask = live[:, None] & (pairs < HALF)[None, :]
        first, second = _pair_columns(pairs, NEOX, HALF)
        c = tl.load(cos + row[:, None] * HALF + pairs[None, :], mask, other=1.0)
        s = tl.load(sin + row[:, None] * HALF + pairs[None, :], mask, other=0.0)
        a = _change(now + first[None, :], then + first[None, :], mask, FP8, NATIVE)
        b = _change(now + second[None, :], then + second[None, :], mask, FP8, NATIVE)
        tl.store(to + first[None, :], (a * c + b * s).to(k_change.dtype.element_ty), mask)
        tl.store(to + second[None, :], (b * c - a * s).to(k_change.dtype.element_ty), mask)
        for start in tl.static_range(2 * HALF, DIM, REST_BLOCK):
            cols = start + tl.arange(0, REST_BLOCK)
            wide = live[:, None] & (cols < DIM)[None, :]
            change = _change(now + cols[None, :], then + cols[None, :], wide, FP8, NATIVE)
            tl.store(to + cols[None, :], change.to(k_change.dtype.element_ty), wide)
    else:
        v_head = (head - HEADS) * V_DIM
        v_cols = tl.arange(0, V_BLOCK)
        v_mask = live[:, None] & (v_cols < V_DIM)[None, :]
        v_at = v_head + v_cols[None, :]
        v_now = layer_buffer(v_table, layer, ELEMENT, ALIGNED) + slot[:, None] * (V_HEADS * V_DIM) + v_at
        v_then = layer_buffer(v_saved, layer, ELEMENT, ALIGNED) + row.to(tl.int64)[:, None] * (V_HEADS * V_DIM) + v_at
        v_to = v_change + packed[:, None] * (V_HEADS * V_DIM) + v_at
        tl.store(v_to, _change(v_now, v_then, v_mask, FP8, NATIVE).to(v_change.dtype.element_ty), v_mask)


@triton.jit
def _mixed(change, neighbours, weights, at, mask, ROW: tl.constexpr, NEIGHBOURS: tl.constexpr):
    """Weighted sum of the neighbours' changes in columns `at` [1, columns]: fp32 [rows, columns]."""
    total = tl.zeros(mask.shape, tl.float32)
    for i in tl.static_range(NEIGHBOURS):
        neighbour = tl.load(neighbours + i)
        weight = tl.load(weights + i)
        valid = neighbour >= 0
        part = tl.load(change + neighbour.to(tl.int64)[:, None] * ROW + at, mask & valid[:, None], other=0.0)
        total += tl.where(valid, weight, 0.0)[:, None] * part.to(tl.float32)
    return total


@triton.jit
def _add(pointers, addend, mask, FP8: tl.constexpr, NATIVE: tl.constexpr):
    raw = tl.load(pointers, mask, other=0)
    if FP8:
        tl.store(pointers, encode_e4m3(decode_e4m3(raw, NATIVE) + addend, NATIVE), mask)
    else:
        tl.store(pointers, (raw.to(tl.float32) + addend).to(raw.dtype), mask)


@triton.jit(do_not_specialize=["n", "m"], do_not_specialize_on_alignment=["k_table", "v_table", "slots"])
def correct_kernel(
    k_table,
    v_table,
    k_change,
    v_change,
    slots,
    neighbours,
    weights,
    cos,
    sin,
    n,
    m,
    key_factor,
    value_factor,
    ELEMENT: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    ALIGNED: tl.constexpr,
    NEOX: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    V_HEADS: tl.constexpr,
    V_DIM: tl.constexpr,
    V_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    NEIGHBOURS: tl.constexpr,
):
    """Program (rows, layer, head): heads below HEADS are of K, the others of V."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    layer = tl.program_id(1)
    head = tl.program_id(2)
    # A token without neighbours (a recomputed one, for instance) keeps its bits.
    live = (row < n) & (tl.load(neighbours + row * NEIGHBOURS, row < n, other=-1) >= 0)
    slot = tl.load(slots + row, live, other=0)
    base = row * NEIGHBOURS
    # Rows past the end read the first token's neighbours, and are masked in all that follows.
    near = neighbours + tl.where(live, base, 0)
    mix = weights + tl.where(live, base, 0)
    first_row = layer.to(tl.int64) * m
    if head < HEADS:
        to = layer_buffer(k_table, layer, ELEMENT, ALIGNED) + slot[:, None] * (HEADS * DIM) + head * DIM
        change = k_change + first_row * (HEADS * DIM) + head * DIM
        pairs = tl.arange(0, HALF_BLOCK)
        mask = live[:, None] & (pairs < HALF)[None, :]
        first, second = _pair_columns(pairs, NEOX, HALF)
        c = tl.load(cos + row[:, None] * HALF + pairs[None, :], mask, other=1.0)
        s = tl.load(sin + row[:, None] * HALF + pairs[None, :], mask, other=0.0)
        a = _mixed(change, near, mix, first[None, :], mask, HEADS * DIM, NEIGHBOURS) * key_factor
        b = _mixed(change, near, mix, second[None, :], mask, HEADS * DIM, NEIGHBOURS) * key_factor
        _add(to + first[None, :], a * c - b * s, mask, FP8, NATIVE)
        _add(to + second[None, :], b * c + a * s, mask, FP8, NATIVE)
        for start in tl.static_range(2 * HALF, DIM, REST_BLOCK):
            cols = start + tl.arange(0, REST_BLOCK)
            wide = live[:, None] & (cols < DIM)[None, :]
            rest = _mixed(change, near, mix, cols[None, :], wide, HEADS * DIM, NEIGHBOURS) * key_factor
            _add(to + cols[None, :], rest, wide, FP8, NATIVE)
    else:
        v_cols = (head - HEADS) * V_DIM + tl.arange(0, V_BLOCK)[None, :]
        v_mask = live[:, None] & (tl.arange(0, V_BLOCK) < V_DIM)[None, :]
        v_to = layer_buffer(v_table, layer, ELEMENT, ALIGNED) + slot[:, None] * (V_HEADS * V_DIM) + v_cols
        v_from = v_change + first_row * (V_HEADS * V_DIM)
        mixed = _mixed(v_from, near, mix, v_cols, v_mask, V_HEADS * V_DIM, NEIGHBOURS)
        _add(v_to, mixed * value_factor, v_mask, FP8, NATIVE)


def launch_options(key: Tensor, value: Tensor, *, neox: bool, rotary_dim: int, native: bool, aligned: bool) -> dict:
    """Constants of `observe_kernel` and `correct_kernel` for a pool with such buffers."""
    heads, dim = key.shape[1:]
    half = rotary_dim // 2
    fp8 = key.dtype == torch.float8_e4m3fn
    half_block = triton.next_power_of_2(half)
    v_block = triton.next_power_of_2(value.shape[2])
    return {
        "ELEMENT": element_type(key),
        "FP8": fp8,
        "NATIVE": native,
        "ALIGNED": aligned,
        "NEOX": neox,
        "HEADS": heads,
        "DIM": dim,
        "HALF": half,
        "HALF_BLOCK": half_block,
        "REST_BLOCK": triton.next_power_of_2(max(1, min(dim - rotary_dim, half, 32))),
        "V_HEADS": value.shape[1],
        "V_DIM": value.shape[2],
        "V_BLOCK": v_block,
        # A 16-byte vector per thread and pair half of two-byte elements, and a tile of V that fits the registers.
        "ROWS": max(1, min(64, 1024 // half_block, 4096 // v_block)),
    }


def observe(
    table: KVTable, saved: KVTable, slots: Tensor, cos: Tensor, sin: Tensor, *, neox: bool, rotary_dim: int
) -> Deltas:
    """What the repair changed in rows `slots`.

    Args:
        saved: `save_rows` of the same rows before the repair, already rotated to their positions here.
        slots: int64 ``[m]``; padding may name any slot, its changes are never used.
        cos, sin: fp32 ``[m, rotary_dim // 2]``, contiguous: rotation from position 0 to each row's, unit norm.
        neox, rotary_dim: as of `realign_triton.realign_on_device`.
    """
    key, value = table.keys[0], table.values[0]
    layers, m = len(table.keys), len(slots)
    dtype = torch.bfloat16 if key.dtype == torch.float8_e4m3fn else key.dtype
    deltas = Deltas(*(b.new_empty((layers, m, *b.shape[1:]), dtype=dtype) for b in (key, value)))
    if m == 0:
        return deltas
    options = launch_options(
        key,
        value,
        neox=neox,
        rotary_dim=rotary_dim,
        native=native_fp8(key.device),
        aligned=table.aligned and saved.aligned,
    )
    observe_kernel[(triton.cdiv(m, options["ROWS"]), layers, options["HEADS"] + options["V_HEADS"])](
        table.key_pointers,
        table.value_pointers,
        saved.key_pointers,
        saved.value_pointers,
        deltas.keys,
        deltas.values,
        slots,
        cos,
        sin,
        m,
        num_warps=4,
        **options,
    )
    return deltas


def correct(
    table: KVTable,
    slots: Tensor,
    deltas: Deltas,
    neighbours: Tensor,
    weights: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    neox: bool,
    rotary_dim: int,
    key_factor: float = 0.4,
    value_factor: float = 0.25,
) -> None:
    """Add the neighbours' changes to the K and V of every token that has neighbours, in place, in all layers.

    Args:
        table: the layers to correct; the study leaves out the first two.
        slots: int64 ``[n]``, distinct: slot of each token.
        neighbours, weights: ``[n, NEIGHBOURS]``, of `nearest_recomputed` and `neighbour_weights`.
        cos, sin: fp32 ``[n, rotary_dim // 2]``, contiguous: rotation from position 0 to each token's, unit norm.
    """
    key, value = table.keys[0], table.values[0]
    n, m = len(slots), deltas.keys.shape[1]
    if n == 0 or m == 0:
        return
    options = launch_options(
        key, value, neox=neox, rotary_dim=rotary_dim, native=native_fp8(key.device), aligned=table.aligned
    )
    correct_kernel[(triton.cdiv(n, options["ROWS"]), len(table.keys), options["HEADS"] + options["V_HEADS"])](
        table.key_pointers,
        table.value_pointers,
        deltas.keys,
        deltas.values,
        slots,
        neighbours,
        weights,
        cos,
        sin,
        n,
        m,
        key_factor,
        value_factor,
        NEIGHBOURS=NEIGHBOURS,
        num_warps=4,
        **options,
    )


def reference(
    donor: tuple[Tensor, Tensor],
    repaired: tuple[Tensor, Tensor],
    values: Tensor,
    rows: list[int],
    segment: list[int],
    cos: Tensor,
    sin: Tensor,
    *,
    neox: bool,
    rotary_dim: int,
    key_factor: float = 0.4,
    value_factor: float = 0.25,
) -> tuple[Tensor, Tensor]:
    """One layer in plain PyTorch, in fp64, token by token: corrected K and V of all tokens.

    donor: K and V of all tokens before the repair, ``[n, heads, dim]`` each, keys at the tokens' positions. repaired:
    the same after it. values: ``[n, heads, dim]``, the donor's values of the layer that weighs the neighbours. rows:
    recomputed tokens. segment: of each token. cos, sin: ``[n, rotary_dim // 2]``, from position 0.
    """
    (k_old, v_old), (k_new, v_new) = ([x.double() for x in pair] for pair in (donor, repaired))
    turn = torch.complex(cos.double(), sin.double())
    flat = torch.nn.functional.normalize(values.double().flatten(1), dim=1)
    k_out, v_out = k_new.clone(), v_new.clone()
    for j in range(len(segment)):
        candidates = sorted((i for i in rows if segment[i] == segment[j]), key=lambda i: (abs(i - j), i))[:NEIGHBOURS]
        if j in rows or not candidates:
            continue
        score = torch.stack([SHARPNESS * flat[i] @ flat[j] - abs(i - j) / REACH for i in candidates])
        weight = torch.softmax(score, 0)
        for w, i in zip(weight, candidates, strict=True):
            change = _rotate(k_new[i] - k_old[i], turn[j] * turn[i].conj(), neox, rotary_dim)
            k_out[j] += key_factor * w * change
            v_out[j] += value_factor * w * (v_new[i] - v_old[i])
    return k_out, v_out


def _rotate(key: Tensor, turn: Tensor, neox: bool, rotary_dim: int) -> Tensor:
    """Key ``[heads, dim]`` with its pairs multiplied by complex `turn` ``[rotary_dim // 2]``."""
    half = rotary_dim // 2
    shape = (2, half) if neox else (half, 2)
    pairs = key[:, :rotary_dim].unflatten(-1, shape)
    a, b = pairs.unbind(-2 if neox else -1)
    turned = torch.complex(a, b) * turn
    pair = torch.stack((turned.real, turned.imag), -2 if neox else -1).flatten(-2)
    return torch.cat((pair, key[:, rotary_dim:]), -1)
