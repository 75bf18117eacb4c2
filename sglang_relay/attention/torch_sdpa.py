"""PyTorch attention for scattered query rows: host work once per stage (plan), device work per layer (attend).

A query at position ``p`` sees the keys of all positions ``<= p`` of its request, whichever rows are active. Masking
by row instead would let a scattered row miss the keys between its neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_relay.transfer import on_device

BLOCK_ROWS = 32
"""Query rows per masked call on a CPU, whose kernel takes as many at a time: scattered rows lie far apart, so the fewer
there are in a block, the more keys above the diagonal are skipped."""
DEVICE_BLOCK_ROWS = 128
"""The same elsewhere, where a call costs a launch and a kernel's tiles are larger."""


class Sequence(NamedTuple):
    """The active rows of one request and the keys that they may see.

    positions: int64 numpy [n], strictly ascending positions in the prompt. keys: int64 numpy [m], strictly ascending
    positions of the keys; None for ``0 .. m - 1``. slots: int64 [m], the KV slot of each key.
    """

    positions: np.ndarray
    slots: torch.Tensor
    keys: np.ndarray | None = None


class _Block(NamedTuple):
    first: int
    """First query row, in rows of the stage."""
    rows: int
    keys: int
    """Keys ``[0, keys)`` are read."""
    mask: torch.Tensor | None
    """Additive [rows, keys] in the query's dtype; None where every key is visible or ``causal`` holds."""
    causal: bool


class _SequencePlan(NamedTuple):
    slots: torch.Tensor
    run: tuple[int, int] | None
    """``(first, stop)`` when the slots are one ascending run: read as a view instead of a gather."""
    blocks: tuple[_Block, ...]


class AttentionPlan(NamedTuple):
    """One stage: valid for every layer that runs over the same rows."""

    sequences: tuple[_SequencePlan, ...]


def plan_attention(sequences: list[Sequence], *, dtype: torch.dtype, device: torch.device) -> AttentionPlan:
    """Split each request's rows into blocks and build their masks.

    ``dtype`` is the query's. Rows of the stage are the sequences' rows one after another.
    """
    planned = []
    first = 0
    for sequence in sequences:
        blocks = _blocks(seen_keys(sequence), first, dtype, device)
        planned.append(_SequencePlan(sequence.slots, _one_run(sequence.slots), blocks))
        first += len(sequence.positions)
    return AttentionPlan(tuple(planned))


def _one_run(slots: torch.Tensor) -> tuple[int, int] | None:
    if slots.device.type != "cpu" or not slots.numel():
        return None  # reading slot numbers back would stall the device
    low, high = int(slots[0]), int(slots[-1])
    if high - low + 1 != slots.numel() or not bool((slots[1:] - slots[:-1] == 1).all()):
        return None
    return low, high + 1


def seen_keys(sequence: Sequence) -> np.ndarray:
    """int64 [rows]: how many keys each row sees. Raises ValueError where rows or keys are out of
    order, or a row's own key is missing."""
    positions, slots, keys = sequence
    if len(positions) and not (positions[0] >= 0 and bool((np.diff(positions) > 0).all())):
        raise ValueError("query positions must be ascending")
    at = np.arange(len(slots)) if keys is None else keys
    if len(at) != len(slots) or not bool((np.diff(at) > 0).all()):
        raise ValueError("key positions must be ascending, one per slot")
    seen = np.searchsorted(at, positions, side="right")
    if len(positions) and not (seen[0] > 0 and bool((at[seen - 1] == positions).all())):
        raise ValueError("a query's own key is missing")
    return seen


def _blocks(seen: np.ndarray, first: int, dtype: torch.dtype, device: torch.device) -> tuple[_Block, ...]:
    """seen: as of `seen_keys`; first: the request's first row in the stage."""
    count = len(seen)
    blocks = []
    # Leading rows that see just the keys of each other and of themselves: the causal kernel needs no mask.
    lead = int(np.searchsorted(seen != np.arange(1, count + 1), True)) if count else 0
    if lead:
        blocks.append(_Block(first, lead, lead, None, True))
    most = BLOCK_ROWS if device.type == "cpu" else DEVICE_BLOCK_ROWS
    for low in range(lead, count, most):
        part = seen[low : low + most]
        last = int(part[-1])
        mask = None
        if len(part) > 1:
            hidden = torch.arange(last)[None, :] >= torch.from_numpy(part)[:, None]
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
            mask = on_device(mask, device)
        blocks.append(_Block(first + low, len(part), last, mask, False))
    return tuple(blocks)


def attend(
    plan: AttentionPlan,
    query: torch.Tensor,
    key_buffer: torch.Tensor,
    value_buffer: torch.Tensor,
    scaling: float,
    out: torch.Tensor,
) -> None:
    """Attention of all rows of the stage in one layer.

    query: [rows, heads, head_dim]; key_buffer, value_buffer: [slots, kv_heads, dim], holding every key that a row may
    see; heads is a multiple of kv_heads (grouped-query attention, heads of a group adjacent). out: [rows, heads,
    v_dim], written in place.
    """
    kv_heads = key_buffer.shape[1]
    group = query.shape[1] // kv_heads
    for slots, run, blocks in plan.sequences:
        if run is None:
            key, value = key_buffer.index_select(0, slots), value_buffer.index_select(0, slots)
        else:
            key, value = key_buffer[run[0] : run[1]], value_buffer[run[0] : run[1]]
        # kv heads become the batch, the heads of a group share their keys through a zero stride: nothing is expanded.
        key = key.to(query.dtype).transpose(0, 1)[:, None].expand(-1, group, -1, -1)
        value = value.to(query.dtype).transpose(0, 1)[:, None].expand(-1, group, -1, -1)
        for block in blocks:
            rows = slice(block.first, block.first + block.rows)
            q = query[rows].unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3)
            o = scaled_dot_product_attention(
                q,
                key[:, :, : block.keys],
                value[:, :, : block.keys],
                attn_mask=block.mask,
                is_causal=block.causal,
                scale=scaling,
            )
            out[rows].copy_(o.permute(2, 0, 1, 3).flatten(1, 2))
