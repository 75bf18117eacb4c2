"""Token paths interned in shared, parent-linked, reference-counted blocks.

A path is a chain of blocks of `BLOCK` tokens; only the last may be shorter. Equal prefixes of one tenant share their
blocks, so siblings and the next turns of a conversation pay for what is new. A block is found by the hash of the whole
prefix that ends with it and believed only when its parent, its length and its tokens are equal; hence, within a tenant,
one path is one tail block. Tenants share nothing: what one of them stores must not change what another can keep.
"""

from typing import NamedTuple

import numpy as np

from ._jit import kernel
from .rolling import mix, table_key
from .table import SLOT_BYTES, Table, home, insert, remove

BLOCK = 64
BLOCK_BYTES = BLOCK * 4 + 4 + 4 + 4 + 8

_SHIFT = 6
_EMPTY = np.uint64(0)
# Mutable numbers that kernels change, in `BlockPool.state`.
_FREE, _FRESH, _LIVE = 0, 1, 2


class Chain(NamedTuple):
    """The longest interned prefix of a path: its last block (a negative root if there is none) and its number of
    blocks."""

    tail: int
    blocks: int


@kernel
def _find_chain(path, hashes, root, keys, values, tokens, parents, lengths):
    capacity = len(keys)
    seed = mix(np.uint64(-root))
    tail, count = root, 0
    while count * BLOCK < len(path):
        begin = count * BLOCK
        length = min(BLOCK, len(path) - begin)
        key = table_key(hashes[begin + length], seed)
        at = home(key, capacity)
        child = -1
        while keys[at] != _EMPTY:
            if keys[at] == key:
                block = values[at]
                if parents[block] == tail and lengths[block] == length:
                    same = 0
                    while same < length and tokens[block, same] == path[begin + same]:
                        same += 1
                    if same == length:
                        child = block
                        break
            at = at + 1 if at + 1 < capacity else 0
        if child < 0:
            break
        tail = child
        count += 1
    return tail, count


@kernel
def _append_chain(path, hashes, root, tail, count, keys, values, tokens, parents, lengths, references, hashed, state):
    seed = mix(np.uint64(-root))
    added = 0
    while count * BLOCK < len(path):
        begin = count * BLOCK
        length = min(BLOCK, len(path) - begin)
        block = state[_FREE]
        if block >= 0:
            state[_FREE] = parents[block]
        else:
            block = state[_FRESH]
            state[_FRESH] += 1
        for i in range(length):
            tokens[block, i] = path[begin + i]
        parents[block] = tail
        lengths[block] = length
        references[block] = 0
        hashed[block] = table_key(hashes[begin + length], seed)
        insert(keys, values, hashed[block], block)
        if tail >= 0:
            references[tail] += 1
        tail = block
        count += 1
        added += 1
    state[_LIVE] += added
    return tail


@kernel
def _release_chain(block, keys, values, parents, lengths, references, hashed, state):
    removed = 0
    while block >= 0:
        references[block] -= 1
        if references[block] > 0:
            break
        parent = parents[block]
        removed += remove(keys, values, hashed[block], block)
        lengths[block] = 0
        parents[block] = state[_FREE]
        state[_FREE] = block
        block = parent
    state[_LIVE] -= removed


@kernel
def list_blocks(tail, first, last, parents, into, offset):
    """Write the blocks with path indices `first..last` of the path that ends in `tail` (its index is `last`) to
    `into[offset:]`, in path order."""
    block = tail
    for index in range(last, first - 1, -1):
        into[offset + index - first] = block
        block = parents[block]


@kernel
def _read_path(tail, length, start, stop, tokens, parents):
    first, last = start >> _SHIFT, (length - 1) >> _SHIFT
    blocks = np.empty(last - first + 1, np.int64)
    list_blocks(tail, first, last, parents, blocks, 0)
    path = np.empty(stop - start, np.int32)
    for at in range(start, stop):
        path[at - start] = tokens[blocks[(at >> _SHIFT) - first], at & (BLOCK - 1)]
    return path


@kernel
def _same_start(stop, tail, length, other, other_length, tokens, parents):
    last = (stop - 1) >> _SHIFT
    for _ in range(((length - 1) >> _SHIFT) - last):
        tail = parents[tail]
    for _ in range(((other_length - 1) >> _SHIFT) - last):
        other = parents[other]
    if tail == other:
        return True
    if parents[tail] != parents[other]:
        return False
    at, rest = 0, stop - (last << _SHIFT)
    while at < rest and tokens[tail, at] == tokens[other, at]:
        at += 1
    return at == rest


