"""ContentIndex: learning, answers, order, eviction, bytes, errors."""

import itertools
import sys
from collections.abc import Hashable

import numpy as np
import pytest

from sglang_relay.index import ContentIndex, Donor, Run, warm_up

BASE = 1_234_567_890_123_456_789


def text(length: int, seed: int) -> np.ndarray:
    """Random tokens; two texts have no common window."""
    return np.random.default_rng(seed).integers(0, 1 << 30, length, dtype=np.int32)


def join(*pieces: np.ndarray) -> np.ndarray:
    return np.concatenate(pieces)


def learn(
    index: ContentIndex,
    path: np.ndarray,
    start: int,
    stop: int,
    *,
    tenant: Hashable = "t",
    namespace=None,
    depth: int = 0,
) -> int:
    donor = index.learn(tenant, namespace, path, start, stop, depth)
    index.check_integrity()
    assert donor is not None
    return donor


def test_finds_a_pasted_output_at_any_offset() -> None:
    index = ContentIndex(base=BASE)
    role, output = text(101, 1), text(400, 2)
    donor = learn(index, join(role, output), 101, 501)
    for offset in range(20):
        prompt = join(text(offset, 3), output, text(50, 4))
        assert index.match("t", prompt) == [Run(offset, offset + 400, donor, 101, 0)]


def test_finds_every_piece_of_an_output_and_only_inside_the_span() -> None:
    index = ContentIndex(base=BASE)
    path = text(1000, 1)
    donor = learn(index, path, 200, 800)
    prompt = join(path[150:300], text(7, 2), path[390:520], text(3, 3), path[700:900])
    assert sorted(index.match("t", prompt)) == [
        Run(50, 150, donor, 200, 0),
        Run(157, 287, donor, 390, 0),
        Run(290, 390, donor, 700, 0),
    ]


@pytest.mark.parametrize("cut", range(24))
def test_shortest_reported_run_is_min_run(cut: int) -> None:
    index = ContentIndex(base=BASE)
    path = text(300, 1)
    donor = learn(index, path, 0, 300)
    piece = path[100 + cut : 132 + cut]
    assert index.match("t", join(text(9, 2), piece, text(9, 3))) == [Run(9, 41, donor, 100 + cut, 0)]
    assert index.match("t", join(text(9, 2), piece[:-1], text(9, 3))) == []


def test_start_cuts_runs() -> None:
    index = ContentIndex(base=BASE)
    path = text(300, 1)
    donor = learn(index, path, 0, 300)
    prompt = join(text(10, 2), path[50:250])
    assert index.match("t", prompt, 10) == [Run(10, 210, donor, 50, 0)]
    assert index.match("t", prompt, 77) == [Run(77, 210, donor, 117, 0)]
    assert index.match("t", prompt, 178) == [Run(178, 210, donor, 218, 0)]
    assert index.match("t", prompt, 179) == []
    assert index.match("t", prompt, 210) == index.match("t", prompt, 1000) == index.match("t", prompt[:0]) == []


def test_span_end_is_found_whatever_its_length() -> None:
    for length in range(32, 64):
        index = ContentIndex(base=BASE, window=32, stride=8)
        path = text(length, 1)
        donor = learn(index, path, 0, length)
        assert index.match("t", join(text(5, 2), path[-32:])) == [Run(5, 37, donor, length - 32, 0)]


def test_tenants_never_meet() -> None:
    index = ContentIndex(base=BASE)
    path = text(300, 1)
    mine = learn(index, path, 0, 300, tenant=("salt", "a"))
    theirs = learn(index, path, 0, 300, tenant=("salt", "b"))
    assert index.match(("salt", "a"), path) == [Run(0, 300, mine, 0, 0)]
    assert index.match(("salt", "b"), path) == [Run(0, 300, theirs, 0, 0)]
    assert index.match(("salt", "c"), path) == []
    index.forget(mine)
    assert index.match(("salt", "a"), path) == []
    again = learn(index, text(300, 2), 0, 300, tenant="reuses the number of a")
    assert index.match("reuses the number of a", join(path, text(300, 2))) == [Run(300, 600, again, 0, 0)]


def test_a_busy_tenant_does_not_crowd_out_the_windows_of_another() -> None:
    index = ContentIndex(base=BASE)
    path = text(300, 1)
    mine = learn(index, path, 0, 300, tenant="a")
    for i in range(40):
        learn(index, join(text(5, 10 + i), path), 5, 305, tenant="b")
    assert index.match("a", path) == [Run(0, 300, mine, 0, 0)]


