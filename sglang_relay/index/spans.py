"""Donor records: whose text it is, which span of which interned path, how deep, how recently used; and their eviction
order."""

from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

# Columns of `DonorRecords.rows`. HEAD and LISTED are scratch of a match, and -1 between matches.
TENANT, NAMESPACE, START, STOP, DEPTH, TAIL, USED, ID, HEAD, LISTED = range(10)
COLUMNS = 10

ROW_BYTES = COLUMNS * 8
# What the dictionaries hold per donor besides its row: two entries, a key of four integers, the id; its owner and size.
RECORD_BYTES = 768
_NAME_BYTES = 256
_OBJECT_BYTES = 64


@dataclass(frozen=True, slots=True)
class Donor:
    """A reusable span: tokens `[start, stop)` of a path computed in `namespace`, at approximation `depth` (0: exact
    context)."""

    tenant: Hashable
    namespace: str | None
    start: int
    stop: int
    depth: int


def _size(name: object) -> int:
    """Bytes a tenant or namespace key keeps alive, for the larger part; clients choose some of these strings. Not
    `sys.getsizeof`, whose answer for one string changes when its UTF-8 form is cached: the books would drift."""
    if isinstance(name, str):
        return len(name.encode("utf-8", "surrogatepass"))
    if isinstance(name, bytes):
        return len(name)
    if isinstance(name, tuple | frozenset):
        return sum(_OBJECT_BYTES + _size(part) for part in name)
    return 0


class Names:
    """Small integers for hashable names, reference-counted and reused. Assigned in call order, so alike in all
    processes."""

    def __init__(self) -> None:
        self._ids: dict[Hashable, int] = {}
        self._names: list[Any] = []
        self._references: list[int] = []
        self._free: list[int] = []
        self.nbytes = 0

    @staticmethod
    def cost(name: Hashable) -> int:
        """Bytes that holding `name` adds, if nobody holds it yet."""
        return _NAME_BYTES + _size(name)

    def get(self, name: Hashable) -> int | None:
        """The name's integer, or None if nobody holds the name."""
        return self._ids.get(name)

    def name(self, number: int) -> Any:
        """The name behind an integer that somebody holds."""
        return self._names[number]

    def acquire(self, name: Hashable) -> int:
        """Hold the name until `release`; returns its integer."""
        number = self._ids.get(name)
        if number is None:
            if self._free:
                number = self._free.pop()
                self._names[number] = name
            else:
                number = len(self._names)
                self._names.append(name)
                self._references.append(0)
            self._ids[name] = number
            self.nbytes += self.cost(name)
        self._references[number] += 1
        return number

    def release(self, number: int) -> None:
        """Undo one `acquire`; the integer of a name that nobody holds is reused."""
        self._references[number] -= 1
        if self._references[number] == 0:
            name = self._names[number]
            del self._ids[name]
            self._names[number] = None
            self._free.append(number)
            self.nbytes -= self.cost(name)

    def check_integrity(self, held: Counter[int]) -> None:
        """`held` counts the holds per integer."""
        assert sorted(self._ids.values()) == sorted(held), "names outlive their holders"
        assert all(self._references[number] == count for number, count in held.items())
        assert self.nbytes == sum(self.cost(name) for name in self._ids)


class DonorRecords:
    """All donors, as rows that kernels read, in least-recently-used order.

    rows: int64 `[capacity, COLUMNS]`; a row of a live donor never moves, and a free row has ID -1.
    """

    def __init__(self) -> None:
        self.tenants = Names()
        self.namespaces = Names()
        self._next_id = 0
        self._clock = 0
        self.clear()

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[int]:
        """Ids, least recently used first."""
        return iter(self._slots)

    def __contains__(self, donor: int) -> bool:
        return donor in self._slots

    @property
    def capacity(self) -> int:
        return len(self.rows)

    def clear(self, first_id: int = 0) -> None:
        """Drop all donors. Ids stay unique: none is ever given out twice, and none below `first_id` from now on."""
        self._next_id = max(self._next_id, first_id)
        self.tenants = Names()
        self.namespaces = Names()
        self.rows = np.full((0, COLUMNS), -1, np.int64)
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._same: dict[tuple[int, int, int, int], int] = {}
        self._free: list[int] = []
        self._fresh = 0

    def grow(self, capacity: int) -> None:
        before = self.capacity
        self.rows.resize((capacity, COLUMNS), refcheck=False)
        self.rows[before:] = -1

    def slot(self, donor: int) -> int:
        """Row of donor `donor`; KeyError if it is gone."""
        return self._slots[donor]

    def same(self, namespace: int, tail: int, start: int, stop: int) -> int | None:
        """Id of the donor with this span of this path in this namespace. The tail stands for path and tenant."""
        return self._same.get((namespace, tail, start, stop))

    def add(self, tenant: int, namespace: int, start: int, stop: int, depth: int, tail: int) -> int:
        """Record a donor, most recently used; it takes over the caller's holds on both names and the tail. Returns its
        id."""
        if self._free:
            slot = self._free.pop()
        else:
            slot = self._fresh
            self._fresh += 1
        donor = self._next_id
        self._next_id += 1
        self._clock += 1
        self.rows[slot] = (tenant, namespace, start, stop, depth, tail, self._clock, donor, -1, -1)
        self._slots[donor] = slot
        self._same[namespace, tail, start, stop] = donor
        return donor

    def refresh(self, donor: int, depth: int) -> None:
        """Make `donor` the most recently used, and at least as deep as `depth`."""
        self._clock += 1
        row = self.rows[self._slots[donor]]
        row[USED] = self._clock
        row[DEPTH] = max(row[DEPTH], depth)
        self._slots.move_to_end(donor)

    def remove(self, donor: int) -> None:
        """Drop the record, and its holds on both names; the tail is the caller's to release."""
        slot = self._slots.pop(donor)
        tenant, namespace, start, stop, _, tail = self.rows[slot, :USED].tolist()
        del self._same[namespace, tail, start, stop]
        self.tenants.release(tenant)
        self.namespaces.release(namespace)
        self.rows[slot] = -1
        self._free.append(slot)

    def describe(self, donor: int) -> Donor:
        """KeyError if the donor is gone."""
        tenant, namespace, start, stop, depth = self.rows[self._slots[donor], :TAIL].tolist()
        return Donor(self.tenants.name(tenant), self.namespaces.name(namespace), start, stop, depth)

    def check_integrity(self) -> None:
        live = list(self._slots.values())
        assert len(set(live)) == len(live) and not set(live) & set(self._free)
        assert len(live) + len(self._free) == self._fresh <= self.capacity
        assert self.rows[live, ID].tolist() == list(self._slots), "a row carries another donor's id"
        used = self.rows[live, USED].tolist()
        assert used == sorted(set(used)), "eviction order differs from the logical clock"
        assert (self.rows[:, (HEAD, LISTED)] == -1).all(), "a match left its scratch behind"
        dead = np.setdiff1d(np.arange(self.capacity), live)
        assert (self.rows[dead] == -1).all()
        keys = {
            tuple(self.rows[slot, [NAMESPACE, TAIL, START, STOP]].tolist()): donor
            for donor, slot in self._slots.items()
        }
        assert keys == self._same
        self.tenants.check_integrity(Counter(self.rows[live, TENANT].tolist()))
        self.namespaces.check_integrity(Counter(self.rows[live, NAMESPACE].tolist()))
