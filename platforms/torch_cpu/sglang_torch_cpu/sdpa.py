"""Paged attention on PyTorch's CPU flash kernel. Tensors and plain types only; no SGLang.

The kernel (`aten::_scaled_dot_product_flash_attention_for_cpu`) reads grouped-query K and V without expanding them, but
pays per head and per mask element, and its `is_causal` aligns the diagonal top-left. So:

- one query row per sequence (decode): the query heads of a group become query rows, no mask;
- several rows after a prefix: blocks of rows, each against just the keys that its last row sees, all masked by
  views of one small right-aligned mask that every layer of the forward shares.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

BLOCK_ROWS = 64
"""Query rows per call: two of the kernel's own tiles. A block wastes the triangle above its diagonal."""


class Sequence(NamedTuple):
    """One sequence of a batch: query rows ``[start, stop)`` of the batch are its last ones; `slots` holds its keys.

    `slots` is int64 ``[kv_len]`` or, where the slots are consecutive, a slice of the pool (a view instead of a copy).
    """

    start: int
    stop: int
    kv_len: int
    slots: torch.Tensor | slice


def as_slots(row: torch.Tensor) -> torch.Tensor | slice:
    """Pool rows of one sequence, as a slice if they are consecutive. `row`: integer ``[kv_len]``, kv_len > 0."""
    first, last = int(row[0]), int(row[-1])
    n = row.shape[0]
    if last - first == n - 1 and (n < 3 or bool((row[1:] - row[:-1] == 1).all())):
        return slice(first, last + 1)
    return row.to(torch.int64)


def gather(buffer: torch.Tensor, slots: torch.Tensor | slice) -> torch.Tensor:
    """Rows of `buffer` ``[pool, kv_heads, dim]`` as ``[1, kv_heads, kv_len, dim]``."""
    rows = buffer[slots] if isinstance(slots, slice) else buffer.index_select(0, slots)
    return rows.transpose(0, 1).unsqueeze(0)


def causal_mask(rows: int, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """Additive bottom-right causal mask ``[rows, keys]``, rows <= keys.

    Its last ``r`` rows and ``n`` columns are the mask of ``r`` queries that are the last of ``n`` keys.
    """
    mask = torch.zeros(rows, keys, dtype=dtype)
    mask[:, keys - rows :].masked_fill_(torch.ones(rows, rows, dtype=torch.bool).triu_(1), float("-inf"))
    return mask


def decode(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """One query row over all keys.

    Args:
        query: ``[heads, dim]``; key, value: ``[1, kv_heads, kv_len, dim]`` of the same dtype.

    Returns:
        ``[heads, dim_v]``.
    """
    heads, dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.view(1, kv_heads, heads // kv_heads, dim)
    return sdpa(grouped, key, value, scale=scale).reshape(heads, value.shape[-1])


def extend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    mask: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """The last rows of a sequence, each over the keys up to its own position.

    Args:
        query: ``[rows, heads, dim]``.
        key, value: ``[1, kv_heads, kv_len, dim]``, kv_len >= rows.
        mask: from `causal_mask`, at least ``[min(rows, BLOCK_ROWS), kv_len]``, of the query's dtype.
        out: ``[rows, heads, dim_v]``, written.
    """
    rows, kv_len = query.shape[0], key.shape[2]
    if rows == 1:
        out[0] = decode(query[0], key, value, scale)
        return
    assert mask is not None
    q = query.transpose(0, 1).unsqueeze(0)
    prefix = kv_len - rows
    for begin in range(0, rows, BLOCK_ROWS):
        end = min(begin + BLOCK_ROWS, rows)
        seen = prefix + end
        block = sdpa(
            q[:, :, begin:end],
            key[:, :, :seen],
            value[:, :, :seen],
            attn_mask=mask[mask.shape[0] - (end - begin) :, mask.shape[1] - seen :],
            scale=scale,
            enable_gqa=True,
        )
        out[begin:end] = block[0].transpose(0, 1)