def test_namespaces_of_a_tenant_are_donors_to_each_other() -> None:
    index = ContentIndex(base=BASE)
    path = text(300, 1)
    exact, relayed = learn(index, path, 0, 300), learn(index, path, 0, 300, namespace="relay", depth=1)
    assert exact != relayed
    assert index.match("t", path) == [Run(0, 300, exact, 0, 0), Run(0, 300, relayed, 0, 1)]
    assert index.donor(relayed) == Donor("t", "relay", 0, 300, 1)


def test_order_is_depth_then_length_then_recency_then_start() -> None:
    index = ContentIndex(base=BASE)
    a, b, c = text(200, 1), text(100, 2), text(100, 3)
    deep = learn(index, join(text(3, 9), a, b), 3, 303, depth=2)
    long = learn(index, join(text(5, 8), a), 5, 205)
    older = learn(index, c, 0, 100)
    newer = learn(index, join(text(40, 7), c), 40, 140)
    prompt = join(c, a, b, c)
    expected = [
        Run(100, 300, long, 5, 0),
        Run(0, 100, newer, 40, 0),
        Run(400, 500, newer, 40, 0),
        Run(0, 100, older, 0, 0),
        Run(400, 500, older, 0, 0),
        Run(100, 400, deep, 3, 2),
    ]
    assert index.match("t", prompt) == expected
    index.touch(older)
    index.check_integrity()
    recent = [run for run in index.match("t", prompt) if run.donor in (older, newer)]
    assert [run.donor for run in recent] == [older, older, newer, newer]


def test_alternatives_are_the_best_few() -> None:
    index = ContentIndex(base=BASE, alternatives=3)
    piece = text(200, 1)
    donors = [learn(index, join(text(50, 10 + i), piece), 50, 250, depth=i % 2) for i in range(6)]
    assert [run.donor for run in index.match("t", piece)] == [donors[4], donors[2], donors[0]]
    index.forget(donors[2])
    assert [run.donor for run in index.match("t", piece)] == [donors[4], donors[0], donors[5]]


def test_deeper_text_around_does_not_use_up_the_alternatives() -> None:
    index = ContentIndex(base=BASE, alternatives=2)
    piece = text(200, 1)
    deep = learn(index, piece, 0, 200, depth=1)
    longer, shorter = learn(index, piece[50:110].copy(), 0, 60), learn(index, piece[55:105].copy(), 0, 50)
    assert index.match("t", piece) == [Run(50, 110, longer, 0, 0), Run(55, 105, shorter, 0, 0), Run(0, 200, deep, 0, 1)]


def test_a_donor_is_no_alternative_to_itself() -> None:
    index = ContentIndex(base=BASE)
    piece = text(200, 1)
    donor = learn(index, join(piece, text(30, 2), piece[50:150]), 0, 330)
    assert index.match("t", piece) == [Run(0, 200, donor, 0, 0)]
    assert index.stats()["confirmed"] == 2
    assert index.match("t", piece[:150]) == [Run(0, 150, donor, 0, 0)]


def test_distinct_text_comes_before_second_choices() -> None:
    pieces = [text(40 + i, i) for i in range(8)]
    index = ContentIndex(base=BASE, max_runs=10)
    for copy in range(4):
        for i, piece in enumerate(pieces):
            learn(index, join(text(20, 100 + 10 * copy + i), piece), 20, 60 + i)
    runs = index.match("t", join(*pieces))
    assert len(runs) == 10
    assert len({run.start for run in runs}) == 8
    assert [run.stop - run.start for run in runs] == [47, 47, 47, 46, 45, 44, 43, 42, 41, 40]


def test_popular_text_keeps_exact_donors_and_the_newest() -> None:
    index = ContentIndex(base=BASE, alternatives=100)
    piece = text(200, 1)
    exact = [learn(index, join(text(50, 10 + i), piece), 50, 250) for i in range(3)]
    deep = [learn(index, join(text(50, 100 + i), piece), 50, 250, depth=1) for i in range(30)]
    found = [run.donor for run in index.match("t", piece)]
    assert found[:3] == exact[::-1]
    assert found[3] == deep[-1]
    assert index.stats()["displaced"] > 0


