"""Which tokens of a prompt an answer is about to quote, against the definition read token by token."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_relay.quotes import LONGEST, MOST_PLACES, PLACES, REACH, SHORTEST, may_quote, quoted

TEXT = np.array([9, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 1, 2, 3, 8, 8, 1, 2, 3, 5, 8], dtype=np.int32)
ALL = np.ones(len(TEXT), dtype=bool)


def test_what_follows_the_quote() -> None:
    assert quoted(TEXT, [7, 3, 4, 5], ALL, 2).tolist() == [7, 8]
    assert quoted(TEXT, [7, 3, 4, 5], ALL, 8).tolist() == [7, 8, 9]


def test_a_longer_agreement_reaches_further() -> None:
    text = np.arange(20, dtype=np.int32)
    reached = [quoted(text, [77, *range(6 - length, 6)], np.ones(20, dtype=bool), 8) for length in (2, 3, 4, 6)]
    assert [found.tolist() for found in reached] == [list(range(6, 6 + n)) for n in (1, 3, 5, 8)]


def test_of_several_places_the_latest_of_the_longest_and_the_first_others() -> None:
    """1 2 3 stands three times, with 9 9 before it twice."""
    assert quoted(TEXT, [4, 2, 3], ALL, 1).tolist() == [5, 20]
    assert quoted(TEXT, [4, 1, 2, 3], ALL, 1).tolist() == [5, 20]
    assert quoted(TEXT, [4, 9, 1, 2, 3], ALL, 1).tolist() == [5, 15]
    assert quoted(TEXT, [8, 9, 9, 1, 2, 3], ALL, 1).tolist() == [5, 15]
    known = ALL.copy()
    known[5] = False  # what follows at the first place needs nothing
    assert quoted(TEXT, [4, 1, 2, 3], known, 1).tolist() == [20]


@pytest.mark.parametrize("answer", [[], [3], [5, 4], [5, 8], [4, 3, 5, 8], [1, 2, 3, 11]])
def test_no_quote(answer: list[int]) -> None:
    """Too short, in another order, at the prompt's very end, or over."""
    assert quoted(TEXT, answer, ALL, 8).tolist() == []


def test_nothing_where_the_next_token_is_not_stale() -> None:
    stale = ALL.copy()
    stale[8] = False
    assert quoted(TEXT, [3, 4, 5], stale, 8).tolist() == [7, 9]
    stale[7] = False
    assert quoted(TEXT, [3, 4, 5], stale, 8).tolist() == []


def literal(tokens: list[int], answer: list[int], stale: list[bool], ahead: int) -> list[int]:
    places = []
    for end in range(len(tokens) - 1):
        length = 0
        while (
            length < min(LONGEST, len(answer))
            and end - length >= 0
            and tokens[end - length] == answer[len(answer) - 1 - length]
        ):
            length += 1
        if length >= SHORTEST:
            places.append((length, end))
    if len(places) > MOST_PLACES:
        places = [p for p in places if stale[p[1] + 1]][-MOST_PLACES:]
    found: set[int] = set()
    latest = max(places, default=None)
    others = sorted((p for p in places if p != latest), key=lambda place: (-place[0], place[1]))
    for length, end in [*([latest] if latest else []), *others][:PLACES]:
        if stale[end + 1]:
            reach = min(ahead, 1 + REACH * (length - SHORTEST))
            found |= {p for p in range(end + 1, end + 1 + reach) if p < len(tokens) and stale[p]}
    return sorted(found)


@given(st.data(), st.integers(0, 12))
def test_as_defined(data: st.DataObject, ahead: int) -> None:
    tokens = data.draw(st.lists(st.integers(0, 2), max_size=60))
    start = data.draw(st.integers(0, len(tokens)))
    answer = data.draw(st.lists(st.integers(0, 2), max_size=8)) + tokens[start : start + data.draw(st.integers(0, 25))]
    stale = data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    got = quoted(np.array(tokens, dtype=np.int32), answer, np.array(stale, dtype=bool), ahead)
    assert got.dtype == np.int64 and got.tolist() == literal(tokens, answer, stale, ahead)


@given(st.data(), st.integers(1, 3), st.integers(MOST_PLACES, 6 * MOST_PLACES))
def test_text_that_repeats_itself(data: st.DataObject, period: int, length: int) -> None:
    tokens = [at % period for at in range(length)]
    stale = np.random.default_rng(length).random(length) < data.draw(st.sampled_from([0.0, 0.01, 0.3, 1.0]))
    answer = tokens[: data.draw(st.integers(2, 20))]
    got = quoted(np.array(tokens, dtype=np.int32), answer, stale, 8)
    assert got.tolist() == literal(tokens, answer, stale.tolist(), 8)


@given(st.data())
def test_what_the_next_token_can_decide(data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=20))
    stale = data.draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    answer = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=6))
    text, mask = np.array(tokens, dtype=np.int32), np.array(stale, dtype=bool)
    decides = may_quote(text, answer[-1], mask)
    assert decides == any(t == answer[-1] and s for t, s in zip(tokens, stale[2:], strict=False))
    if not decides:
        assert all(not len(quoted(text, [*answer, token], mask, 8)) for token in range(4))
