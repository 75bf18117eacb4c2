"""The multimap against a plain list, through growth, shrinking and deletion in crowded clusters."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_relay.index.table import MINIMUM, Table, find, home, insert, remove

# Keys whose homes are the first, the last and a middle slot, several each: clusters collide, touch and wrap around the
# end.
CROWDED = [(part << 56) | low for part in (0, 1, 127, 128, 254, 255) for low in range(1, 5)]
operations = st.lists(
    st.tuples(st.booleans(), st.sampled_from(CROWDED), st.integers(0, 3)) | st.integers(0, 40), max_size=120
)


@settings(max_examples=200, deadline=None)
@given(operations)
def test_behaves_as_a_multiset_of_pairs(steps) -> None:
    table, model = Table(), Counter()
    for step in steps:
        if isinstance(step, int):
            table.resize(Table.slots_for(table.count) + step)
        elif step[0]:
            if Table.slots_for(table.count + 1) > table.capacity:
                table.resize(Table.slots_for(table.count + 1))
            insert(table.keys, table.values, np.uint64(step[1]), step[2])
            table.count += 1
            model[step[1:]] += 1
        else:
            expected = int(model[step[1:]] > 0)
            assert remove(table.keys, table.values, np.uint64(step[1]), step[2]) == expected
            table.count -= expected
            model[step[1:]] -= expected
        table.check_integrity()
        assert Counter(table.entries()) == +model


def test_home_is_monotone_and_inside() -> None:
    keys = [0, 1, 1 << 31, 1 << 32, 1 << 40, 1 << 63, (1 << 64) - 1]
    for capacity in (64, 65, 1000, (1 << 31) - 1):
        homes = [home(np.uint64(key), capacity) for key in keys]
        assert homes == [(key >> 32) * capacity >> 32 for key in keys]
        assert homes == sorted(homes) and homes[-1] == capacity - 1


def test_removal_leaves_no_tombstones() -> None:
    table = Table()
    rng = np.random.default_rng(0)
    for _ in range(50):
        keys = rng.integers(1, 1 << 63, Table.slots_for(0) // 2, dtype=np.uint64)
        for key in keys:
            insert(table.keys, table.values, key, 7)
        for key in keys:
            assert remove(table.keys, table.values, key, 7) == 1
        assert not table.keys.any()


def test_integrity_check_sees_an_unreachable_entry() -> None:
    table = Table()
    insert(table.keys, table.values, np.uint64(5), 1)
    table.count = 1
    table.check_integrity()
    table.keys[[0, 2]] = table.keys[[2, 0]]
    table.values[[0, 2]] = table.values[[2, 0]]
    assert find(table.keys, table.values, np.uint64(5), 1) == -1
    with pytest.raises(AssertionError, match="unreachable"):
        table.check_integrity()


def test_never_more_than_five_eighths_full() -> None:
    assert Table.slots_for(0) == MINIMUM
    assert all(entries * 8 <= Table.slots_for(entries) * 5 for entries in range(1000))
