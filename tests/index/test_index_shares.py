"""Who makes room: the least recently used of who holds most, against a list that is searched each time."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sglang_relay.index import ContentIndex
from sglang_relay.index.shares import Shares

BASE = 555_555_555_555_555_555


@pytest.mark.parametrize("seed", range(4))
def test_as_searched(seed: int) -> None:
    rng, shares = random.Random(seed), Shares()
    held: dict[int, tuple[str, int]] = {}  # least recently used first
    came: list[str] = []  # owners, in the order in which they came
    for donor in range(5000):
        owner = rng.choice("aaaaabbbcd") + str(rng.randrange(3))
        size = rng.randrange(1, 50)
        if all(owner != other for other, _ in held.values()):
            came = [o for o in came if o != owner] + [owner]
        held[donor] = owner, size
        shares.add(donor, owner, size)
        if rng.random() < 0.5:
            used = rng.choice(list(held))
            shares.use(used)
            held[used] = held.pop(used)
        while sum(size for _, size in held.values()) > 1000:
            total = {o: sum(size for other, size in held.values() if other == o) for o in came}
            most = max(came, key=lambda o: (total[o], -came.index(o)))
            want = next(d for d, (o, _) in held.items() if o == most)
            assert shares.victim() == want
            shares.remove(want)
            del held[want]
            came = [o for o in came if any(o == other for other, _ in held.values())]
        assert shares.held(owner) == sum(size for other, size in held.values() if other == owner)
    shares.check_integrity()


def text(n: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(3, 50_000, n, dtype=np.int32)


def test_a_flood_takes_nothing_from_who_holds_less() -> None:
    """Of scopes, too: they are one owner's."""
    rng = np.random.default_rng(1)
    index = ContentIndex(base=BASE, max_bytes=1 << 20, owner_of=lambda tenant: tenant[0])  # type: ignore[index]
    path = text(20_000, rng)
    mine = [index.learn(("victim", None), None, path[:stop], stop - 500, stop, 0) for stop in range(500, 20_001, 500)]
    for number in range(3000):
        assert index.learn(("flood", str(number)), None, text(2000, rng), 0, 2000, 0) is not None
    assert index.stats()["evictions"] > 2000
    index.check_integrity()
    assert all(index.donor(donor) for donor in mine if donor is not None)
    runs = index.match(("victim", None), path)
    assert sum(run.stop - run.start for run in runs) >= len(path) - 500


def test_who_holds_most_makes_room_for_others() -> None:
    rng = np.random.default_rng(2)
    index = ContentIndex(base=BASE, max_bytes=1 << 20, owner_of=lambda tenant: tenant)
    while not index.stats()["evictions"]:
        index.learn("big", None, text(2000, rng), 0, 2000, 0)
    before = {index.learn("small", None, text(2000, rng), 0, 2000, 0) for _ in range(20)}
    for _ in range(500):
        index.learn("big", None, text(2000, rng), 0, 2000, 0)
    assert all(donor is not None and index.donor(donor) for donor in before)
