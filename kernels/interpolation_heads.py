"""The rotated part of a key's heads: read as pairs, turned, and written where pairs lie another way.

What the interpolation's kernels write (looks, changes) has the first elements of all pairs before the second ones, and
the rest of a head behind them: one layout for NeoX and GPT-J, contiguous where products read it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .interpolation_plan import Rows


@triton.jit
def load_pairs(head, live, NEOX: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, ROWS: tl.constexpr):
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
def store_pairs(head, a, b, live, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr):
    """Write first elements, then second ones. head: pointers [ROWS, 1]."""
    pairs = tl.arange(0, HALF_BLOCK)
    mask = live[:, None] & (pairs < HALF)[None, :]
    tl.store(head + pairs[None, :], a.to(head.dtype.element_ty), mask)
    tl.store(head + HALF + pairs[None, :], b.to(head.dtype.element_ty), mask)


@triton.jit
def load_factors(cos, sin, rows, live, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr):
    """Of each row's pairs: fp32 [ROWS, HALF_BLOCK] each."""
    pairs = tl.arange(0, HALF_BLOCK)
    mask = live[:, None] & (pairs < HALF)[None, :]
    at = rows.to(tl.int64)[:, None] * HALF + pairs[None, :]
    return tl.load(cos + at, mask, other=1.0), tl.load(sin + at, mask, other=0.0)


def turns(rows: Rows) -> Tensor:
    """complex128 [t, 1, half]."""
    return torch.complex(rows.cos.double(), rows.sin.double())[:, None]


def turned(keys: Tensor, rows: Rows, neox: bool, rotary_dim: int) -> Tensor:
    """fp64 keys [t, heads, dim] at position 0, elements in the order of `store_pairs`: for the references."""
    half = rotary_dim // 2
    a, b = (
        (keys[..., :half], keys[..., half:rotary_dim])
        if neox
        else (keys[..., :rotary_dim:2], keys[..., 1:rotary_dim:2])
    )
    pairs = torch.complex(a, b) * turns(rows)
    return torch.cat((pairs.real, pairs.imag, keys[..., rotary_dim:]), -1)
