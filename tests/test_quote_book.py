"""What prompts leave unrecomputed, and share with those that go on from them, against a model that knows each token."""

from __future__ import annotations

import itertools
import random
from array import array

import numpy as np
import pytest
import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_relay.engine.quote_book import REMEMBERED, QuoteBook, Quotes
from sglang_relay.engine.selection import Unselected

SLOT = 7
"""Slots are this many times the token."""


def request(tokens: list[int], prefix: int) -> Req:
    path = array("q", tokens)
    req = Req("", "", path, SamplingParams(max_new_tokens=1))
    req.full_untruncated_fill_ids, req.prefix_len, req.extra_key = path, prefix, "space"
    return req


class Model:
    """Every token is used once, so a token is a place in the tree. stale: those left unrecomputed, ever."""

    def __init__(self, rng: random.Random) -> None:
        self.book, self.rng = QuoteBook(), rng
        self.stale: dict[int, bool] = {}
        self.prompts: list[tuple[list[int], Quotes]] = []
        self._next = itertools.count(1)

    def place(self) -> None:
        """A prompt of its own, or one that goes on from the beginning of a recent one."""
        before: list[int] = []
        if self.prompts and self.rng.random() < 0.8:
            path, _ = self.rng.choice(self.prompts)
            before = path[: self.rng.randrange(1, len(path) + 1)]
        tokens = [*before, *itertools.islice(self._next, self.rng.randrange(3, 20))]
        req = request(tokens, len(before))
        found = self.book.found(req) if before else None
        assert (found is not None) == any(self.stale.get(t, False) for t in before)
        rest = [at for at in range(len(before), len(tokens)) if self.rng.random() < 0.5]
        self.stale.update(dict.fromkeys((tokens[at] for at in rest), True))
        slots = torch.tensor([SLOT * tokens[at] for at in rest], dtype=torch.int64)
        quotes = self.book.placed(req, found, Unselected(np.array(rest, dtype=np.int64), slots))
        self.prompts = [*self.prompts[1 - REMEMBERED :], (tokens, quotes)]

    def quote(self) -> None:
        tokens, quotes = self.rng.choice(self.prompts)
        start = self.rng.randrange(len(tokens))
        for at in quotes.wanted(tokens[start : start + self.rng.randrange(2, 8)], 8).tolist():
            assert self.stale[tokens[at]]
            self.stale[tokens[at]] = False

    def check(self) -> None:
        tokens, quotes = self.rng.choice(self.prompts)
        want = [self.stale.get(token, False) for token in tokens]
        assert quotes.stale().tolist() == want
        positions = np.flatnonzero(want)
        if len(positions):
            assert quotes.slots(positions).tolist() == [SLOT * tokens[at] for at in positions]


@pytest.mark.parametrize("seed", range(5))
def test_random_trees_of_prompts(seed: int) -> None:
    model = Model(random.Random(seed))
    model.place()
    for _ in range(4000):
        model.rng.choice((model.place, model.quote, model.quote, model.check))()


def test_a_conversation_of_any_length() -> None:
    """What a turn holds is its own prompt and the parts that are left of it: nothing of older turns is kept alive."""
    book, path, quotes = QuoteBook(), list(range(16_000)), None
    for turn in range(1, 1001):
        req = request(path[: 16 * turn], 16 * (turn - 1))
        found = book.found(req) if turn > 1 else None
        rest = np.arange(16 * turn - 8, 16 * turn)
        quotes = book.placed(req, found, Unselected(rest, torch.from_numpy(rest)))
    assert quotes is not None and len(quotes.parts) == 1000
    assert sum(part.count for part in quotes.parts) == 8 * 1000
    assert quotes.wanted(path[2:8], 8).tolist() == list(range(8, 16))
    assert not quotes.stale()[8:16].any() and quotes.stale()[24:32].all()
    again = book.found(request([*path, 5, 6], len(path)))
    assert again is not None and len(again.parts) == 999, "a part of which nothing is left goes"