class BlockPool:
    """Owner of all blocks. A block is referenced by each child block and by each `hold`; it is freed with the last one.

    tokens: int32 `[capacity, BLOCK]`; parents: int32 `[capacity]`, the previous block or, for a path's first block, the
    tenant's root `-1 - tenant` (a free block keeps the next free one here); lengths, references: int32 `[capacity]`.
    """

    def __init__(self) -> None:
        self.table = Table()
        self.clear()

    @staticmethod
    def blocks_of(length: int) -> int:
        """Number of blocks of a path of `length` tokens."""
        return -(-length // BLOCK)

    @staticmethod
    def bytes_for(capacity: int) -> int:
        """Bytes of a pool of `capacity` blocks, its table included."""
        return capacity * BLOCK_BYTES + Table.slots_for(capacity) * SLOT_BYTES

    @staticmethod
    def capacity_for(limit: int) -> int:
        """The largest capacity whose `bytes_for` is within `limit`."""
        capacity = limit // BLOCK_BYTES
        while capacity > 0 and BlockPool.bytes_for(capacity) > limit:
            # Each block has a table slot at least, so that much of the excess can go at once.
            capacity -= max(1, (BlockPool.bytes_for(capacity) - limit) // (BLOCK_BYTES + 2 * SLOT_BYTES))
        return capacity

    @property
    def capacity(self) -> int:
        return len(self.parents)

    @property
    def live(self) -> int:
        """Blocks in use."""
        return int(self.state[_LIVE])

    @property
    def nbytes(self) -> int:
        arrays = (self.tokens, self.parents, self.lengths, self.references, self._hashed)
        return sum(array.nbytes for array in arrays) + self.table.nbytes

    def clear(self) -> None:
        self.tokens = np.zeros((0, BLOCK), np.int32)
        self.parents = np.zeros(0, np.int32)
        self.lengths = np.zeros(0, np.int32)
        self.references = np.zeros(0, np.int32)
        self._hashed = np.zeros(0, np.uint64)
        self.state = np.array([-1, 0, 0], np.int64)
        self.table.clear()

    def grow(self, capacity: int) -> None:
        """Enlarge to `capacity` blocks. The arrays are extended in place, without a second copy of the tokens."""
        assert capacity >= self.capacity
        self.tokens.resize((capacity, BLOCK), refcheck=False)
        for array in (self.parents, self.lengths, self.references, self._hashed):
            array.resize(capacity, refcheck=False)
        if Table.slots_for(capacity) > self.table.capacity:
            self.table.resize(Table.slots_for(capacity))

    def find(self, path: np.ndarray, hashes: np.ndarray, tenant: int) -> Chain:
        """Longest prefix of `path` (int32 `[n]`, with its `prefix_hashes`) that is interned for `tenant`."""
        table = self.table
        arguments = (table.keys, table.values, self.tokens, self.parents, self.lengths)
        return Chain(*_find_chain(path, hashes, -1 - tenant, *arguments))

    def append(self, path: np.ndarray, hashes: np.ndarray, tenant: int, chain: Chain) -> int:
        """Intern the rest of `path` behind `chain = find(path, ...)`, which the caller has held since. Returns the
        path's tail, not yet held. The caller has seen to free blocks (`live`, `capacity`)."""
        before = self.live
        arguments = (self.table.keys, self.table.values, self.tokens, self.parents, self.lengths, self.references)
        tail = _append_chain(path, hashes, -1 - tenant, *chain, *arguments, self._hashed, self.state)
        self.table.count += self.live - before
        return int(tail)

    def hold(self, tail: int) -> None:
        """Keep the path that ends in `tail` until `release`; a root (negative) needs no holding."""
        if tail >= 0:
            self.references[tail] += 1

    def release(self, tail: int) -> None:
        """Undo one `hold`; blocks that nothing else references are freed."""
        before = self.live
        arguments = (self.table.keys, self.table.values, self.parents, self.lengths, self.references)
        _release_chain(tail, *arguments, self._hashed, self.state)
        self.table.count += self.live - before

    def read(self, tail: int, length: int, start: int, stop: int) -> np.ndarray:
        """A copy of tokens `[start, stop)` of the path of `length` tokens that ends in `tail`; int32 `[stop -
        start]`."""
        return _read_path(tail, length, start, stop, self.tokens, self.parents)

    def same_start(self, stop: int, tail: int, length: int, other: int, other_length: int) -> bool:
        """Whether the first `stop` tokens (at least 1) of two paths are equal; a path is given by its tail and length.
        Time is that of walking both paths' blocks behind `stop`."""
        return bool(_same_start(stop, tail, length, other, other_length, self.tokens, self.parents))

    def check_integrity(self, held: dict[int, int]) -> None:
        """`held` counts the holds per tail. Raises AssertionError unless every reference is accounted for, no block is
        both free and used, and no two blocks stand for the same path."""
        fresh = int(self.state[_FRESH])
        free, block = set(), int(self.state[_FREE])
        while block >= 0:
            assert block not in free and block < fresh, f"free list is broken at block {block}"
            free.add(block)
            block = int(self.parents[block])
        used = [block for block in range(fresh) if block not in free]
        assert len(used) == self.live == self.table.count, (len(used), self.live, self.table.count)
        assert self.table.capacity >= Table.slots_for(self.capacity)
        references = dict.fromkeys(used, 0)
        identities = set()
        for block in used:
            parent, length = int(self.parents[block]), int(self.lengths[block])
            if parent >= 0:
                assert parent in references, f"block {block} has a freed parent"
                assert self.lengths[parent] == BLOCK, f"block {block} stands behind a partial block"
                references[parent] += 1
            assert 0 < length <= BLOCK
            identities.add((parent, self.tokens[block, :length].tobytes()))
        assert len(identities) == len(used), "one path is interned twice"
        for tail, count in held.items():
            references[tail] += count
        for block, count in references.items():
            assert count == self.references[block] > 0, (
                f"block {block} has {self.references[block]} references, not {count}"
            )
        expected = sorted((int(self._hashed[block]), block) for block in used)
        assert sorted(self.table.entries()) == expected, "the table does not list the used blocks"
        self.table.check_integrity()
