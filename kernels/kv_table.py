"""Addresses of a KV pool's per-layer buffers on the device, so that one launch can visit all layers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.uint8,  # converted in registers, see fp8.py
}


@dataclass(frozen=True, slots=True)
class KVTable:
    """The K and V buffers of some layers, and their addresses.

    Attributes:
        keys, values: per layer ``[slots, heads, dim]``, contiguous; one shape per kind, one dtype. Held, so that the
            addresses stay valid.
        key_pointers, value_pointers: int64 ``[layers]`` on the buffers' device.
        aligned: every row of every buffer starts at a multiple of 16 bytes, as 16-byte accesses need.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    key_pointers: Tensor
    value_pointers: Tensor
    aligned: bool

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's K and V in one layer."""
        return sum(_row_bytes(kind[0]) for kind in (self.keys, self.values))

    def layers(self, first: int, stop: int) -> "KVTable":
        """The table of layers ``[first, stop)`` of this one."""
        span = slice(first, stop)
        return KVTable(
            self.keys[span], self.values[span], self.key_pointers[span], self.value_pointers[span], self.aligned
        )


def kv_table(keys: Sequence[Tensor], values: Sequence[Tensor]) -> KVTable:
    """Build the table of a pool, once: it copies to the device and waits for it.

    Raises:
        ValueError: no layers, a dtype that no kernel knows, or buffers that differ in shape (within a kind), dtype or
            device, or are not contiguous.
    """
    if not keys or len(keys) != len(values):
        raise ValueError(f"{len(keys)} K buffers, {len(values)} V buffers")
    for buffer in (*keys, *values):
        if buffer.dtype != keys[0].dtype or buffer.device != keys[0].device:
            raise ValueError("all buffers must share dtype and device")
        if not buffer.is_contiguous() or buffer.dim() != 3:
            raise ValueError("buffers must be contiguous [slots, heads, dim]")
    for kind in (keys, values):
        if any(buffer.shape != kind[0].shape for buffer in kind):
            raise ValueError("buffers of one kind must share their shape")
    element_type(keys[0])
    pointers = torch.tensor([[b.data_ptr() for b in kind] for kind in (keys, values)], dtype=torch.int64)
    aligned = bool((pointers % 16 == 0).all()) and all(_row_bytes(kind[0]) % 16 == 0 for kind in (keys, values))
    pointers = pointers.to(keys[0].device)
    return KVTable(tuple(keys), tuple(values), pointers[0], pointers[1], aligned)


def new_rows(table: KVTable, layers: int, n: int) -> KVTable:
    """Uninitialised buffers of `n` rows, each row as long as in `table`.

    The addresses are computed on the device: copying them there would wait for it.
    """

    def kind(buffer: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        whole = buffer.new_empty((layers, n, *buffer.shape[1:]))
        pointers = torch.arange(layers, device=buffer.device) * (n * _row_bytes(buffer))
        return whole.unbind(), pointers + whole.data_ptr()

    (keys, key_pointers), (values, value_pointers) = kind(table.keys[0]), kind(table.values[0])
    # PyTorch's allocations start at multiples of 64 bytes, and rows are as long as the pool's.
    return KVTable(keys, values, key_pointers, value_pointers, table.aligned)


def _row_bytes(buffer: Tensor) -> int:
    return buffer.stride(0) * buffer.element_size()


def element_type(buffer: Tensor) -> tl.dtype:
    """How kernels read the buffer's elements.

    Raises:
        ValueError: a dtype that no kernel knows.
    """
    if buffer.dtype not in _ELEMENTS:
        raise ValueError(f"no kernel for KV of {buffer.dtype}")
    return _ELEMENTS[buffer.dtype]


@triton.jit
def layer_buffer(pointers, layer, ELEMENT: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to a layer's buffer; ALIGNED lets the compiler use 16-byte accesses."""
    pointer = tl.load(pointers + layer).to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer
