"""How far fresh values turned away from cached ones, and the choice of tokens by it, without waiting for the device.

Deviation of token j: ``d_j = sum over heads of (1 - cos(cached V, fresh V))``; divided by the number of heads of all
ranks it is the deviation of RelayCaching (arXiv 2603.13289).

For `n` tokens with `h` KV heads of `d` elements of `b` bytes:

    bytes moved  ``2 n h d b`` read, ``4 n`` written
    FLOPs        ``6 n h d``
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fp8 import decode_e4m3, native_fp8

EPS = 1e-8
"""Least product of two norms, as in `torch.cosine_similarity`: a zero vector is at distance 1 from everything."""


# Not specialised: what varies from call to call, and would compile anew.
@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["slots", "out"])
def deviation_kernel(
    fresh,
    cached,
    slots,
    out,
    n,
    fresh_row,
    EPS: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (rows). fresh: [n, HEADS, DIM], rows `fresh_row` elements apart. cached: [slots, HEADS, DIM]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < n
    slot = tl.load(slots + rows, live, other=0).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = live[:, None] & (cols < DIM)[None, :]
    total = tl.zeros((ROWS,), tl.float32)
    for head in tl.range(HEADS):
        at = head * DIM + cols[None, :]
        a = tl.load(fresh + rows.to(tl.int64)[:, None] * fresh_row + at, mask, other=0).to(tl.float32)
        raw = tl.load(cached + slot[:, None] * (HEADS * DIM) + at, mask, other=0)
        b = decode_e4m3(raw, NATIVE) if FP8 else raw.to(tl.float32)
        norms = tl.sqrt(tl.sum(a * a, 1)) * tl.sqrt(tl.sum(b * b, 1))
        total += 1.0 - tl.sum(a * b, 1) / tl.maximum(norms, EPS)
    tl.store(out + rows, total, live)


def launch_options(cached: Tensor, native: bool) -> dict:
    """Constants of `deviation_kernel`."""
    heads, dim = cached.shape[1:]
    block = triton.next_power_of_2(dim)
    return {
        "EPS": EPS,
        "FP8": cached.dtype == torch.float8_e4m3fn,
        "NATIVE": native,
        "HEADS": heads,
        "DIM": dim,
        "BLOCK_D": block,
        "ROWS": max(1, min(16, 2048 // block)),
    }


def value_deviation(fresh: Tensor, cached: Tensor, slots: Tensor, out: Tensor) -> None:
    """Sum over the heads of the cosine distance between fresh and cached values.

    Args:
        fresh: ``[n, heads, dim]``, rows may be strided, a row is contiguous; any floating dtype.
        cached: ``[slots, heads, dim]``, contiguous; any floating dtype, float8_e4m3fn too (a cosine needs no scale).
        slots: int32 or int64 ``[n]``, the row of `cached` that belongs to each row of `fresh`.
        out: float32 ``[n]``, written.
    """
    n = len(slots)
    if n == 0:
        return
    options = launch_options(cached, native_fp8(cached.device))
    if options["FP8"]:
        cached = cached.view(torch.uint8)
    grid = (triton.cdiv(n, options["ROWS"]),)
    deviation_kernel[grid](fresh, cached, slots, out, n, fresh.stride(0), num_warps=4, **options)


def reference(fresh: Tensor, cached: Tensor, slots: Tensor) -> Tensor:
    """`value_deviation` in plain PyTorch, in fp64."""
    return (1.0 - torch.cosine_similarity(fresh.double(), cached[slots.long()].double(), dim=-1)).sum(-1)


class Selection(NamedTuple):
    rows: Tensor
    """int64 [budget], ascending; the entries past `count` are n, the number of tokens."""
    count: Tensor
    """int64 scalar on the device."""


def select_rows(score: Tensor, budget: int, least: Tensor | float | None = None) -> Selection:
    """The `budget` tokens of highest score, of those that reach `least`; ties by position. Never waits for the device.

    Args:
        score: ``[n]``. NaN counts as highest: what cannot be judged is recomputed.
        budget: at most this many; the shape of the result depends on it and on nothing else.
        least: a number, or ``[n]`` (`segment_thresholds`).
    """
    n = score.shape[0]
    # A stable sort, not top-k, whose order among equals is the device's choice: all ranks must choose alike.
    best = torch.argsort(score.nan_to_num(nan=float("inf")), descending=True, stable=True)[:budget]
    if least is not None:
        best = best.where(~(score < least)[best], n)
    best = torch.nn.functional.pad(best, (0, budget - best.shape[0]), value=n)
    rows = best.sort().values
    return Selection(rows, (rows < n).sum())


def segment_thresholds(score: Tensor, lengths: Tensor, tau: float) -> Tensor:
    """Per token `tau` times the mean score of its segment, ``[n]``. Never waits for the device.

    lengths: int64 ``[segments]``, adding up to n; may be zero.
    """
    means = torch.segment_reduce(score, "mean", lengths=lengths, unsafe=True)
    return torch.repeat_interleave(tau * means, lengths, output_size=score.shape[0])