def test_exact_duplicate_refreshes() -> None:
    index = ContentIndex(base=BASE)
    path = text(500, 1)
    first, second = learn(index, path, 100, 300), learn(index, path, 100, 301)
    assert second == first + 1
    before = index.stats()
    assert learn(index, path, 100, 300, depth=2) == first
    assert learn(index, path[:300], 100, 300) == first  # tokens behind the span are no part of a donor
    after = index.stats()
    assert after["refreshed"] == 2
    assert [after[key] for key in ("donors", "blocks", "windows", "bytes")] == [
        before[key] for key in ("donors", "blocks", "windows", "bytes")
    ]
    assert index.donor(first).depth == 2
    assert learn(index, path, 100, 300, tenant="u") > second
    assert learn(index, path, 101, 300) > second
    changed = path.copy()
    changed[0] += 1
    assert learn(index, changed, 100, 300) > second


def test_next_turns_and_siblings_share_blocks() -> None:
    index = ContentIndex(base=BASE)
    history = text(64 * 100, 1)
    learn(index, join(history, text(64, 2)), 6400, 6464)
    assert index.stats()["blocks"] == 101
    for sibling in range(8):
        learn(index, join(history, text(64, 10 + sibling)), 6400, 6464)
    assert index.stats()["blocks"] == 109
    grown = index.stats()["bytes"]
    learn(index, join(history, text(64, 10), text(128, 30)), 6464, 6592)
    assert index.stats()["blocks"] == 111
    assert index.stats()["bytes"] - grown < 64 * 100 * 4


def test_short_spans_are_not_learnt() -> None:
    index = ContentIndex(base=BASE, window=16, min_run=32)
    assert index.learn("t", None, text(100, 1), 10, 41, 0) is None
    assert ContentIndex(base=BASE, window=40, min_run=32).learn("t", None, text(100, 1), 10, 49, 0) is None
    assert len(index) == 0 and index.stats()["bytes"] == ContentIndex(base=BASE).nbytes
    learn(index, text(100, 1), 10, 42)


def test_evicts_the_least_recently_used() -> None:
    index = ContentIndex(base=BASE, max_bytes=64 << 10)
    donors = []
    while index.stats()["evictions"] == 0:
        donors.append(learn(index, text(200, len(donors)), 100, 200))
    assert len(donors) > 10
    with pytest.raises(KeyError):
        index.donor(donors[0])
    index.match("t", text(200, 1))  # looking does not count as use
    index.touch(donors[2])
    for seed in range(1000, 1003):
        donors.append(learn(index, text(200, seed), 100, 200))
    gone = [donor for donor in donors if donor not in {*surviving(index, donors)}]
    assert gone == [donors[0], donors[1], donors[3], donors[4]]
    assert index.match("t", text(200, 1)) == []
    assert index.match("t", text(200, 2)) == [Run(100, 200, donors[2], 100, 0)]


def surviving(index: ContentIndex, donors: list[int]) -> list[int]:
    alive = []
    for donor in donors:
        try:
            index.donor(donor)
        except KeyError:
            continue
        alive.append(donor)
    return alive


@pytest.mark.parametrize("limit", [28_000, 60_000, 200_000])
def test_bytes_stay_bounded_and_are_used(limit: int) -> None:
    index = ContentIndex(base=BASE, max_bytes=limit)
    rng = np.random.default_rng(5)
    peak = 0
    for step in range(150):
        length = int(rng.integers(40, 400))
        start = int(rng.integers(0, length - 32))
        namespace = f"namespace {step % 7} " * 5
        index.learn(f"tenant {step % 5}", namespace, text(length, step), start, length, step % 3)
        if step % 10 == 9:
            index.check_integrity()  # also: the books equal the arrays
        assert index.nbytes <= limit
        peak = max(peak, index.nbytes)
    assert index.stats()["evictions"] > 0
    assert limit * 0.6 < peak <= limit


def test_makes_room_when_the_mix_of_work_changes() -> None:
    """Many small spans make the tables large; long paths with small spans need blocks instead, and the other way
    round."""
    index = ContentIndex(base=BASE, max_bytes=200_000)
    for seed in range(40):
        learn(index, text(300, seed), 0, 300)
    for seed in range(100, 106):
        path = text(8000, seed)
        donor = learn(index, path, 7900, 8000)
        assert index.match("t", path) == [Run(7900, 8000, donor, 7900, 0)]
    for seed in range(200, 216):
        path = text(4000, seed)
        donor = learn(index, path, 0, 4000)
        assert index.match("t", path) == [Run(0, 4000, donor, 0, 0)]


