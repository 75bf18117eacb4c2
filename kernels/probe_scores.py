"""What probe queries look at: softmax mass on each segment token times the norm of its value (policy-study.md).

    score_j += weight * |V_j| * sum over probe queries and heads of exp(scale * q k_j - lse_q)

The log-sum-exp of each query comes from its attention pass, so that no score matrix is kept: each program reads a block
of keys of one KV head once and walks over the queries.

For `n` segment tokens, `m` probe queries, `H` query heads, `h` KV heads of dimensions `d` and `d_v`, `b` bytes each:

    FLOPs        ``2 n m H d + 2 n h d_v``
    bytes moved  ``n h (d + d_v) b + 8 n h``; the queries, ``m H d b`` per 64 keys, come from L2
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .fp8 import decode_e4m3, native_fp8
from .scattered_attention import LOG2E

BLOCK_N = 64
"""Keys per program."""
BLOCK_M = 32
"""Rows (queries times heads of a group) per step."""


class ProbePlan(NamedTuple):
    """Valid for every layer."""

    items: Tensor
    """int32 [blocks, 4]: first and end key, first and end query of its request."""
    query_positions: Tensor
    """int32 [queries]."""
    key_positions: Tensor
    """int32 [keys]."""
    window_left: int


def plan_probe(
    requests: list[tuple[np.ndarray, np.ndarray]], *, device: torch.device, window_left: int = -1
) -> ProbePlan:
    """Lay out the blocks of all requests; one copy to the device, which does not wait for it.

    requests: (query positions, positions of the segment tokens to score), int64 numpy each, in the order of the rows of
    `q` and of the entries of `kv_slots`. window_left: a query sees keys at most this many positions back; -1: all.
    """
    items, queries, keys = [np.zeros((0, 4), np.int64)], 0, 0
    for query, key in requests:
        first = np.arange(0, len(key), BLOCK_N)
        stop = np.minimum(first + BLOCK_N, len(key))
        both = np.broadcast_to([queries, queries + len(query)], (len(first), 2))
        items.append(np.concatenate((np.stack((first, stop), 1) + keys, both), 1))
        queries, keys = queries + len(query), keys + len(key)
    work = np.concatenate(items)
    packed = np.concatenate((work.ravel(), *(q for q, _ in requests), *(k for _, k in requests))).astype(np.int32)
    host = torch.from_numpy(packed)
    if device.type == "cuda":
        host = host.pin_memory()
    on_device = host.to(device, non_blocking=True).split([work.size, queries, keys])
    return ProbePlan(on_device[0].view(-1, 4), on_device[1], on_device[2], window_left)


# Not specialised: what varies from call to call, and would compile anew.
@triton.jit(do_not_specialize=["keys"], do_not_specialize_on_alignment=["query_positions", "key_positions", "kv_slots"])
def probe_scores_kernel(
    q,
    lse,
    k_buffer,
    v_buffer,
    scores,
    items,
    query_positions,
    key_positions,
    kv_slots,
    keys,
    q_row,
    window_left,
    scale,
    weight,
    WINDOW: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (block of keys, KV head)."""
    item = items + tl.program_id(0) * 4
    head = tl.program_id(1)
    key = tl.load(item) + tl.arange(0, BLOCK_N)
    live = key < tl.load(item + 1)
    first = tl.load(item + 2) * GROUP
    stop = tl.load(item + 3) * GROUP
    slot = tl.load(kv_slots + key, live, other=0).to(tl.int64)
    # A key that is none lies behind every query.
    k_pos = tl.load(key_positions + key, live, other=0x7FFFFFFF)
    cols = tl.arange(0, BLOCK_D)
    v_cols = tl.arange(0, BLOCK_DV)
    k = tl.load(
        k_buffer + slot[:, None] * (KV_HEADS * DIM) + head * DIM + cols[None, :],
        live[:, None] & (cols < DIM)[None, :],
        other=0,
    )
    v = tl.load(
        v_buffer + slot[:, None] * (KV_HEADS * V_DIM) + head * V_DIM + v_cols[None, :],
        live[:, None] & (v_cols < V_DIM)[None, :],
        other=0,
    )
    k = decode_e4m3(k, NATIVE).to(q.dtype.element_ty) if FP8 else k.to(q.dtype.element_ty)
    v = decode_e4m3(v, NATIVE) if FP8 else v.to(tl.float32)
    norm = tl.sqrt(tl.sum(v * v, 1))
    mass = tl.zeros((BLOCK_N,), tl.float32)
    for start in tl.range(first, stop, BLOCK_M):
        packed = start + tl.arange(0, BLOCK_M)
        inside = packed < stop
        query = packed // GROUP
        q_head = head * GROUP + packed % GROUP
        q_mask = inside[:, None] & (cols < DIM)[None, :]
        q_tile = tl.load(q + query[:, None] * q_row + q_head[:, None] * DIM + cols[None, :], q_mask, other=0.0)
        q_pos = tl.load(query_positions + query, inside, other=-1)
        bound = tl.load(lse + query * (KV_HEADS * GROUP) + q_head, inside, other=0.0) * 1.4426950408889634
        seen = k_pos[:, None] <= q_pos[None, :]
        if WINDOW:
            seen &= k_pos[:, None] >= q_pos[None, :] - window_left
        s = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION) * scale - bound[None, :]
        mass += tl.sum(tl.exp2(tl.where(seen, s, float("-inf"))), 1)
    at = scores + head * keys + key
    tl.store(at, tl.load(at, live) + weight * mass * norm, live)


