"""An open-addressing multimap from 64-bit keys to 64-bit values, in two numpy arrays that kernels can use directly.

Linear probing from a slot that is monotone in the key's upper half, so any capacity works, not only powers of two; key
0 marks an empty slot. Deletion moves later entries back instead of leaving tombstones: a table that has seen many
evictions probes as fast as a new one.
"""

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ._jit import kernel

MINIMUM = 64
SLOT_BYTES = 16

_U32 = np.uint64(32)
_EMPTY = np.uint64(0)


@kernel
def home(key: np.uint64, capacity: int) -> int:
    """The slot where probing for `key` begins."""
    return np.int64(((key >> _U32) * np.uint64(capacity)) >> _U32)  # pyright: ignore[reportReturnType]


@intrinsic
def prefetch(typingctx, array, at):  # numba hands in the types; called in kernels as prefetch(array, at)
    """Ask the processor to load `array[at]` (1-d) into its cache. Lookups of unrelated keys in a table beyond the
    cache's size are several times faster when asked for some steps ahead."""

    def generate(context, builder, signature, arguments):
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.bitcast(builder.gep(array.data, [arguments[1]]), byte)
        function_type = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0i8")
        builder.call(function, [address, word(0), word(3), word(1)])  # for reading, into all levels, as data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@kernel
def insert(keys: np.ndarray, values: np.ndarray, key: np.uint64, value: int) -> None:
    """Add one entry; the caller has seen to a free slot (`Table.slots_for`)."""
    capacity = len(keys)
    at = home(key, capacity)
    while keys[at] != _EMPTY:
        at = at + 1 if at + 1 < capacity else 0
    keys[at] = key
    values[at] = value


@kernel
def find(keys: np.ndarray, values: np.ndarray, key: np.uint64, value: int) -> int:
    """Slot of the entry `(key, value)`, or -1."""
    capacity = len(keys)
    at = home(key, capacity)
    while keys[at] != _EMPTY:
        if keys[at] == key and values[at] == value:
            return at
        at = at + 1 if at + 1 < capacity else 0
    return -1


@kernel
def remove(keys: np.ndarray, values: np.ndarray, key: np.uint64, value: int) -> int:
    """Remove the entry `(key, value)`; returns how many entries went (0 or 1)."""
    hole = find(keys, values, key, value)
    if hole < 0:
        return 0
    capacity = len(keys)
    at = hole
    while True:
        at = at + 1 if at + 1 < capacity else 0
        if keys[at] == _EMPTY:
            break
        # An entry may move into the hole only if its probe sequence passes there; otherwise it would become
        # unreachable.
        travelled = at - home(keys[at], capacity)
        distance = at - hole
        if travelled < 0:
            travelled += capacity
        if distance < 0:
            distance += capacity
        if travelled >= distance:
            keys[hole] = keys[at]
            values[hole] = values[at]
            hole = at
    keys[hole] = _EMPTY
    return 1


@kernel
def _copy_entries(keys: np.ndarray, values: np.ndarray, new_keys: np.ndarray, new_values: np.ndarray) -> None:
    for at in range(len(keys)):
        if keys[at] != _EMPTY:
            insert(new_keys, new_values, keys[at], values[at])


class Table:
    """Owner of one multimap's arrays. Kernels that add or remove entries report the difference, and the owner adds it
    to `count`.

    keys: uint64 `[capacity]`, values: int64 `[capacity]`.
    """

    __slots__ = ("count", "keys", "values")

    def __init__(self) -> None:
        self.clear()

    @staticmethod
    def slots_for(entries: int) -> int:
        """Least capacity for `entries`: at most 5/8 full, where a search for an absent key reads four slots on
        average."""
        return max(MINIMUM, -(-entries * 8 // 5))

    @property
    def capacity(self) -> int:
        return len(self.keys)

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def clear(self) -> None:
        self.keys = np.zeros(MINIMUM, np.uint64)
        self.values = np.zeros(MINIMUM, np.int64)
        self.count = 0

    def resize(self, capacity: int) -> None:
        """Move all entries to arrays of `capacity` slots; for a moment both sets of arrays exist."""
        assert capacity >= self.slots_for(self.count)
        keys, values = np.zeros(capacity, np.uint64), np.zeros(capacity, np.int64)
        _copy_entries(self.keys, self.values, keys, values)
        self.keys, self.values = keys, values

    def entries(self) -> list[tuple[int, int]]:
        """All `(key, value)` pairs in slot order; for tests and integrity checks."""
        full = np.flatnonzero(self.keys)
        return list(zip(self.keys[full].tolist(), self.values[full].tolist(), strict=True))

    def check_integrity(self) -> None:
        """Raises AssertionError if the count is off, the table is overfull, or an entry cannot be reached from its
        home."""
        entries = self.entries()
        assert len(entries) == self.count, (len(entries), self.count)
        assert self.slots_for(self.count) <= self.capacity, (self.count, self.capacity)
        for key, value in entries:
            assert find(self.keys, self.values, np.uint64(key), value) >= 0, f"entry {key:x} is unreachable"
