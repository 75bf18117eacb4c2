"""Work bounds under inputs made to hurt, counted in operations."""

import numpy as np
import pytest

from sglang_relay.index import ContentIndex, Run
from sglang_relay.index.match import BURST, CROWD
from sglang_relay.index.windows import BUCKET, PER_DONOR

BASE = 777_777_777_777_777_777


def periodic(period: int, length: int) -> np.ndarray:
    return np.resize(np.arange(period, dtype=np.int32), length)


def noise(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1000, 1 << 30, length, dtype=np.int32)


def worked(index: ContentIndex, prompt: np.ndarray) -> tuple[list[Run], dict[str, int]]:
    """Runs and the counters of one match."""
    before = index.stats()
    runs = index.match("t", prompt)
    index.check_integrity()
    return runs, {name: count - before[name] for name, count in index.stats().items()}


def check_bounds(work: dict[str, int], n: int) -> None:
    assert work["proposals"] <= BUCKET * n
    assert work["compared"] <= (BUCKET + 1) * n + BURST
    tried = work["confirmed"] + work["refuted"]
    assert tried + work["crowded"] + work["starved"] <= work["proposals"]


@pytest.mark.parametrize("base", [BASE, 0, 1], ids=["random", "zero", "one"])
@pytest.mark.parametrize("period", [1, 2, 7, 8, 16, 33])
def test_periodic_text_everywhere(period: int, base: int) -> None:
    """Every prompt position agrees with every donor on `length / period` diagonals."""
    index = ContentIndex(base=base)
    donors = 3 * BUCKET
    for i in range(donors):
        index.learn("t", None, np.concatenate((noise(10, i), periodic(period, 4000))), 10, 4010, 0)
    index.check_integrity()
    stats = index.stats()
    distinct = -(-period // np.gcd(period, 8)) + 1  # phases of the stride windows, and of the last one
    assert stats["windows"] <= BUCKET * distinct
    assert stats["repeats"] >= donors * (4000 // 8 - 1 - PER_DONOR * distinct)
    n = 20_000
    runs, work = worked(index, periodic(period, n))
    check_bounds(work, n)
    covered = np.zeros(n, bool)
    for run in runs:
        covered[run.start : run.stop] = True
    assert runs[0].stop - runs[0].start == 4000
    # The allowance may run dry on the way, but the prompt is not given up on.
    assert covered.mean() > 0.5
    # Without bounds every diagonal of every donor would have been compared.
    assert work["compared"] < n * 4000 * donors / period / 50


def test_runs_of_one_donor_over_one_position_are_bounded() -> None:
    index = ContentIndex(base=BASE, window=16, stride=1, min_run=16, alternatives=1000)
    index.learn("t", None, periodic(1, 3000), 0, 3000, 0)
    runs, work = worked(index, periodic(1, 2000))
    assert work["confirmed"] <= CROWD and work["crowded"] > 1000
    assert runs[0] == Run(0, 2000, 0, 0, 0)


def test_repeats_burn_no_more_than_their_share() -> None:
    """A text that only repeats, in front of and between real donors' text, hides none of it."""
    index = ContentIndex(base=BASE)
    for i in range(2 * BUCKET):
        index.learn("t", None, np.concatenate((noise(5, 100 + i), periodic(1, 3000))), 5, 3005, 0)
    real = [noise(500, 200 + i) for i in range(4)]
    donors = [index.learn("t", None, text, 0, 500, 0) or 0 for text in real]
    prompt = np.concatenate([part for text in real for part in (periodic(1, 10_000), text)])
    runs, work = worked(index, prompt)
    check_bounds(work, len(prompt))
    found = {run.donor: run for run in runs if run.donor in donors}
    for i, donor in enumerate(donors):
        run = found[donor]
        assert (run.source, run.stop - run.start) == (0, 500) and run.start == 10_000 + i * 10_500


def test_covered_diagonals_are_not_compared_again() -> None:
    index = ContentIndex(base=BASE)
    text = noise(8000, 1)
    index.learn("t", None, text, 0, 8000, 0)
    _, work = worked(index, text)
    assert work["confirmed"] == 1
    assert work["proposals"] == 8000 // 8 - 1
    blocks = 8000 // 64
    assert work["compared"] == 8000 + blocks


def test_many_holders_of_one_text() -> None:
    index = ContentIndex(base=BASE)
    text = noise(2000, 1)
    for i in range(200):
        index.learn("t", None, np.concatenate((noise(20, 10 + i), text)), 20, 2020, 0)
    n = len(text)
    runs, work = worked(index, text)
    check_bounds(work, n)
    assert len(runs) == index.alternatives
    assert [run.donor for run in runs] == [199, 198, 197, 196]
    assert work["compared"] <= BUCKET * (n + n // 64 + 2)


def test_the_allowance_ends_comparisons_that_nothing_else_ends() -> None:
    """Each of 64 donors holds the whole text and is proposed: a full bucket for each phase of their windows."""
    index = ContentIndex(base=BASE)
    text = noise(4000, 1)
    for i in range(8 * BUCKET):
        index.learn("t", None, np.concatenate((noise(i % 8, 10 + i), text)), 0, 4000 + i % 8, 0)
    n = len(text)
    runs, work = worked(index, text)
    check_bounds(work, n)
    assert work["starved"] > 0
    assert 8 * BUCKET * n > 2 * ((BUCKET + 1) * n + BURST)
    assert runs[0][:2] == (0, n)


def test_false_proposals_cost_one_window_at_most() -> None:
    """With base 1 a window hashes to the sum of its tokens: all these windows collide, none is equal."""
    rng = np.random.default_rng(0)
    index = ContentIndex(base=1, min_run=16)

    def shuffled() -> np.ndarray:
        return np.concatenate([rng.permutation(np.arange(16, dtype=np.int32)) for _ in range(60)])

    for _ in range(20):
        index.learn("t", None, shuffled(), 0, 960, 0)
    prompt = shuffled()
    runs, work = worked(index, prompt)
    assert runs == []
    assert work["refuted"] == work["proposals"] > 100
    walked = 20 * 15
    assert work["compared"] <= 16 * work["proposals"] + walked
    check_bounds(work, len(prompt))


def test_lookups_read_few_slots() -> None:
    """About four slots per absent key at 5/8 load, whatever was evicted before."""
    index = ContentIndex(base=BASE, max_bytes=1 << 20)
    for seed in range(300):
        index.learn("t", None, noise(1000, seed), 0, 1000, 0)
    assert index.stats()["evictions"] > 100
    _, work = worked(index, noise(20_000, 1000))
    assert work["proposals"] == 0
    assert work["probed"] < 6 * 20_000


def test_answers_are_bounded() -> None:
    pieces = [noise(40, i) for i in range(300)]
    index = ContentIndex(base=BASE)
    for i, piece in enumerate(pieces):
        index.learn("t", None, np.concatenate((noise(3, 1000 + i), piece)), 3, 43, 0)
    runs = index.match("t", np.concatenate(pieces))
    assert len(runs) == index.max_runs == 128