def test_oversized_donor_is_refused_and_evicts_nobody() -> None:
    index = ContentIndex(base=BASE, max_bytes=64 << 10)
    kept = learn(index, text(200, 1), 0, 200)
    assert index.learn("t", None, text(20_000, 2), 19_900, 20_000, 0) is None
    assert index.learn("t" * 10_000, None, text(200, 3), 0, 200, 0) is None
    assert index.stats()["oversized"] == 2 and index.stats()["evictions"] == 0
    index.check_integrity()
    assert index.match("t", text(200, 1)) == [Run(0, 200, kept, 0, 0)]


def test_path_is_the_key_of_the_tree() -> None:
    index = ContentIndex(base=BASE)
    path = text(500, 1)
    donor = learn(index, path, 130, 400)
    for stop in (0, 1, 63, 64, 65, 130, 399, 400):
        tokens = index.path(donor, stop)
        assert tokens.dtype == np.int32 and (tokens == path[:stop]).all()
    tokens = index.path(donor, 400)
    tokens[:] = 0  # a copy
    assert (index.path(donor, 400) == path[:400]).all()
    for stop in (-1, 401):
        with pytest.raises(ValueError, match="outside"):
            index.path(donor, stop)
    index.forget(donor)
    with pytest.raises(KeyError):
        index.path(donor, 10)


def test_forgetting() -> None:
    index = ContentIndex(base=BASE)
    donors = [learn(index, text(100, i), 0, 100, namespace=f"n{i % 3}", depth=i % 2) for i in range(12)]
    index.forget(donors[0])
    index.check_integrity()
    index.forget(donors[0])
    index.touch(donors[0])  # staleness is harmless
    assert index.forget_where(lambda donor: donor.namespace == "n1") == 4
    index.check_integrity()
    assert surviving(index, donors) == [donor for i, donor in enumerate(donors) if i % 3 != 1 and i]
    index.clear()
    index.check_integrity()
    assert len(index) == 0 and index.nbytes == ContentIndex(base=BASE).nbytes
    assert learn(index, text(100, 0), 0, 100) > donors[-1]


def test_other_arrays_are_converted_and_inputs_not_kept() -> None:
    index = ContentIndex(base=BASE)
    path = text(300, 1)
    frozen = path.copy()
    frozen.flags.writeable = False
    donor = learn(index, frozen, 0, 300)
    for given in (path.astype(np.int64), frozen, np.repeat(path, 2)[::2], path.tolist()):
        assert index.match("t", given) == [Run(0, 300, donor, 0, 0)]
    learnt = path[::-1].copy()
    donor = learn(index, learnt, 0, 300)
    learnt[:] = 0
    assert index.match("t", path[::-1]) == [Run(0, 300, donor, 0, 0)]


def test_negative_tokens_are_tokens() -> None:
    index = ContentIndex(base=BASE)
    path = np.random.default_rng(1).integers(-(1 << 31), 1 << 31, 300, dtype=np.int64).astype(np.int32)
    donor = learn(index, path, 0, 300)
    assert index.match("t", join(path[:1], path)) == [Run(1, 301, donor, 0, 0)]


def test_bad_arguments_are_refused() -> None:
    index = ContentIndex(base=BASE)
    path = text(100, 1)
    for start, stop, depth in ((-1, 50, 0), (60, 50, 0), (0, 101, 0), (0, 50, -1)):
        with pytest.raises(ValueError, match="span"):
            index.learn("t", None, path, start, stop, depth)
    with pytest.raises(ValueError, match="start"):
        index.match("t", path, -1)
    for name in ("window", "stride", "min_run", "max_runs", "alternatives"):
        with pytest.raises(ValueError, match="at least 1"):
            ContentIndex(base=BASE, **{name: 0})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_bytes"):
        ContentIndex(base=BASE, max_bytes=8000)


