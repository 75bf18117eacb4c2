"""The window table: which donor holds a window with this hash, and where.

A span is represented by its windows at multiples of the stride, and one that ends at its end. A stretch of text common
to prompt and span of `window + stride - 1` tokens or more contains such a window whole, so looking up every window of
the prompt finds it, at whatever offset it stands.

Popular windows are bounded, so that no lookup costs more than `BUCKET` proposals: at most `BUCKET` entries per hash,
and `PER_DONOR` of them from one donor (periodic text). A newcomer displaces the deepest donor's entry, among equals the
least recently used: fresh text is always found, and exact donors are not crowded out by their own copies.
"""

import numpy as np

from ._jit import kernel
from .rolling import table_key, window_hash
from .spans import DEPTH, USED
from .table import home, insert, remove

BUCKET = 8
PER_DONOR = 2

_SOURCE_BITS = 32
_SOURCE_MASK = (1 << _SOURCE_BITS) - 1
_EMPTY = np.uint64(0)


@kernel
def pack(slot: int, source: int) -> int:
    """Table value of a window that starts at path position `source` of the donor in row `slot`."""
    return (slot << _SOURCE_BITS) | source


@kernel
def unpack(value: int) -> tuple[int, int]:
    """`(slot, source)` of a table value."""
    return value >> _SOURCE_BITS, value & _SOURCE_MASK


@kernel
def count_windows(length: int, window: int, stride: int) -> int:
    """Number of windows that represent a span of `length >= window` tokens."""
    return (length - window) // stride + 1 + (1 if (length - window) % stride else 0)


@kernel
def add_windows(hashes, start, window, stride, factor, seed, slot, keys, values, rows):
    """Enter the windows of the span of `n` tokens whose prefix hashes are `hashes` (uint64 `[n + 1]`, counted from
    anywhere) and whose first token has path position `start`. `rows` are the donor rows; the table has room for all
    windows.

    Returns `(added, displaced, repeats)`: entries that the table gained, entries of other donors that gave way, windows
    left out because this donor has `PER_DONOR` with their hash already."""
    length = len(hashes) - 1
    capacity = len(keys)
    added, displaced, repeats = 0, 0, 0
    for i in range(count_windows(length, window, stride)):
        offset = min(i * stride, length - window)
        key = table_key(window_hash(hashes, offset, window, factor), seed)
        at = home(key, capacity)
        total, own, victim = 0, 0, -1
        victim_depth, victim_used = 0, 0
        while keys[at] != _EMPTY:
            if keys[at] == key:
                holder, _ = unpack(values[at])
                total += 1
                if holder == slot:
                    own += 1
                else:
                    depth, used = rows[holder, DEPTH], rows[holder, USED]
                    if victim < 0 or depth > victim_depth or (depth == victim_depth and used < victim_used):
                        victim, victim_depth, victim_used = at, depth, used
            at = at + 1 if at + 1 < capacity else 0
        if own >= PER_DONOR:
            repeats += 1
        elif total < BUCKET:
            insert(keys, values, key, pack(slot, start + offset))
            added += 1
        else:
            values[victim] = pack(slot, start + offset)
            displaced += 1
    return added, displaced, repeats


@kernel
def remove_windows(hashes, start, window, stride, factor, seed, slot, keys, values):
    """Undo `add_windows`; entries that were displaced or never added are passed over. Returns how many went."""
    length = len(hashes) - 1
    removed = 0
    for i in range(count_windows(length, window, stride)):
        offset = min(i * stride, length - window)
        key = table_key(window_hash(hashes, offset, window, factor), seed)
        removed += remove(keys, values, key, pack(slot, start + offset))
    return removed
