"""Move cached K and V of all layers to new slots and turn the keys to their new positions: one launch.

For `n` tokens, `L` layers, K and V rows of `b_k` and `b_v` bytes, and `z` key elements that carry positions per row:

    bytes moved  ``2 n L (b_k + b_v)`` between pool and registers, and ``4 n L z / heads`` of factors, mostly from L2
    FLOPs        ``3 n L z`` in fp32 (fp8: and two conversions per element)

Overlap. Programs run in any order, so a target slot that is also another row's source could be overwritten before it
is read. A relay copies from slots the tree owns to slots the request owns: the two are disjoint, the planner knows it
on the host, and one launch does all. Where the caller cannot promise that, rows go through a staging buffer: one
launch reads every source of a group of layers, later ones write the targets, on the same stream. That moves twice the
bytes.

`realign.realign` is the reference, and what serves CPU tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fp8 import decode_e4m3, encode_e4m3, native_fp8
from .kv_table import KVTable, element_type, layer_buffer, new_rows
from .realign import check_factors

STAGE_BYTES = 256 << 20
"""Most bytes of staging buffer; layers are staged in groups that fit, at least one at a time."""


@triton.jit
def _turn(a, b, cos, sin):
    """Rotate pairs (a, b); a pair whose rotation is the identity keeps its bits (x * 1 - y * 0 turns -0 into 0)."""
    x, y = a.to(tl.float32), b.to(tl.float32)
    return x * cos - y * sin, y * cos + x * sin


@triton.jit
def _load(pointers, mask, FP8: tl.constexpr, NATIVE: tl.constexpr):
    raw = tl.load(pointers, mask, other=0)
    if FP8:
        return raw, decode_e4m3(raw, NATIVE)
    else:
        return raw, raw.to(tl.float32)


@triton.jit
def _store(pointers, raw, value, still, mask, FP8: tl.constexpr, NATIVE: tl.constexpr):
    """Write `value` in the buffer's dtype, or the bits as they were where the rotation is the identity."""
    if FP8:
        tl.store(pointers, tl.where(still, raw, encode_e4m3(value, NATIVE)), mask)
    else:
        tl.store(pointers, tl.where(still, raw, value.to(raw.dtype)), mask)