@pytest.mark.parametrize(("window", "stride", "min_run"), list(itertools.product((1, 5, 16), (1, 4, 30), (1, 32))))
def test_any_window_and_stride_are_sound(window: int, stride: int, min_run: int) -> None:
    index = ContentIndex(base=BASE, window=window, stride=stride, min_run=min_run)
    path = text(300, 1)
    donor = learn(index, path, 7, 300)
    least = max(min_run, window + stride - 1)
    prompt = join(text(3, 2), path[100 : 100 + least], text(3, 3))
    assert index.match("t", prompt) == [Run(3, 3 + least, donor, 100, 0)]


@pytest.mark.parametrize("position", [0, 62, 63, 64, 100, 127, 128, 190, 250])
def test_donors_become_as_deep_as_what_is_computed_under_them(position: int) -> None:
    """Those of the same tenant, namespace and tokens up to there, and no others; none becomes shallower."""
    index = ContentIndex(base=BASE)
    path, size = text(300, 1), 120
    other = join(path[: position + 1], text(300 - position - 1, 2))
    elsewhere = path.copy()
    elsewhere[position] += 1
    same = [learn(index, path, stop - size, stop, namespace="a") for stop in (140, 200, 251, 300)]
    branch = learn(index, other, 150, 300, namespace="a")
    deep = learn(index, path, 60, 290, namespace="a", depth=3)
    rest = [
        learn(index, path, 150, 300, namespace="b"),
        learn(index, path, 150, 300, namespace="a", tenant="u"),
        learn(index, elsewhere, 100, 300, namespace="a"),
    ]
    reached = [donor for donor in same if index.donor(donor).stop > position]
    assert index.deepen("t", "a", path, position, 2) == len(reached) + 1
    index.check_integrity()
    assert {d: index.donor(d).depth for d in same} == {d: 2 if d in reached else 0 for d in same}
    assert index.donor(branch).depth == 2 and index.donor(deep).depth == 3
    assert [index.donor(d).depth for d in rest] == [0, 0, 0]
    assert index.deepen("t", "nobody", path, position, 2) == index.deepen("x", "a", path, position, 2) == 0


def test_what_is_found_is_as_deep_as_it_has_become() -> None:
    index = ContentIndex(base=BASE)
    path = text(300, 1)
    learn(index, path, 100, 300, namespace="a")
    index.deepen("t", "a", path, 90, 2)
    assert [run.depth for run in index.match("t", path[100:200])] == [2]


@pytest.mark.parametrize("seed", range(4))
def test_forks_become_as_deep_as_their_trunk(seed: int) -> None:
    """Trees of paths, each compared with the path that was computed again, token by token."""
    rng = np.random.default_rng(seed)
    index, donors, paths = ContentIndex(base=BASE), {}, [text(int(rng.integers(40, 400)), seed)]
    for number in range(150):
        trunk = paths[int(rng.integers(len(paths)))]
        cut = int(rng.integers(0, len(trunk)))
        paths.append(join(trunk[:cut], text(int(rng.integers(33, 200)), 1000 * seed + number)))
        donors[learn(index, paths[-1], max(0, len(paths[-1]) - 100), len(paths[-1]), namespace="n")] = paths[-1]
    depths = dict.fromkeys(donors, 0)
    for _ in range(60):
        path = paths[int(rng.integers(len(paths)))]
        position, depth = int(rng.integers(len(path))), int(rng.integers(1, 5))
        begin = path[: position + 1].tolist()
        reached = [d for d, p in donors.items() if p[: position + 1].tolist() == begin and depths[d] < depth]
        assert index.deepen("t", "n", path, position, depth) == len(reached)
        depths |= dict.fromkeys(reached, depth)
        assert {donor: index.donor(donor).depth for donor in donors} == depths
    index.check_integrity()


@pytest.mark.parametrize("head", [0, 500])
def test_deepening_takes_no_call_per_donor(head: int) -> None:
    """A step that relays waits for it, and an index holds tens of thousands of donors behind one system prompt."""
    warm_up()
    index, shared, counts = ContentIndex(base=BASE), text(head, 1), []
    for number in range(2000):
        index.learn("t", "n", join(shared, text(60, 10 + number)), head, head + 60, 0)
        if number in (9, 1999):
            calls: list[str] = []
            sys.setprofile(lambda frame, event, _, calls=calls: calls.append(event))
            try:
                index.deepen("t", "n", join(shared, text(60, 3)), head + 5, 1)
            finally:
                sys.setprofile(None)
            counts.append(len(calls))
    assert counts[1] <= counts[0] + 5
