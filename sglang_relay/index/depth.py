"""How approximate the KV on a path is: a memory of which paths were relayed, from which position on, at which depth."""

import hashlib
from typing import NamedTuple

import numpy as np

from ._jit import kernel
from .content import as_tokens
from .rolling import MODULUS, mix, prefix_hashes, table_key
from .table import Table, home, insert

_EMPTY = np.uint64(0)


@kernel
def _get(keys, values, key):
    capacity = len(keys)
    at = home(key, capacity)
    while keys[at] != _EMPTY:
        if keys[at] == key:
            return at
        at = at + 1 if at + 1 < capacity else 0
    return -1


@kernel
def _raise(keys, values, key, depth):
    """Set the entry of `key` to `depth` or leave it deeper; returns the number of entries added (0 or 1)."""
    at = _get(keys, values, key)
    if at >= 0:
        values[at] = max(values[at], depth)
        return 0
    insert(keys, values, key, depth)
    return 1


@kernel
def _position_key(hashes, position, seed):
    return table_key(hashes[position + 1], seed ^ mix(np.uint64(position)))


@kernel
def _look_up(hashes, length, seed, keys, values, old_keys, old_values):
    """The deepest mark on the path, the position of the first one (`length` where there is none), and the slots of the
    marks that the old generation holds deeper, or alone."""
    deepest, first, hits = 0, length, 0
    places = np.empty(length, np.int64)
    for position in range(length):
        key = _position_key(hashes, position, seed)
        young = 0
        at = _get(keys, values, key)
        if at >= 0:
            young = values[at]
            deepest = max(deepest, young)
            first = min(first, position)
        at = _get(old_keys, old_values, key)
        if at >= 0 and old_values[at] > young:
            deepest = max(deepest, old_values[at])
            first = min(first, position)
            places[hits] = at
            hits += 1
    return deepest, first, places[:hits]


class Approximation(NamedTuple):
    """depth: the largest depth on a path, 0 where its KV is exact. start: from here on its KV is approximate; the
    path's length where it is exact."""

    depth: int
    start: int


class DepthMap:
    """Marks on token paths, keyed by namespace, position and the hash of the path up to and including that position.

    Tokens are not stored: a hash collision can report a depth that is not there, which costs a reuse, never a depth too
    small. Marks are kept in two generations of `max_entries / 2`: when the young one is full the old one is dropped and
    the young one becomes old; a mark that is set or found again is young again. So a mark is forgotten only after at
    least `max_entries / 2` others were set or found since its last use; choose `max_entries` above the number of
    requests whose KV the tree can hold at once. Deterministic and not thread-safe, as ContentIndex.
    """

    def __init__(self, base: int, max_entries: int) -> None:
        """`base`: of the rolling hash, secret and random. `max_entries`: at least 2."""
        if max_entries < 2:
            raise ValueError(f"max_entries={max_entries} leaves no room for two generations")
        self._base = np.uint64(base % MODULUS)
        self._share = max_entries // 2
        self.clear()

    def __len__(self) -> int:
        """Number of marks held; one that is in both generations counts twice."""
        return self._young.count + self._old.count

    @property
    def nbytes(self) -> int:
        return self._young.nbytes + self._old.nbytes

    def clear(self) -> None:
        """Forget all marks."""
        self._young, self._old = Table(), Table()

    def mark(self, namespace: str | None, tokens: np.ndarray, position: int, depth: int) -> None:
        """Note that in `namespace` the KV of the path `tokens` (int32 `[n]`) was computed at approximation `depth` from
        `position` on. Only tokens up to and including `position` identify the mark. Raises ValueError unless
        `0 <= position < n` and `depth >= 0`; depth 0 needs no mark."""
        position, depth = int(position), int(depth)
        if not 0 <= position < len(tokens) or depth < 0:
            raise ValueError(f"no mark of depth {depth} at position {position} of {len(tokens)} tokens")
        if depth:
            hashes = prefix_hashes(as_tokens(tokens[: position + 1]), self._base)
            self._put(np.uint64(_position_key(hashes, position, _namespace_seed(namespace))), depth)

    def depth(self, namespace: str | None, tokens: np.ndarray, length: int) -> int:
        """The largest depth of `look_up`."""
        return self.look_up(namespace, tokens, length).depth

    def look_up(self, namespace: str | None, tokens: np.ndarray, length: int) -> Approximation:
        """What is marked in `namespace` at positions below `length` of exactly this path. Raises ValueError if `length`
        exceeds the path: marks beyond the known tokens would be missed."""
        length = int(length)
        if not 0 <= length <= len(tokens):
            raise ValueError(f"length={length} is outside a path of {len(tokens)} tokens")
        if not len(self):
            return Approximation(0, length)
        hashes = prefix_hashes(as_tokens(tokens[:length]), self._base)
        young, old = self._young, self._old
        arguments = (young.keys, young.values, old.keys, old.values)
        deepest, first, places = _look_up(hashes, length, _namespace_seed(namespace), *arguments)
        for place in places:
            self._put(np.uint64(old.keys[place]), int(old.values[place]))
        return Approximation(int(deepest), int(first))

    def _put(self, key: np.uint64, depth: int) -> None:
        """Young again, and as deep as either generation has it: the old one is going to be dropped."""
        table, old = self._young, self._old
        if (at := _get(old.keys, old.values, key)) >= 0:
            depth = max(depth, int(old.values[at]))
        if table.count == self._share and _get(table.keys, table.values, key) < 0:
            self._old, self._young = table, Table()
            table = self._young
        needed = Table.slots_for(table.count + 1)
        if needed > table.capacity:
            table.resize(min(2 * table.capacity, Table.slots_for(self._share)))
        table.count += _raise(table.keys, table.values, key, depth)

    def check_integrity(self) -> None:
        """Raises AssertionError if a generation is over its share or its table is broken."""
        for table in (self._young, self._old):
            assert table.count <= self._share
            table.check_integrity()


def _namespace_seed(namespace: str | None) -> np.uint64:
    """The same in every process, unlike `hash`."""
    text = b"" if namespace is None else b"=" + namespace.encode("utf-8", "surrogatepass")
    return np.uint64(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little"))
