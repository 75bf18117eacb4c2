"""The whole index against brute force, after every step of random histories."""

import numpy as np
import pytest
from brute_force import Span, check_cover, check_runs
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_relay.index import ContentIndex

BASE = 555_555_555_555_555_555
WINDOW, STRIDE, MIN_RUN = 4, 3, 7

# Texts are put together from snippets of earlier texts and of fresh tokens, so that common stretches are frequent, of
# any length, and at any offset; a small alphabet adds periodic and accidental ones.
alphabets = st.sampled_from([1, 2, 3, 8, 1000])


@st.composite
def texts(draw, earlier: list[np.ndarray]) -> np.ndarray:
    pieces = []
    for _ in range(draw(st.integers(1, 4))):
        if earlier and draw(st.booleans()):
            source = draw(st.sampled_from(earlier))
            begin = draw(st.integers(0, len(source)))
            pieces.append(source[begin : begin + draw(st.integers(0, 60))])
        else:
            seed, length = draw(st.integers(0, 1 << 30)), draw(st.integers(0, 90))
            pieces.append(np.random.default_rng(seed).integers(0, draw(alphabets), length, dtype=np.int32))
    return np.concatenate(pieces)


def complete(index: ContentIndex) -> bool:
    """Whether no bound has left anything out so far."""
    stats = index.stats()
    return not any(stats[name] for name in ("displaced", "repeats", "crowded", "starved", "passed"))


class OneKeySpace(ContentIndex):
    """All tenants' windows under the same keys: only the comparison of tenants keeps them apart."""

    @staticmethod
    def _seed(tenant_number: int) -> np.uint64:
        return np.uint64(7)


def test_tenants_whose_keys_collide_still_never_meet() -> None:
    index = OneKeySpace(base=BASE)
    text = np.random.default_rng(1).integers(0, 1 << 30, 300, dtype=np.int32)
    spans = [Span(index.learn(tenant, None, text, 0, 300, 0) or 0, tenant, text, 0, 300) for tenant in "ab"]
    for span in spans:
        assert [run.donor for run in index.match(span.tenant, text)] == [span.donor]


HISTORIES = [
    pytest.param(ContentIndex, BASE, id="random-base"),
    pytest.param(OneKeySpace, BASE, id="shared-keys"),
    pytest.param(ContentIndex, 0, id="base-zero"),
    pytest.param(ContentIndex, 1, id="base-one"),
]


@pytest.mark.parametrize(("kind", "base"), HISTORIES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_histories(kind: type[ContentIndex], base: int, data: st.DataObject) -> None:
    """A base of 0 hashes a window by its last token, a base of 1 by the sum of its tokens: nearly all proposals are
    wrong then, and the answers must be right all the same."""
    max_bytes = data.draw(st.sampled_from([32_000, 44_000, 1 << 20]))
    index = kind(base=base, window=WINDOW, stride=STRIDE, min_run=MIN_RUN, max_bytes=max_bytes, max_runs=10_000)
    spans: list[Span] = []  # least recently used first
    seen: list[np.ndarray] = []
    tenants = st.sampled_from(["a", "b"])
    for _ in range(data.draw(st.integers(1, 10))):
        action = data.draw(st.sampled_from(["learn", "learn", "match", "match", "touch", "forget"]))
        if action == "learn":
            path, tenant = data.draw(texts(seen)), data.draw(tenants)
            start = data.draw(st.integers(0, len(path)))
            stop = data.draw(st.integers(start, len(path)))
            donor = index.learn(tenant, None, path, start, stop, 0)
            seen.append(path)
            if stop - start < MIN_RUN:
                assert donor is None
            elif donor is not None:
                spans = [span for span in spans if span.donor != donor]
                spans.append(Span(donor, tenant, path, start, stop))
            # What was evicted is the least recently used.
            spans = spans[len(spans) - len(index) :]
        elif action == "match":
            prompt, tenant = data.draw(texts(seen)), data.draw(tenants)
            begin = data.draw(st.integers(0, len(prompt)))
            runs = index.match(tenant, prompt, begin)
            check_runs(runs, prompt, spans, tenant, begin, MIN_RUN)
            if complete(index):
                check_cover(runs, prompt, spans, tenant, begin, max(MIN_RUN, WINDOW + STRIDE - 1))
        elif spans:
            span = spans.pop(data.draw(st.integers(0, len(spans) - 1)))
            if action == "touch":
                index.touch(span.donor)
                spans.append(span)
            else:
                index.forget(span.donor)
        index.check_integrity()
        assert len(index) == len(spans)
        for span in spans:
            assert (index.path(span.donor, span.stop) == span.path[: span.stop]).all()


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_missed_in_text_without_repeats(seed: int) -> None:
    """As above, on inputs where no bound bites, so completeness is never waived."""
    rng = np.random.default_rng(seed)
    index = ContentIndex(base=BASE, window=WINDOW, stride=STRIDE, min_run=MIN_RUN)
    spans: list[Span] = []
    for _ in range(6):
        path = rng.integers(0, 1 << 30, int(rng.integers(30, 300)), dtype=np.int32)
        if spans:  # quote one earlier text: two donors of the same words
            quoted = spans[int(rng.integers(len(spans)))].path
            cut = np.sort(rng.integers(0, len(quoted), 2))
            path = np.concatenate((path[:20], quoted[cut[0] : cut[1]], path[20:]))
        start, stop = 5, len(path) - 3
        donor = index.learn("a", None, path, start, stop, 0)
        assert donor is not None
        spans.append(Span(donor, "a", path, start, stop))
    covered = 0
    for _ in range(20):
        pieces = []
        for _ in range(8):
            path = spans[int(rng.integers(len(spans)))].path
            begin = int(rng.integers(0, len(path)))
            pieces.append(path[begin : begin + int(rng.integers(0, 40))])
            pieces.append(rng.integers(0, 1 << 30, int(rng.integers(0, 4)), dtype=np.int32))
        prompt = np.concatenate(pieces)
        begin = int(rng.integers(0, 20))
        runs = index.match("a", prompt, begin)
        check_runs(runs, prompt, spans, "a", begin, MIN_RUN)
        covered += check_cover(runs, prompt, spans, "a", begin, max(MIN_RUN, WINDOW + STRIDE - 1))
        assert [(run.depth, run.start - run.stop) for run in runs] == sorted(
            (run.depth, run.start - run.stop) for run in runs
        )
    assert complete(index) and covered > 50
