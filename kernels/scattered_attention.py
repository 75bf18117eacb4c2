"""Paged attention of scattered query rows, masked by absolute position.

A query at position ``p`` sees the listed keys at positions ``<= p`` of its sequence, whichever rows are active. The
host knows all positions, so it plans once per stage: which tile of queries reads which keys, without tiles above the
diagonal, and without a mask below it. The heads of a group share a tile (row ``query * group + head``), so each K and V
row is read once per tile and KV head. Few queries over many keys are split along the keys and merged by another launch.

For `n` query rows, `s` keys seen by each on average, `H` query heads in groups of `g`, dimensions `d` (K) and `d_v`
(V), elements of `b` bytes and `T` queries per tile (``block_m / g``):

    FLOPs        ``2 n s H (d + d_v)``, plus about half a tile per query at the diagonal
    bytes moved  ``n s / T * H / g * (d + d_v) * b`` of K and V (from L2 when tiles of one sequence run together)
                 ``n H (d + d_v) * 2`` of queries and outputs; split tiles add ``8 n H d_v`` per piece
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .fp8 import decode_e4m3, native_fp8

LOG2E = 1.4426950408889634
FIELDS = 8
"""int32 per work item: first and end row of the packed tile; begin, full begin, full end and end of its keys; number of
the partial result or -1; 0."""


class ScatteredSequence(NamedTuple):
    """One sequence of a stage.

    query_positions: int64 numpy [n], strictly ascending. key_positions: int64 numpy [m], strictly ascending; they need
    not be all positions.
    """

    query_positions: np.ndarray
    key_positions: np.ndarray


class Tiling(NamedTuple):
    block_m: int
    """Rows of a tile: queries times heads of a group."""
    block_n: int
    """Keys per step."""
    warps: int
    stages: int
    """Steps whose loads are in flight."""


class ScatteredPlan(NamedTuple):
    """Valid for every layer over the same rows; device tensors unless said otherwise."""

    items: Tensor
    """int32 [items, FIELDS], longest first."""
    merges: Tensor
    """int32 [split tiles, 4]: first and end packed row, first partial result, number of them."""
    query_positions: Tensor
    """int32 [rows]."""
    key_positions: Tensor
    """int32 [keys]."""
    partials: int
    group: int
    window_left: int
    tiling: Tiling
    flops: int
    """Multiply-adds counted twice, per query head and unit of (head_dim + v_dim), with whole tiles."""


def choose_tiling(packed_rows: int, head_dim: int, v_dim: int, element_size: int, capability: int) -> Tiling:
    """The tile for sequences of at most `packed_rows` rows: the largest that fits without spilling registers.

    element_size: bytes of a query element. capability: of the device, as 80 for 8.0; before 9.0 the products' operands
    take registers too.
    """
    dim = max(head_dim, v_dim)
    wide = dim > 128 or element_size == 4
    if packed_rows <= 16:
        return Tiling(16, 32 if wide else 64, 4, 2 if wide else 3)
    if wide:
        return Tiling(64, 32, 8, 2)
    if capability < 90 and dim > 64:
        return Tiling(64, 64, 8, 3)
    return Tiling(64, 64, 4, 3) if packed_rows <= 64 else Tiling(128, 64, 8, 3)


def plan_scattered(
    sequences: list[ScatteredSequence],
    *,
    group: int,
    kv_heads: int,
    tiling: Tiling,
    multiprocessors: int,
    device: torch.device,
    window_left: int = -1,
) -> ScatteredPlan:
    """Lay out the work of a stage on the host; one copy to the device, which does not wait for it.

    Args:
        sequences: in the order of the stage's query rows, and of the keys in `kv_slots`.
        group: query heads per KV head.
        window_left: a query sees keys at most this many positions back; -1: all.
        multiprocessors: of the device; long tiles are split until about four programs per multiprocessor exist.

    Raises:
        ValueError: positions out of order or past int32.
    """
    tiles, rows, keys = [], 0, 0
    for query, key in sequences:
        for positions in (query, key):
            inside = len(positions) == 0 or (positions[0] >= 0 and positions[-1] < 2**31 - 1)
            if not inside or (np.diff(positions) <= 0).any():
                raise ValueError("positions must be ascending int32")
        tiles.append(_tiles(query, key, rows, keys, group, tiling, window_left))
        rows, keys = rows + len(query), keys + len(key)
    tile = np.concatenate(tiles) if tiles else np.zeros((0, 6), np.int64)
    items, merges = _split(tile, tiling.block_n, kv_heads, multiprocessors)
    blocks = -(-(tile[:, 5] - tile[:, 2]) // tiling.block_n)
    packed = np.concatenate(
        [
            items.ravel(),
            merges.ravel(),
            *(query for query, _ in sequences),
            *(key for _, key in sequences),
        ]
    ).astype(np.int32)
    host = torch.from_numpy(packed)
    if device.type == "cuda":
        host = host.pin_memory()
    sizes = [items.size, merges.size, rows, keys]
    on_device = host.to(device, non_blocking=True).split(sizes)
    return ScatteredPlan(
        items=on_device[0].view(-1, FIELDS),
        merges=on_device[1].view(-1, 4),
        query_positions=on_device[2],
        key_positions=on_device[3],
        partials=int((items[:, 6] >= 0).sum()),
        group=group,
        window_left=window_left,
        tiling=tiling,
        flops=int(2 * tiling.block_m * tiling.block_n * blocks.sum()) // group,
    )


def _tiles(
    query: np.ndarray, key: np.ndarray, row: int, first_key: int, group: int, tiling: Tiling, window: int
) -> np.ndarray:
    """int64 [tiles, 6]: the fields of a work item up to the end of its keys, before any split."""
    total = len(query) * group
    start = np.arange(0, total, tiling.block_m)
    stop = np.minimum(start + tiling.block_m, total)
    low, high = query[start // group], query[(stop - 1) // group]
    begin = np.searchsorted(key, low - window) if window >= 0 else np.zeros_like(start)
    end = np.searchsorted(key, high, "right")
    begin = np.minimum(begin, end)
    # Keys that every row of the tile sees, in whole steps from `begin`: they need no mask.
    step = tiling.block_n
    full_begin = np.searchsorted(key, high - window) if window >= 0 else begin
    full_begin = begin + -(-(np.maximum(full_begin, begin) - begin) // step) * step
    full_end = begin + (np.searchsorted(key, low, "right") - begin) // step * step
    full_begin = np.minimum(full_begin, end)
    full_end = np.maximum(full_end, full_begin)
    keys = np.stack((begin, full_begin, full_end, end), 1) + first_key
    return np.concatenate((np.stack((start, stop), 1) + row * group, keys), 1)


def _split(tile: np.ndarray, step: int, kv_heads: int, multiprocessors: int) -> tuple[np.ndarray, np.ndarray]:
    """Work items int64 [items, FIELDS] and merges int64 [split tiles, 4]."""
    blocks = -(-(tile[:, 5] - tile[:, 2]) // step)
    most = max(8, -(-int(blocks.sum()) * kv_heads // (4 * multiprocessors)))
    pieces = np.maximum(1, -(-blocks // most))
    each = -(-blocks // pieces)
    owner = np.repeat(np.arange(len(tile)), pieces)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    items = np.zeros((len(owner), FIELDS), np.int64)
    items[:, :6] = tile[owner]
    begin, end = items[:, 2].copy(), items[:, 5].copy()
    items[:, 2] = np.minimum(begin + number * each[owner] * step, end)
    items[:, 5] = np.minimum(begin + (number + 1) * each[owner] * step, end)
    for field in (3, 4):
        items[:, field] = np.clip(items[:, field], items[:, 2], items[:, 5])
    parted = pieces[owner] > 1
    items[:, 6] = np.where(parted, np.cumsum(parted) - 1, -1)
    split = np.flatnonzero(pieces > 1)
    first = (np.cumsum(pieces[split]) - pieces[split]).astype(np.int64)
    merges = np.stack((tile[split, 0], tile[split, 1], first, pieces[split]), 1)
    # The longest first, so that the last programs to start are short.
    return items[np.argsort(items[:, 2] - items[:, 5], kind="stable")], merges


@triton.jit
def _rows(
    buffer, slots, live, ROW: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):  # tile [BLOCK_N, BLOCK] of a K or V buffer; rows that are not live read as zeros
    cols = tl.arange(0, BLOCK)
    pointers = buffer + slots[:, None] * ROW + cols[None, :]
    if MASKED and BLOCK != DIM:
        return tl.load(pointers, live[:, None] & (cols < DIM)[None, :], other=0)
    elif MASKED:
        return tl.load(pointers, live[:, None], other=0)
    elif BLOCK != DIM:
        return tl.load(pointers, (cols < DIM)[None, :], other=0)
    else:
        return tl.load(pointers)


@triton.jit
def _attend_range(
    acc,
    peak,
    total,
    q,
    q_pos,
    k_head,
    v_head,
    kv_slots,
    key_positions,
    begin,
    end,
    window_left,
    scale,
    MASKED: tl.constexpr,
    WINDOW: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    K_ROW: tl.constexpr,
    V_ROW: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax over keys [begin, end); without MASKED their number is a multiple of BLOCK_N, all visible."""
    for start in tl.range(begin, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        live = at < end
        slots = tl.load(kv_slots + at, live, other=0) if MASKED else tl.load(kv_slots + at)
        slots = slots.to(tl.int64)
        k = _rows(k_head, slots, live, K_ROW, DIM, BLOCK_D, MASKED)
        k = decode_e4m3(k, NATIVE).to(q.dtype) if FP8 else k.to(q.dtype)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        if MASKED:
            k_pos = tl.load(key_positions + at, live, other=0x7FFFFFFF)
            seen = k_pos[None, :] <= q_pos[:, None]
            if WINDOW:
                seen &= k_pos[None, :] >= q_pos[:, None] - window_left
            s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1))
        # A row that has seen no key yet: -inf minus -inf would be NaN.
        base = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        p = tl.exp2(s - base[:, None])
        fade = tl.exp2(peak - base)
        total = total * fade + tl.sum(p, 1)
        v = _rows(v_head, slots, live, V_ROW, V_DIM, BLOCK_DV, MASKED)
        v = decode_e4m3(v, NATIVE).to(q.dtype) if FP8 else v.to(q.dtype)
        acc = tl.dot(p.to(q.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        peak = higher
    return acc, peak, total


# Not specialised: parts of one buffer or slices, whose alignment varies from call to call and would compile anew.
@triton.jit(do_not_specialize_on_alignment=["query_positions", "key_positions", "kv_slots"])
def scattered_attention_kernel(
    q,
    k_buffer,
    v_buffer,
    out,
    lse,
    partial_out,
    partial_lse,
    items,
    query_positions,
    key_positions,
    kv_slots,
    q_row,
    window_left,
    scale,
    v_scale,
    WINDOW: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    K_ROW: tl.constexpr,
    V_ROW: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (work item, KV head)."""
    item = items + tl.program_id(0) * 8
    head = tl.program_id(1)
    first = tl.load(item)
    stop = tl.load(item + 1)
    begin = tl.load(item + 2)
    full_begin = tl.load(item + 3)
    full_end = tl.load(item + 4)
    end = tl.load(item + 5)
    partial = tl.load(item + 6)

    packed = first + tl.arange(0, BLOCK_M)
    inside = packed < stop
    query = packed // GROUP
    q_head = head * GROUP + packed % GROUP
    q_pos = tl.load(query_positions + query, inside, other=-1)
    cols = tl.arange(0, BLOCK_D)
    q_mask = inside[:, None] & (cols < DIM)[None, :]
    q_tile = tl.load(q + query.to(tl.int64)[:, None] * q_row + q_head[:, None] * DIM + cols[None, :], q_mask, other=0.0)

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    k_head = k_buffer + head * DIM
    v_head = v_buffer + head * V_DIM
    # fmt: off
    if WINDOW:
        acc, peak, total = _attend_range(
            acc, peak, total, q_tile, q_pos, k_head, v_head, kv_slots, key_positions, begin, full_begin,
            window_left, scale, True, WINDOW, FP8, NATIVE, PRECISION, K_ROW, V_ROW, DIM, V_DIM, BLOCK_D, BLOCK_DV,
            BLOCK_N,
        )
    acc, peak, total = _attend_range(
        acc, peak, total, q_tile, q_pos, k_head, v_head, kv_slots, key_positions, full_begin, full_end,
        window_left, scale, False, WINDOW, FP8, NATIVE, PRECISION, K_ROW, V_ROW, DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_N,
    )
    acc, peak, total = _attend_range(
        acc, peak, total, q_tile, q_pos, k_head, v_head, kv_slots, key_positions, full_end, end,
        window_left, scale, True, WINDOW, FP8, NATIVE, PRECISION, K_ROW, V_ROW, DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_N,
    )
    # fmt: on

    # A row that saw nothing: zero, and a log-sum-exp of -inf, which is its peak.
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None] * v_scale
    mass = (peak + tl.log2(total)) * 0.6931471805599453
    v_cols = tl.arange(0, BLOCK_DV)
    keep = inside[:, None] & (v_cols < V_DIM)[None, :]
    if partial < 0:
        row = query.to(tl.int64) * (KV_HEADS * GROUP) + q_head
        tl.store(out + row[:, None] * V_DIM + v_cols[None, :], acc.to(out.dtype.element_ty), keep)
        tl.store(lse + row, mass, inside)
    else:
        row = (partial.to(tl.int64) * KV_HEADS + head) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(partial_out + row[:, None] * V_DIM + v_cols[None, :], acc, keep)
        tl.store(partial_lse + row, mass, inside)


@triton.jit(do_not_specialize_on_alignment=["merges"])
def merge_kernel(
    out,
    lse,
    partial_out,
    partial_lse,
    merges,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (split tile, KV head, ROWS rows of the tile): weigh its partial results by their softmax mass."""
    merge = merges + tl.program_id(0) * 4
    head = tl.program_id(1)
    first = tl.load(merge)
    stop = tl.load(merge + 1)
    partial = tl.load(merge + 2)
    count = tl.load(merge + 3)
    inner = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    packed = first + inner
    inside = packed < stop
    cols = tl.arange(0, BLOCK_DV)
    keep = inside[:, None] & (cols < V_DIM)[None, :]
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for piece in tl.range(count):
        row = ((partial + piece).to(tl.int64) * KV_HEADS + head) * BLOCK_M + inner
        mass = tl.load(partial_lse + row, inside, other=float("-inf"))
        value = tl.load(partial_out + row[:, None] * V_DIM + cols[None, :], keep, other=0.0)
        higher = tl.maximum(peak, mass)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(mass - base)
        fade = tl.exp(peak - base)
        acc = acc * fade[:, None] + value * weight[:, None]
        total = total * fade + weight
        peak = higher
    row = (packed // GROUP).to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + packed % GROUP
    total = tl.where(total == 0.0, 1.0, total)
    acc = acc / total[:, None]
    tl.store(out + row[:, None] * V_DIM + cols[None, :], acc.to(out.dtype.element_ty), keep)
    tl.store(lse + row, peak + tl.log(total), inside)


def attend_scattered(
    plan: ScatteredPlan,
    q: Tensor,
    k_buffer: Tensor,
    v_buffer: Tensor,
    kv_slots: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Attention of all rows of a stage in one layer.

    Args:
        q: ``[rows, heads, head_dim]``, bfloat16, float16 or float32; rows may be strided, a row is contiguous.
        k_buffer, v_buffer: ``[slots, kv_heads, dim]``, contiguous, of a floating dtype, float8_e4m3fn too; every listed
            key must be finite.
        kv_slots: int32 or int64 ``[keys]``, slot of each key, sequence after sequence in ascending position.
        scale: of the scores before the softmax.
        out: ``[rows, heads, v_dim]``, contiguous, written. A row that sees no key is zero.
        lse: float32 ``[rows, heads]``, contiguous, written: natural log of the sum of the exponentials of its scaled
            scores; -inf for a row that sees no key.
        k_scale, v_scale: what a stored fp8 element is multiplied by.
    """
    if plan.items.shape[0] == 0:
        return
    options = launch_options(q, k_buffer, v_buffer, plan.tiling, plan.window_left, native_fp8(q.device))
    kv_heads, v_dim, block_m = options["KV_HEADS"], options["V_DIM"], plan.tiling.block_m
    if k_buffer.dtype == torch.float8_e4m3fn:
        k_buffer, v_buffer = k_buffer.view(torch.uint8), v_buffer.view(torch.uint8)
    partial_out = torch.empty((plan.partials, kv_heads, block_m, v_dim), dtype=torch.float32, device=q.device)
    partial_lse = torch.empty((plan.partials, kv_heads, block_m), dtype=torch.float32, device=q.device)
    scattered_attention_kernel[(plan.items.shape[0], kv_heads)](
        q,
        k_buffer,
        v_buffer,
        out,
        lse,
        partial_out,
        partial_lse,
        plan.items,
        plan.query_positions,
        plan.key_positions,
        kv_slots,
        q.stride(0),
        plan.window_left,
        scale * k_scale * LOG2E,
        v_scale,
        num_warps=plan.tiling.warps,
        num_stages=plan.tiling.stages,
        **options,
    )
    if plan.merges.shape[0]:
        rows = 16
        merge_kernel[(plan.merges.shape[0], kv_heads, block_m // rows)](
            out,
            lse,
            partial_out,
            partial_lse,
            plan.merges,
            KV_HEADS=kv_heads,
            GROUP=plan.group,
            V_DIM=v_dim,
            BLOCK_DV=options["BLOCK_DV"],
            BLOCK_M=block_m,
            ROWS=rows,
            num_warps=4,
        )


def launch_options(
    q: Tensor, k_buffer: Tensor, v_buffer: Tensor, tiling: Tiling, window_left: int, native: bool
) -> dict:
    """Constants of `scattered_attention_kernel`."""
    kv_heads, dim = k_buffer.shape[1:]
    v_dim = v_buffer.shape[2]
    return {
        "WINDOW": window_left >= 0,
        "FP8": k_buffer.dtype == torch.float8_e4m3fn,
        "NATIVE": native,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "KV_HEADS": kv_heads,
        "GROUP": q.shape[1] // kv_heads,
        "K_ROW": kv_heads * dim,
        "V_ROW": kv_heads * v_dim,
        "DIM": dim,
        "V_DIM": v_dim,
        # The matrix units take no fewer than 16 columns.
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_DV": max(16, triton.next_power_of_2(v_dim)),
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
    }


def reference(
    sequences: list[ScatteredSequence],
    q: Tensor,
    k_buffer: Tensor,
    v_buffer: Tensor,
    kv_slots: Tensor,
    scale: float,
    *,
    window_left: int = -1,
) -> tuple[Tensor, Tensor]:
    """The same in plain PyTorch, in fp64, scores written out: ``(out [rows, heads, v_dim], lse [rows, heads])``."""
    group = q.shape[1] // k_buffer.shape[1]
    outs, masses, row, key = [], [], 0, 0
    for query_positions, key_positions in sequences:
        slots = kv_slots[key : key + len(key_positions)].long()
        k, v = (b[slots].double().repeat_interleave(group, 1) for b in (k_buffer, v_buffer))
        scores = torch.einsum("qhd,khd->hqk", q[row : row + len(query_positions)].double(), k) * scale
        distance = torch.from_numpy(query_positions[:, None] - key_positions[None, :]).to(q.device)
        seen = distance >= 0 if window_left < 0 else (distance >= 0) & (distance <= window_left)
        scores = scores.masked_fill(~seen, float("-inf"))
        mass = torch.logsumexp(scores, -1)
        weight = torch.exp(scores - mass.masked_fill(mass.isinf(), 0.0)[..., None])
        outs.append(torch.einsum("hqk,khd->qhd", weight, v))
        masses.append(mass.T)
        row, key = row + len(query_positions), key + len(key_positions)
    return torch.cat(outs), torch.cat(masses)