def launch_options(q: Tensor, k_buffer: Tensor, v_buffer: Tensor, window_left: int, native: bool) -> dict:
    """Constants of `probe_scores_kernel`."""
    kv_heads, dim = k_buffer.shape[1:]
    v_dim = v_buffer.shape[2]
    return {
        "WINDOW": window_left >= 0,
        "FP8": k_buffer.dtype == torch.float8_e4m3fn,
        "NATIVE": native,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "KV_HEADS": kv_heads,
        "GROUP": q.shape[1] // kv_heads,
        "DIM": dim,
        "V_DIM": v_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_DV": triton.next_power_of_2(v_dim),
        "BLOCK_M": BLOCK_M,
        "BLOCK_N": BLOCK_N,
    }


def add_probe_scores(
    plan: ProbePlan,
    q: Tensor,
    lse: Tensor,
    k_buffer: Tensor,
    v_buffer: Tensor,
    kv_slots: Tensor,
    scale: float,
    weight: float,
    scores: Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Add one layer's scores.

    Args:
        q: ``[queries, heads, head_dim]``, rotated, rows may be strided; bfloat16, float16 or float32.
        lse: float32 ``[queries, heads]``, contiguous: natural log-sum-exp over every key the query sees (not only the
            segments'), as `scattered_attention.attend_scattered` returns it.
        k_buffer, v_buffer: ``[slots, kv_heads, dim]``, contiguous; any floating dtype, float8_e4m3fn too.
        kv_slots: int32 or int64 ``[keys]``, slots of the segment tokens.
        scale: of the scores before the softmax. weight: of this layer; the study takes (layer / layers).
        scores: float32 ``[kv_heads, keys]``, contiguous, added to. Sum over the heads (and ranks) after the last layer:
            a row per head needs no atomics, so the sum does not depend on the order in which programs finish.
        k_scale, v_scale: what a stored fp8 element is multiplied by.
    """
    if plan.items.shape[0] == 0:
        return
    options = launch_options(q, k_buffer, v_buffer, plan.window_left, native_fp8(q.device))
    if options["FP8"]:
        k_buffer, v_buffer = k_buffer.view(torch.uint8), v_buffer.view(torch.uint8)
    probe_scores_kernel[(plan.items.shape[0], options["KV_HEADS"])](
        q,
        lse,
        k_buffer,
        v_buffer,
        scores,
        plan.items,
        plan.query_positions,
        plan.key_positions,
        kv_slots,
        scores.shape[1],
        q.stride(0),
        plan.window_left,
        scale * k_scale * LOG2E,
        weight * v_scale,
        num_warps=4,
        num_stages=2,
        **options,
    )


def reference(
    requests: list[tuple[np.ndarray, np.ndarray]],
    q: Tensor,
    lse: Tensor,
    k_buffer: Tensor,
    v_buffer: Tensor,
    kv_slots: Tensor,
    scale: float,
    *,
    window_left: int = -1,
) -> Tensor:
    """One layer's scores of weight 1 in plain PyTorch, in fp64, score matrix and all: ``[kv_heads, keys]``."""
    kv_heads = k_buffer.shape[1]
    group = q.shape[1] // kv_heads
    parts, row, key = [q.new_zeros((kv_heads, 0), dtype=torch.float64)], 0, 0
    for query_positions, key_positions in requests:
        slots = kv_slots[key : key + len(key_positions)].long()
        rows = slice(row, row + len(query_positions))
        k = k_buffer[slots].double().repeat_interleave(group, 1)
        logits = torch.einsum("qhd,khd->hqk", q[rows].double(), k) * scale - lse[rows].double().T[..., None]
        distance = torch.from_numpy(query_positions[:, None] - key_positions[None, :]).to(q.device)
        seen = distance >= 0 if window_left < 0 else (distance >= 0) & (distance <= window_left)
        mass = logits.exp().masked_fill(~seen, 0.0).unflatten(0, (kv_heads, group)).sum((1, 2))
        parts.append(mass * v_buffer[slots].double().norm(dim=-1).T)
        row, key = row + len(query_positions), key + len(key_positions)
    return torch.cat(parts, 1)