@triton.jit
def _copy(source, target, rows_from, rows_to, live, first, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Words ``[first, first + BLOCK)`` of each row, as they are."""
    cols = first + tl.arange(0, BLOCK)
    mask = live[:, None] & (cols < WORDS)[None, :]
    words = tl.load(source + rows_from[:, None] * WORDS + cols[None, :], mask)
    tl.store(target + rows_to[:, None] * WORDS + cols[None, :], words, mask)


# Left out of the specialisation: values that vary from call to call, each of which would compile once more.
@triton.jit(
    do_not_specialize=["n"], do_not_specialize_on_alignment=["k_from", "v_from", "source_slots", "target_slots"]
)
def realign_kernel(
    k_from,
    v_from,
    k_to,
    v_to,
    source_slots,
    target_slots,
    cos,
    sin,
    n,
    ELEMENT: tl.constexpr,
    FP8: tl.constexpr,
    NATIVE: tl.constexpr,
    ALIGNED: tl.constexpr,
    NEOX: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS_HERE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    WORD: tl.constexpr,
    V_WORDS: tl.constexpr,
    V_BLOCK: tl.constexpr,
    V_BLOCKS_HERE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (rows, layer, part): parts below ``HEADS / HEADS_HERE`` turn a group of key heads, the others copy V.

    k_from, v_from, k_to, v_to: int64 [layers], addresses of each layer's buffer. source_slots, target_slots: int64 [n].
    cos, sin: fp32 [n, HALF].
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    layer = tl.program_id(1)
    part = tl.program_id(2)
    live = rows < n
    source = tl.load(source_slots + rows, live, other=0)
    target = tl.load(target_slots + rows, live, other=0)
    if part < HEADS // HEADS_HERE:
        # Slot times row length passes 2^31 in a large pool: slots are int64, and so are the offsets.
        row: tl.constexpr = HEADS * HEAD_DIM
        here = part * HEADS_HERE * HEAD_DIM
        k_source = layer_buffer(k_from, layer, ELEMENT, ALIGNED) + here
        k_target = layer_buffer(k_to, layer, ELEMENT, ALIGNED) + here
        pairs = tl.arange(0, HALF_BLOCK)
        mask = live[:, None] & (pairs < HALF)[None, :]
        factor = rows[:, None] * HALF + pairs[None, :]
        c = tl.load(cos + factor, mask, other=1.0)
        s = tl.load(sin + factor, mask, other=0.0)
        still = (c == 1.0) & (s == 0.0)
        read = source[:, None] * row
        write = target[:, None] * row
        for head in tl.static_range(HEADS_HERE):
            at = head * HEAD_DIM
            if NEOX:
                first = at + pairs[None, :]
                second = at + HALF + pairs[None, :]
                a_raw, a = _load(k_source + read + first, mask, FP8, NATIVE)
                b_raw, b = _load(k_source + read + second, mask, FP8, NATIVE)
                x, y = _turn(a, b, c, s)
                _store(k_target + write + first, a_raw, x, still, mask, FP8, NATIVE)
                _store(k_target + write + second, b_raw, y, still, mask, FP8, NATIVE)
            else:
                cols = tl.arange(0, 2 * HALF_BLOCK)
                wide = live[:, None] & (cols < 2 * HALF)[None, :]
                raw, value = _load(k_source + read + at + cols[None, :], wide, FP8, NATIVE)
                a, b = tl.split(tl.reshape(value, (ROWS, HALF_BLOCK, 2)))
                x, y = _turn(a, b, c, s)
                turned = tl.reshape(tl.join(x, y), (ROWS, 2 * HALF_BLOCK))
                both = tl.reshape(tl.join(still, still), (ROWS, 2 * HALF_BLOCK))
                _store(k_target + write + at + cols[None, :], raw, turned, both, wide, FP8, NATIVE)
            for start in tl.static_range(2 * HALF, HEAD_DIM, REST_BLOCK):
                rest = start + tl.arange(0, REST_BLOCK)
                wide = live[:, None] & (rest < HEAD_DIM)[None, :]
                tail = at + rest[None, :]
                tl.store(k_target + write + tail, tl.load(k_source + read + tail, wide), wide)
    else:
        v_source = layer_buffer(v_from, layer, WORD, ALIGNED)
        v_target = layer_buffer(v_to, layer, WORD, ALIGNED)
        v_first = (part - HEADS // HEADS_HERE) * V_BLOCKS_HERE
        for block in tl.static_range(V_BLOCKS_HERE):
            _copy(v_source, v_target, source, target, live, (v_first + block) * V_BLOCK, V_WORDS, V_BLOCK)


@triton.jit(
    do_not_specialize=["n"], do_not_specialize_on_alignment=["from_table", "to_table", "source_slots", "target_slots"]
)
def copy_rows_kernel(
    from_table,
    to_table,
    source_slots,
    target_slots,
    n,
    WORD: tl.constexpr,
    ALIGNED: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (rows, layer, block of words): rows of one kind, as they are."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < n
    source = tl.load(source_slots + rows, live, other=0)
    target = tl.load(target_slots + rows, live, other=0)
    _copy(
        layer_buffer(from_table, tl.program_id(1), WORD, ALIGNED),
        layer_buffer(to_table, tl.program_id(1), WORD, ALIGNED),
        source,
        target,
        live,
        tl.program_id(2) * BLOCK,
        WORDS,
        BLOCK,
    )


def realign_on_device(
    table: KVTable,
    source_slots: Tensor,
    target_slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    neox: bool,
    rotary_dim: int,
    disjoint: bool = False,
) -> None:
    """Copy rows `source_slots` to rows `target_slots` in every layer; turn the copied keys by (`cos`, `sin`).

    Args:
        table: the pool; bfloat16, float16, float32 or float8_e4m3fn, any head dimension. fp8 needs no scale here: the
            rotation is linear, and both slots of a layer share one. A turned fp8 element past 448 saturates.
        source_slots: int64 ``[n]``.
        target_slots: int64 ``[n]``, distinct.
        cos, sin: fp32 ``[n, rotary_dim // 2]``, contiguous: rotation by (target - source position), unit norm.
        neox: pair element i with i + rotary_dim / 2 (NeoX) instead of 2i with 2i + 1 (GPT-J).
        rotary_dim: leading elements of each head that carry positions; the rest are copied.
        disjoint: no target slot is a source slot. False is always right, and moves twice the bytes.

    V, the elements past `rotary_dim`, and key pairs whose rotation is the identity (cos 1, sin 0) keep their bits.
    Nothing waits for the device; slots are not checked against the buffers (the planner does, on the host).

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    check_factors(source_slots, target_slots, cos, sin, rotary_dim)
    if rotary_dim > table.keys[0].shape[2]:
        raise ValueError(f"rotary_dim {rotary_dim} does not fit head_dim {table.keys[0].shape[2]}")
    n = len(source_slots)
    if n == 0:
        return
    if disjoint:
        _launch(table, table, source_slots, target_slots, cos, sin, neox, rotary_dim)
        return
    layers = len(table.keys)
    group = min(layers, max(1, STAGE_BYTES // (n * table.row_bytes)))
    stage = new_rows(table, group, n)
    rows = torch.arange(n, device=source_slots.device)
    for first in range(0, layers, group):
        part = table.layers(first, first + group)
        _launch(part, stage, source_slots, rows, cos, sin, neox, rotary_dim)
        copy_rows(stage, part, rows, target_slots)


def word_type(row_bytes: int) -> tl.dtype:
    """The widest integer type up to 4 bytes that divides a row."""
    return tl.int32 if row_bytes % 4 == 0 else tl.int16 if row_bytes % 2 == 0 else tl.int8


def launch_options(key: Tensor, value: Tensor, *, neox: bool, rotary_dim: int, native: bool, aligned: bool) -> dict:
    """Constants of `realign_kernel` for a pool with such buffers."""
    heads, dim = key.shape[1:]
    half = rotary_dim // 2
    fp8 = key.dtype == torch.float8_e4m3fn
    word = word_type(value.stride(0) * value.element_size())
    words = value.stride(0) * value.element_size() * 8 // word.primitive_bitwidth
    half_block = triton.next_power_of_2(half)
    rest_block = triton.next_power_of_2(max(1, min(dim - rotary_dim, half, 32)))
    # One 16-byte vector per thread, load and pair half: enough in flight, few registers.
    tile = 4 * 32 * 16 // key.element_size()
    v_block = min(128, triton.next_power_of_2(words))
    return {
        "ELEMENT": element_type(key),
        "FP8": fp8,
        "NATIVE": native,
        "ALIGNED": aligned,
        "NEOX": neox,
        "HEADS": heads,
        "HEADS_HERE": max(h for h in range(1, min(heads, 8) + 1) if heads % h == 0),
        "HEAD_DIM": dim,
        "HALF": half,
        "HALF_BLOCK": half_block,
        "REST_BLOCK": rest_block,
        "WORD": word,
        "V_WORDS": words,
        "V_BLOCK": v_block,
        "V_BLOCKS_HERE": min(4, triton.cdiv(words, v_block)),
        "ROWS": max(1, min(32, tile // half_block)),
    }


def _launch(
    source: KVTable,
    target: KVTable,
    source_slots: Tensor,
    target_slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    neox: bool,
    rotary_dim: int,
) -> None:
    key, value = source.keys[0], source.values[0]
    options = launch_options(
        key,
        value,
        neox=neox,
        rotary_dim=rotary_dim,
        native=native_fp8(key.device),
        aligned=source.aligned and target.aligned,
    )
    parts = options["HEADS"] // options["HEADS_HERE"]
    parts += triton.cdiv(options["V_WORDS"], options["V_BLOCK"] * options["V_BLOCKS_HERE"])
    n = len(source_slots)
    realign_kernel[(triton.cdiv(n, options["ROWS"]), len(source.keys), parts)](
        source.key_pointers,
        source.value_pointers,
        target.key_pointers,
        target.value_pointers,
        source_slots,
        target_slots,
        cos,
        sin,
        n,
        num_warps=4,
        **options,
    )


def copy_rows(source: KVTable, target: KVTable, source_slots: Tensor, target_slots: Tensor) -> None:
    """Copy rows of every layer of `target` from the same layer of `source`, as they are: one launch for K, one for V.

    source_slots, target_slots: int64 ``[n]``; no row that is written may be one that is read.
    """
    n = len(source_slots)
    if n == 0:
        return
    for buffer, read, write in (
        (target.keys[0], source.key_pointers, target.key_pointers),
        (target.values[0], source.value_pointers, target.value_pointers),
    ):
        row_bytes = buffer.stride(0) * buffer.element_size()
        word = word_type(row_bytes)
        words = row_bytes * 8 // word.primitive_bitwidth
        block = min(128, triton.next_power_of_2(words))
        copy_rows_kernel[(triton.cdiv(n, 16), len(target.keys), triton.cdiv(words, block))](
            read,
            write,
            source_slots,
            target_slots,
            n,
            WORD=word,
            ALIGNED=source.aligned and target.aligned,
            WORDS=words,
            BLOCK=block,
            ROWS=16,
            num_warps=4,
        )
