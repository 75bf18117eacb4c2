"""Plans: clipping, covering against brute force, and the bounds check that stands before every kernel."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_relay.plan import Candidate, Decline, Pending, Placed, RelayPlan, Segment, cover

POOL_SLOTS = 1000


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    found = []
    for donor in range(draw(st.integers(0, 8))):
        start = draw(st.integers(0, 60))
        found.append(Candidate(start, start + draw(st.integers(1, 40)), donor, draw(st.integers(0, 99)), donor % 3))
    return found


@given(candidates(), st.integers(0, 70), st.integers(0, 70))
def test_clip_keeps_the_tokens_it_names(found: list[Candidate], start: int, stop: int) -> None:
    for c in found:
        part = c.clip(start, stop)
        inside = range(max(c.start, start), min(c.stop, stop))
        assert list(range(part.start, part.stop)) == list(inside)
        if inside:
            assert (part.donor, part.depth) == (c.donor, c.depth)
            # Every token that stays keeps its place in the donor's path.
            assert part.source - part.start == c.source - c.start


def covered_by_hand(found: list[Candidate], start: int, stop: int, min_length: int, limit: int) -> dict[int, Candidate]:
    """Position -> candidate, token by token: each candidate in turn takes what is free, in long enough runs."""
    owner: dict[int, Candidate] = {}
    chosen = 0
    for c in found:
        for run in free_runs(range(max(start, c.start), min(stop, c.stop)), owner):
            if len(run) >= min_length and chosen < limit:
                chosen += 1
                owner |= dict.fromkeys(run, c)
    return owner


def free_runs(positions: range, owner: dict[int, Candidate]) -> Iterator[list[int]]:
    run: list[int] = []
    for at in positions:
        if at in owner:
            if run:
                yield run
            run = []
        else:
            run.append(at)
    if run:
        yield run


@given(candidates(), st.integers(0, 40), st.integers(0, 90), st.integers(1, 12), st.integers(0, 6))
def test_cover_is_what_trying_every_token_gives(
    found: list[Candidate], start: int, length: int, min_length: int, limit: int
) -> None:
    stop = start + length
    pieces = cover(found, start, stop, min_length, limit)
    want = covered_by_hand(found, start, stop, min_length, limit)
    got = {at: piece for piece in pieces for at in range(piece.start, piece.stop)}
    assert got.keys() == want.keys()
    assert len(got) == sum(p.stop - p.start for p in pieces), "pieces overlap"
    assert pieces == sorted(pieces) and len(pieces) <= limit
    for at, piece in got.items():
        assert piece.donor == want[at].donor
        assert piece.source + at - piece.start == want[at].source + at - want[at].start


def test_cover_takes_the_best_candidate_first_and_fills_the_gaps_with_the_rest() -> None:
    best, wide = Candidate(20, 40, 1, 100, 0), Candidate(0, 60, 2, 500, 1)
    assert cover([best, wide], 0, 60, 8, 9) == [
        Candidate(0, 20, 2, 500, 1),
        Candidate(20, 40, 1, 100, 0),
        Candidate(40, 60, 2, 540, 1),
    ]
    assert cover([best, wide], 15, 45, 8, 9) == [best], "rests of 5 tokens are shorter than 8"
    assert cover([best, wide], 0, 60, 8, 2) == [Candidate(0, 20, 2, 500, 1), best]
    assert cover([wide], 0, 7, 8, 9) == []


# ---------------------------------------------------------------------- the bounds check


def segment(start: int, stop: int, **changes: object) -> Segment:
    slots = torch.arange(1, max(stop - start, 0) + 1)
    made = Segment(start=start, stop=stop, source=5, depth=1, slots=slots, exact=False, end=stop, index=0)
    return replace(made, **changes)  # type: ignore[arg-type]


def plan(*segments: Segment, prefix: int = 10, stop: int = 100) -> RelayPlan:
    return RelayPlan(row=0, prefix=prefix, stop=stop, segments=segments, budget=None, last=True)


@pytest.mark.parametrize(
    "good",
    [
        plan(),
        plan(segment(10, 99)),
        plan(segment(10, 40), segment(40, 99)),
        plan(segment(98, 99)),
        plan(segment(10, 12, slots=torch.tensor([1, POOL_SLOTS - 1]))),
        plan(segment(10, 12, slots=torch.tensor([7, 3]))),
        plan(segment(10, 12, source=0)),
        plan(segment(50, 99, end=400)),
    ],
)
def test_plans_within_bounds_pass(good: RelayPlan) -> None:
    good.check(POOL_SLOTS)


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(plan(segment(9, 20)), id="starts before the prefix"),
        pytest.param(plan(segment(60, 100)), id="takes the chunk's last row"),
        pytest.param(plan(segment(60, 130)), id="reaches beyond the chunk"),
        pytest.param(plan(segment(30, 30, slots=torch.tensor([], dtype=torch.int64))), id="empty"),
        pytest.param(plan(segment(30, 20, slots=torch.tensor([], dtype=torch.int64))), id="negative length"),
        pytest.param(plan(segment(20, 40), segment(39, 60)), id="overlap"),
        pytest.param(plan(segment(50, 60), segment(20, 30)), id="not sorted"),
        pytest.param(plan(segment(20, 30, source=-1)), id="negative source"),
        pytest.param(plan(segment(20, 30, end=29)), id="ends before it stops"),
        pytest.param(plan(segment(20, 30, slots=torch.arange(1, 10))), id="a slot too few"),
        pytest.param(plan(segment(20, 30, slots=torch.arange(1, 12))), id="a slot too many"),
        pytest.param(plan(segment(20, 22, slots=torch.tensor([1, 2], dtype=torch.int32))), id="int32 slots"),
        pytest.param(plan(segment(20, 22, slots=torch.tensor([1.0, 2.0]))), id="float slots"),
        pytest.param(plan(segment(20, 22, slots=torch.tensor([0, 2]))), id="the padding slot"),
        pytest.param(plan(segment(20, 22, slots=torch.tensor([4, -3]))), id="negative slot"),
        pytest.param(plan(segment(20, 22, slots=torch.tensor([4, POOL_SLOTS]))), id="slot beyond the pool"),
        pytest.param(plan(segment(20, 30), segment(40, 42, slots=torch.tensor([1, 1 << 40]))), id="in a later segment"),
    ],
)
def test_every_kind_of_bad_plan_is_refused_by_name(bad: RelayPlan) -> None:
    with pytest.raises(Decline) as refused:
        bad.check(POOL_SLOTS)
    assert refused.value.reason == "bad_plan"
    assert str(refused.value) != "bad_plan", "the text says what is wrong"


def waiting(start: int, *placed: tuple[int, int], tokens: int | None = None) -> RelayPlan:
    """Chunk [200, 260) of a prompt whose earlier chunks have placed spans from ``start`` on."""
    spans = tuple(Placed(a, b, b, 0) for a, b in placed)
    content = np.zeros(200 - start if tokens is None else tokens, dtype=np.int32)
    return replace(plan(prefix=200, stop=260), pending=Pending(start, spans, content))


def test_a_repair_that_waited_begins_where_the_first_span_was_placed() -> None:
    made = waiting(50, (50, 90), (120, 199))
    made.check(POOL_SLOTS)
    assert (made.first, plan(prefix=200, stop=260).first) == (50, 200)


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(waiting(50, (40, 90)), id="placed before it begins"),
        pytest.param(waiting(50, (50, 90), (80, 120)), id="overlap"),
        pytest.param(waiting(50, (50, 200)), id="covers the last row of an earlier chunk"),
        pytest.param(waiting(50, (60, 60)), id="empty"),
        pytest.param(waiting(50, (50, 90), tokens=149), id="a token too few"),
    ],
)
def test_a_bad_repair_that_waited_is_refused(bad: RelayPlan) -> None:
    with pytest.raises(Decline, match="bad_plan"):
        bad.check(POOL_SLOTS)
