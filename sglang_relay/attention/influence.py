"""How much attention earlier tokens receive from the queries behind them (the definition of kernels/influence.py, in
PyTorch)."""

from __future__ import annotations

import torch

BLOCK_ROWS = 64
"""Queries per product."""


def attention_mass(query: torch.Tensor, keys: torch.Tensor, begin: int, scaling: float) -> torch.Tensor:
    """float32 [n - 1 - begin]: the attention weight on each position from ``begin`` to the last but one, summed over
    the heads and over the queries that stand behind the position.

    query: [r, heads, head_dim], rotated, of the last r of n tokens. keys: [n, kv_heads, head_dim], of all of them. A
    query's weights are normalised over all keys up to its own, which is not counted.
    """
    rows, n, kv_heads = query.shape[0], keys.shape[0], keys.shape[1]
    q = query.float().unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [kv_heads, group, r, head_dim]
    k = keys.float().permute(1, 2, 0)  # [kv_heads, head_dim, n]
    if rows == 1:
        logits = torch.matmul(q[:, :, 0], k) * scaling
        return torch.softmax(logits, -1)[..., begin : n - 1].sum((0, 1))
    mass = torch.zeros(n - begin, dtype=torch.float32, device=query.device)
    position = torch.arange(n, device=query.device)
    for first in range(0, rows, BLOCK_ROWS):
        own = position[n - rows :][first : first + BLOCK_ROWS, None]
        logits = torch.matmul(q[:, :, first : first + BLOCK_ROWS], k[:, None]) * scaling
        weight = torch.softmax(logits.masked_fill_(position > own, float("-inf")), -1)
        mass += weight.masked_fill_(position == own, 0.0)[..., begin:].sum((0, 1, 2))
    return mass[:-1]
