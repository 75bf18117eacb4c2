"""Who holds how much of an index, and so whose donor makes room for another."""

import heapq
from collections import OrderedDict
from collections.abc import Hashable, Iterator

OWNER_BYTES = 768
"""What the dictionaries hold per owner."""


class Shares:
    """Donors by owner, each owner's in least-recently-used order. Deterministic, as ContentIndex.

    Room is made by who holds most: a flood of one owner's evicts its own donors, and those of nobody who holds less.
    """

    def __init__(self) -> None:
        self._donors: dict[Hashable, OrderedDict[int, int]] = {}
        self._bytes: dict[Hashable, int] = {}
        self._owner: dict[int, Hashable] = {}
        self._order: dict[Hashable, int] = {}
        self._next = 0
        self._heap: list[tuple[int, int, Hashable]] = []

    def __len__(self) -> int:
        """Number of owners."""
        return len(self._donors)

    def __iter__(self) -> Iterator[int]:
        """All donors."""
        return iter(self._owner)

    def add(self, donor: int, owner: Hashable, size: int) -> None:
        """`donor` takes `size` bytes; it is the most recently used of its owner's."""
        if owner not in self._donors:
            self._donors[owner], self._bytes[owner], self._order[owner] = OrderedDict(), 0, self._next
            self._next += 1
        self._donors[owner][donor] = size
        self._owner[donor] = owner
        self._weigh(owner, size)

    def use(self, donor: int) -> None:
        self._donors[self._owner[donor]].move_to_end(donor)

    def remove(self, donor: int) -> None:
        owner = self._owner.pop(donor)
        self._weigh(owner, -self._donors[owner].pop(donor))
        if not self._donors[owner]:
            del self._donors[owner], self._bytes[owner], self._order[owner]

    def held(self, owner: Hashable) -> int:
        """Bytes."""
        return self._bytes.get(owner, 0)

    def victim(self) -> int:
        """The least recently used donor of who holds most, of equal owners of the first. There must be one."""
        while True:
            negative, order, owner = self._heap[0]
            if self._order.get(owner) == order and self._bytes[owner] == -negative:
                return next(iter(self._donors[owner]))
            heapq.heappop(self._heap)  # of an earlier time

    def _weigh(self, owner: Hashable, change: int) -> None:
        self._bytes[owner] += change
        heapq.heappush(self._heap, (-self._bytes[owner], self._order[owner], owner))
        if len(self._heap) > 64 + 4 * len(self._donors):
            self._heap = [(-size, self._order[o], o) for o, size in self._bytes.items()]
            heapq.heapify(self._heap)

    def check_integrity(self) -> None:
        """Raises AssertionError if the books disagree."""
        assert self._donors.keys() == self._bytes.keys() == self._order.keys()
        assert {d: o for o, held in self._donors.items() for d in held} == self._owner
        assert self._bytes == {owner: sum(held.values()) for owner, held in self._donors.items()}
        assert all(held for held in self._donors.values())
        assert len(self._heap) <= 65 + 4 * len(self._donors)
