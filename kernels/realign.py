"""Move cached K and V of many layers to new slots and turn the keys to their new positions.

Plain PyTorch for any device, tuned for CPU. The rotation is computed in fp32 whatever the cache dtype.

Cost for `n` tokens and `L` layers, with K and V rows of `b_k` and `b_v` bytes: ``2 * n * L * (b_k + b_v)`` bytes moved
between cache and scratch, and ``3 * n * L * kv_heads * rotary_dim`` FLOPs.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

# fp32 elements per scratch tensor: three of them should share a core's second-level cache.
BLOCK_ELEMENTS = 96 * 1024
# Below this mean length of contiguous runs, one indexed copy beats a copy per run.
MIN_RUN = 192
# Row views for indexed copies, widest first: the copy loops run per element, not per byte.
_WIDE = ((16, torch.complex128), (8, torch.int64), (4, torch.int32))


def realign(
    k_buffers: Sequence[Tensor],
    v_buffers: Sequence[Tensor],
    source_slots: Tensor,
    target_slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    neox: bool,
    rotary_dim: int,
) -> None:
    """Copy rows `source_slots` to rows `target_slots` in every buffer; turn the copied keys by (`cos`, `sin`).

    Args:
        k_buffers: per layer ``[slots, kv_heads, head_dim]``, contiguous, one floating dtype and shape for all layers.
        v_buffers: per layer ``[slots, v_heads, v_dim]``, contiguous; heads and dim may differ from K's.
        source_slots: int64 ``[n]``, rows that hold the donor's K and V.
        target_slots: int64 ``[n]``, distinct rows that receive them. Each layer is gathered before it is
            scattered, so a target may also be a source.
        cos, sin: fp32 ``[n, rotary_dim // 2]``, per-token rotation by (target position - source position), unit norm.
        neox: pair element i with i + rotary_dim / 2 (NeoX) instead of 2i with 2i + 1 (GPT-J).
        rotary_dim: leading elements of each head that carry positions; the rest are copied.

    V, the elements past `rotary_dim`, and K rows whose rotation is the identity (cos 1, sin 0) keep their bits.

    Raises:
        ValueError: shapes that do not fit together. Slots are not checked against the buffers here: on an accelerator
            that would wait for the device, so the planner checks bounds on the host.
    """
    _check(k_buffers, v_buffers, source_slots, target_slots, cos, sin, rotary_dim)
    if source_slots.numel() == 0 or not k_buffers:
        return
    rows = _Rows(source_slots, target_slots)
    turn = _Turn(cos, sin, neox=neox, rotary_dim=rotary_dim, heads=k_buffers[0].shape[1])
    for buffer in v_buffers:
        rows.scatter(buffer, rows.gather(buffer))
    for buffer in k_buffers:
        keys = rows.gather(buffer)
        turn(keys)
        rows.scatter(buffer, keys)


class _Rows:
    """Gather from `source` and scatter to `target` rows, by slices where slots form long runs, else by index."""

    def __init__(self, source: Tensor, target: Tensor):
        self.source, self.target = source, target
        self.runs = _joint_runs(source, target)
        self.scratch: dict[tuple[torch.dtype, torch.Size], Tensor] = {}

    def gather(self, buffer: Tensor) -> Tensor:
        """``[n, heads, dim]`` copy of the source rows; valid until the next gather of the same shape and dtype."""
        shape = torch.Size((len(self.source), *buffer.shape[1:]))
        out = self.scratch.get((buffer.dtype, shape))
        if out is None:
            out = self.scratch[buffer.dtype, shape] = buffer.new_empty(shape)
        if self.runs is None:
            torch.index_select(_wide_rows(buffer), 0, self.source, out=_wide_rows(out))
        else:
            for row, source, _, length in self.runs:
                out[row : row + length].copy_(buffer[source : source + length])
        return out

    def scatter(self, buffer: Tensor, values: Tensor) -> None:
        if self.runs is None:
            _wide_rows(buffer).index_copy_(0, self.target, _wide_rows(values))
        else:
            for row, _, target, length in self.runs:
                buffer[target : target + length].copy_(values[row : row + length])


class _Turn:
    """Rotation of gathered keys in place: NeoX as ``x * C + roll(x) * S``, GPT-J as a product of complex pairs."""

    def __init__(self, cos: Tensor, sin: Tensor, *, neox: bool, rotary_dim: int, heads: int):
        self.neox, self.rotary_dim = neox, rotary_dim
        self.block = max(1, BLOCK_ELEMENTS // (heads * rotary_dim))
        self.keep = _identity_rows(cos, sin)
        self.idle = self.keep is not None and cos.device.type == "cpu" and bool(self.keep.all())
        # Spread over heads once: a broadcast operand would cut every layer's loops into pieces of one head.
        if neox:
            self.cos = torch.cat((cos, cos), -1).unsqueeze(1).repeat(1, heads, 1)
            self.sin = torch.cat((-sin, sin), -1).unsqueeze(1).repeat(1, heads, 1)
        else:
            self.pair = torch.complex(cos, sin).unsqueeze(1).repeat(1, heads, 1)

    def __call__(self, keys: Tensor) -> None:
        if self.idle:
            return
        for start in range(0, len(keys), self.block):
            span = slice(start, start + self.block)
            rotary = keys[span, :, : self.rotary_dim]
            x = rotary.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            if self.neox:
                swapped = torch.roll(x, self.rotary_dim // 2, -1)
                x.mul_(self.cos[span]).addcmul_(swapped, self.sin[span])
            else:
                torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(self.pair[span])
            if self.keep is None:
                rotary.copy_(x)
            else:
                rotary.copy_(torch.where(self.keep[span, None, None], rotary, x.to(rotary.dtype)))


def _identity_rows(cos: Tensor, sin: Tensor) -> Tensor | None:
    """bool ``[n]``: rows that must keep their bits; None where the host can see that there are none."""
    keep = ((cos == 1) & (sin == 0)).all(-1)
    # Reading the answer would make the host wait for an accelerator.
    return None if keep.device.type == "cpu" and not bool(keep.any()) else keep


def _joint_runs(source: Tensor, target: Tensor) -> list[tuple[int, int, int, int]] | None:
    """(first row, source slot, target slot, length) of maximal runs contiguous on both sides; None if too short to pay.

    Only on CPU: elsewhere it would copy the slots to the host.
    """
    if source.device.type != "cpu":
        return None
    breaks = ((source.diff() != 1) | (target.diff() != 1)).nonzero().flatten() + 1
    if (len(breaks) + 1) * MIN_RUN > len(source):
        return None
    edges = [0, *breaks.tolist(), len(source)]
    return [(a, int(source[a]), int(target[a]), b - a) for a, b in pairwise(edges)]


def _wide_rows(buffer: Tensor) -> Tensor:
    """``[rows, …]`` view of `buffer` in the widest element type that divides a row."""
    rows = buffer.view(len(buffer), -1)
    row_bytes = rows.shape[1] * rows.element_size()
    if rows.device.type != "cpu":
        return rows
    for width, dtype in _WIDE:
        if row_bytes % width == 0 and rows.data_ptr() % width == 0 and width > rows.element_size():
            return rows.view(dtype)
    return rows


def _check(
    k_buffers: Sequence[Tensor],
    v_buffers: Sequence[Tensor],
    source_slots: Tensor,
    target_slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    rotary_dim: int,
) -> None:
    check_factors(source_slots, target_slots, cos, sin, rotary_dim)
    if len(k_buffers) != len(v_buffers):
        raise ValueError(f"{len(k_buffers)} K buffers, {len(v_buffers)} V buffers")
    if any(k.shape[1:] != k_buffers[0].shape[1:] or k.shape[-1] < rotary_dim for k in k_buffers):
        raise ValueError(f"K buffers must share [kv_heads, head_dim] with head_dim >= {rotary_dim}")


def check_factors(source_slots: Tensor, target_slots: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> None:
    """ValueError unless slots are int64 [n] and the factors fp32 [n, rotary_dim / 2]."""
    n = source_slots.shape[0]
    if source_slots.dtype != torch.int64 or target_slots.dtype != torch.int64 or target_slots.shape != (n,):
        raise ValueError(f"slots must be int64 [n]: {source_slots.shape} {target_slots.shape} {source_slots.dtype}")
    if cos.shape != (n, rotary_dim // 2) or sin.shape != cos.shape or cos.dtype != torch.float32:
        raise ValueError(f"cos and sin must be fp32 [{n}, {rotary_dim // 2}]: {cos.shape} {sin.shape} {cos.dtype}")
