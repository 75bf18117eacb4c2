"""Decode influence: how much attention each generated token receives from the tokens decoded after it.

RelayCaching (arXiv 2603.13289) sums it over decode steps, layers and heads: ``s_j += sum over heads of
exp(scale * q k_j - lse)`` for every earlier token j of the request's own output, once per step and layer. The query's
own token is not counted.

The buffer has one float32 per KV slot. A slot belongs to one request, so each entry has one writer; no atomics, and the
same bits on every run. Everything that varies between steps (lengths, slots) is read on the device and the grid depends
on shapes only, so a launch can be captured in a CUDA graph. Padding rows of a graph have an empty span.

For `B` requests with spans of `s` tokens, `H` query heads, `h` KV heads of dimension `d`, `b` bytes:

    FLOPs        ``2 B s H d``
    bytes moved  ``B s (h d b + 12)``: the keys of the span once more, next to what decoding reads anyway
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fp8 import decode_e4m3, native_fp8
from .scattered_attention import LOG2E

BLOCK_N = 64
"""Keys per step of a program."""


@triton.jit(do_not_specialize_on_alignment=["table_rows", "span_starts", "lengths"])
def influence_kernel(
    q,
    lse,
    k_buffer,
    slot_table,
    table_rows,
    span_starts,
    lengths,
    influence,
    q_row,
    table_row,
    scale,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Program (request, part of its span): every PROGRAMS-th block of keys."""
    request = tl.program_id(0)
    begin = tl.load(span_starts + request).to(tl.int32)
    end = tl.load(lengths + request).to(tl.int32) - 1
    slots = slot_table + tl.load(table_rows + request).to(tl.int64) * table_row
    cols = tl.arange(0, BLOCK_D)
    inner = tl.arange(0, GROUP_BLOCK)
    inside = inner < GROUP
    q_mask = inside[:, None] & (cols < DIM)[None, :]
    for start in tl.range(begin + tl.program_id(1) * BLOCK_N, end, PROGRAMS * BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        live = position < end
        slot = tl.load(slots + position, live, other=0).to(tl.int64)
        k_mask = live[:, None] & (cols < DIM)[None, :]
        mass = tl.zeros((BLOCK_N,), tl.float32)
        for head in tl.range(KV_HEADS):
            q_head = head * GROUP + inner
            q_tile = tl.load(
                q + request.to(tl.int64) * q_row + q_head[:, None] * DIM + cols[None, :], q_mask, other=0.0
            )
            # A head that is none, or saw nothing, gives no mass.
            bound = tl.load(lse + request * (KV_HEADS * GROUP) + q_head, inside, other=float("inf"))
            bound = tl.where(bound == float("-inf"), float("inf"), bound) * 1.4426950408889634
            raw = tl.load(k_buffer + slot[:, None] * (KV_HEADS * DIM) + head * DIM + cols[None, :], k_mask, other=0)
            k = decode_e4m3(raw, NATIVE).to(q_tile.dtype) if FP8 else raw.to(q_tile.dtype)
            s = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION) * scale - bound[None, :]
            mass += tl.sum(tl.exp2(s), 1)
        at = influence + slot
        tl.store(at, tl.load(at, live) + mass, live)


def launch_options(q: Tensor, k_buffer: Tensor, programs: int, native: bool) -> dict:
    """Constants of `influence_kernel`."""
    kv_heads, dim = k_buffer.shape[1:]
    group = q.shape[1] // kv_heads
    return {
        "FP8": k_buffer.dtype == torch.float8_e4m3fn,
        "NATIVE": native,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "GROUP_BLOCK": max(16, triton.next_power_of_2(group)),
        "DIM": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
        "BLOCK_N": BLOCK_N,
        "PROGRAMS": programs,
    }


def stages(dim: int) -> int:
    """KV heads whose loads are in flight: two blocks of keys per multiprocessor must fit its shared memory."""
    return 3 if dim <= 128 else 2


def add_influence(
    q: Tensor,
    lse: Tensor,
    k_buffer: Tensor,
    slot_table: Tensor,
    table_rows: Tensor,
    span_starts: Tensor,
    lengths: Tensor,
    scale: float,
    influence: Tensor,
    *,
    programs: int,
    k_scale: float = 1.0,
) -> None:
    """Add one decode step of one layer.

    Args:
        q: ``[batch, heads, head_dim]``, rotated, rows may be strided; bfloat16, float16 or float32.
        lse: float32 ``[batch, heads]``, contiguous: natural log-sum-exp over every key the query sees.
        k_buffer: ``[slots, kv_heads, head_dim]``, contiguous; any floating dtype, float8_e4m3fn too.
        slot_table: int32 ``[requests, positions]``, slot of each position (SGLang's `req_to_token`); rows contiguous.
        table_rows: int32 or int64 ``[batch]``, row of each request in it.
        span_starts: int32 or int64 ``[batch]``, position of the request's first generated token.
        lengths: int32 or int64 ``[batch]``, positions so far, the query's own included (SGLang's `seq_lens`).
        influence: float32 ``[slots]``, added to at the slots of positions ``[span_start, length - 1)``. Zero a slot
            when it is handed out.
        programs: per request; fixed at capture. Each walks over every programs-th block of 64 keys.
        k_scale: what a stored fp8 element is multiplied by.
    """
    if len(q) == 0:
        return
    options = launch_options(q, k_buffer, programs, native_fp8(q.device))
    if options["FP8"]:
        k_buffer = k_buffer.view(torch.uint8)
    influence_kernel[(len(q), programs)](
        q,
        lse,
        k_buffer,
        slot_table,
        table_rows,
        span_starts,
        lengths,
        influence,
        q.stride(0),
        slot_table.stride(0),
        scale * k_scale * LOG2E,
        num_warps=4,
        num_stages=stages(k_buffer.shape[2]),
        **options,
    )


def reference(
    q: Tensor,
    lse: Tensor,
    k_buffer: Tensor,
    slot_table: Tensor,
    table_rows: Tensor,
    span_starts: Tensor,
    lengths: Tensor,
    scale: float,
) -> Tensor:
    """What `add_influence` adds, in plain PyTorch, in fp64: ``[slots]``."""
    added = torch.zeros(len(k_buffer), dtype=torch.float64, device=q.device)
    group = q.shape[1] // k_buffer.shape[1]
    for request, (row, start, length) in enumerate(zip(table_rows, span_starts, lengths, strict=True)):
        slots = slot_table[row, start : max(start, length - 1)].long()
        k = k_buffer[slots].double().repeat_interleave(group, 1)
        logits = torch.einsum("hd,khd->kh", q[request].double(), k) * scale - lse[request].double()
        added[slots] += logits.exp().sum(-1)
    return added
