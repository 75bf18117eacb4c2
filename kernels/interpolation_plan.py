"""A prompt's interpolation on Triton kernels: what its three files share on the host.

A prompt's m recomputed tokens are `chosen`, the u others `kept`; a part relates the tokens of one piece of text only:

    change(s) = R(-p_s) (fresh K_s - donor K_s)            and the same of V, which carries no position
    K_u      += R(p_u) sum over s of weight(u, s) change(s)

`look_rows` (interpolation_looks.py) prepares, once per prompt, what the weights are made from. Then there are two
launches per layer: `change_rows` (interpolation_changes.py) takes what changed on the chosen tokens, and `carry_rows`
(interpolation_carry.py) adds it to the others.

Nothing in these files waits for the device. K and V are bfloat16, float16 or float32; all arithmetic between loads and
stores is fp32, float16 and bfloat16 operands of the products aside, which accumulate in fp32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

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
