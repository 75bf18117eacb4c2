"""DepthMap: what was marked on a path is found on every path that goes through the mark, and on no other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_relay.index import DepthMap

BASE = 987654321987654321


def tokens(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_a_mark_counts_from_its_position_on() -> None:
    depths = DepthMap(BASE, 100)
    path = np.arange(50, dtype=np.int32)
    depths.mark("a", path, 20, 2)
    assert [depths.depth("a", path, length) for length in (0, 20, 21, 50)] == [0, 0, 2, 2]
    longer = np.concatenate((path, path))
    assert depths.depth("a", longer, 100) == 2
    assert depths.depth("b", path, 50) == 0
    assert depths.depth(None, path, 50) == 0


def test_tokens_after_the_mark_do_not_matter_and_those_before_do() -> None:
    depths = DepthMap(BASE, 100)
    path = np.arange(50, dtype=np.int32)
    depths.mark("a", path, 20, 1)
    branch = path.copy()
    branch[21:] = 7
    assert depths.depth("a", branch, 50) == 1
    for changed in range(21):
        other = path.copy()
        other[changed] += 1
        assert depths.depth("a", other, 50) == 0


def test_deepest_mark_wins_and_a_mark_never_gets_shallower() -> None:
    depths = DepthMap(BASE, 100)
    path = np.arange(10, dtype=np.int32)
    depths.mark("a", path, 2, 3)
    depths.mark("a", path, 5, 1)
    depths.mark("a", path, 2, 1)
    assert depths.depth("a", path, 10) == 3
    depths.mark("a", path, 7, 4)
    assert [depths.depth("a", path, n) for n in (2, 3, 7, 8)] == [0, 3, 3, 4]
    assert len(depths) == 3
    depths.mark("a", path, 0, 0)
    assert len(depths) == 3


def test_no_namespace_is_not_a_namespace_that_is_called_nothing() -> None:
    depths = DepthMap(BASE, 100)
    depths.mark("", tokens(1, 2), 0, 1)
    assert depths.depth(None, tokens(1, 2), 2) == 0
    depths.mark(None, tokens(1, 2), 0, 2)
    assert depths.depth("", tokens(1, 2), 2) == 1 and depths.depth(None, tokens(1, 2), 2) == 2


def test_clear_forgets() -> None:
    depths = DepthMap(BASE, 100)
    depths.mark("a", tokens(1), 0, 1)
    depths.clear()
    assert len(depths) == 0 and depths.depth("a", tokens(1), 1) == 0


def test_a_mark_in_use_survives_any_number_of_others() -> None:
    depths = DepthMap(BASE, 64)
    kept = np.arange(5, dtype=np.int32)
    depths.mark("a", kept, 4, 2)
    for i in range(1000):
        depths.mark("a", tokens(1000 + i), 0, 1)
        assert len(depths) <= 64
        if i % 16 == 0:
            assert depths.depth("a", kept, 5) == 2
            depths.check_integrity()


@pytest.mark.parametrize("total", [32, 33, 63, 64, 65, 100, 1000])
def test_the_last_half_of_the_entries_is_always_kept(total: int) -> None:
    depths = DepthMap(BASE, 64)
    for i in range(total):
        depths.mark("a", tokens(i), 0, 1)
        assert len(depths) <= 64 and depths.nbytes < 64 * 100
    assert all(depths.depth("a", tokens(i), 1) == 1 for i in range(total - 32, total))
    assert depths.depth("a", tokens(0), 1) == (total <= 64)


def test_a_deeper_mark_in_the_old_generation_outlives_a_shallower_young_one() -> None:
    depths = DepthMap(BASE, 8)
    path = tokens(5, 6, 7)
    depths.mark("a", path, 1, 4)
    for i in range(4):
        depths.mark("a", tokens(100 + i), 0, 1)
    depths.mark("a", path, 1, 1)
    assert depths.depth("a", path, 3) == 4
    for i in range(3):
        depths.mark("a", tokens(200 + i), 0, 1)
    assert depths.depth("a", path, 3) == 4


def test_a_depth_is_never_lost_between_generations() -> None:
    """Random marks and look-ups, against every mark that is one of the last ``entries / 2`` set or found."""
    entries, rng = 16, np.random.default_rng(5)
    depths, least, used = DepthMap(BASE, entries), dict[int, int](), list[int]()
    for _ in range(40_000):
        token, known = int(rng.integers(0, 24)), used[1 - entries // 2 :]
        before = least.get(token, 0) if token in known else 0
        if rng.random() < 0.5:
            depth = int(rng.integers(1, 5))
            depths.mark("a", tokens(token), 0, depth)
            least[token] = max(depth, before)
        elif (found := depths.depth("a", tokens(token), 1)) > 0:
            least[token] = found
            assert found >= before
        else:
            assert before == 0
            continue
        used = [t for t in used if t != token] + [token]
    depths.check_integrity()


@pytest.mark.parametrize("base", [BASE, 0, 1])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_never_less_than_the_truth(base: int, data: st.DataObject) -> None:
    """Exact under a random base; under a degenerate one collisions may only add depth."""
    depths, marks = DepthMap(base, 1000), {}
    paths = st.lists(st.integers(0, 1), min_size=1, max_size=8).map(tuple)
    for _ in range(data.draw(st.integers(1, 20))):
        path, name = data.draw(paths), data.draw(st.sampled_from(["a", "b"]))
        if data.draw(st.booleans()):
            position, depth = data.draw(st.integers(0, len(path) - 1)), data.draw(st.integers(1, 4))
            depths.mark(name, tokens(*path), position, depth)
            key = name, path[: position + 1]
            marks[key] = max(depth, marks.get(key, 0))
        else:
            length = data.draw(st.integers(0, len(path)))
            truth = max((marks.get((name, path[:n]), 0) for n in range(1, length + 1)), default=0)
            found = depths.depth(name, tokens(*path), length)
            assert found == truth if base == BASE else found >= truth
        depths.check_integrity()


def test_refuses_what_it_cannot_answer() -> None:
    depths = DepthMap(BASE, 10)
    with pytest.raises(ValueError, match="position"):
        depths.mark("a", tokens(1, 2), 2, 1)
    with pytest.raises(ValueError, match="position"):
        depths.mark("a", tokens(1, 2), -1, 1)
    with pytest.raises(ValueError, match="depth"):
        depths.mark("a", tokens(1, 2), 0, -1)
    with pytest.raises(ValueError, match="length"):
        depths.depth("a", tokens(1, 2), 3)
    with pytest.raises(ValueError, match="max_entries"):
        DepthMap(BASE, 1)
