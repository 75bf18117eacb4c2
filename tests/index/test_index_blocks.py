"""Interning of token paths: what is shared, what is not, and that it goes with its last holder."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_relay.index.blocks import BLOCK, BlockPool
from sglang_relay.index.rolling import prefix_hashes

BASE = np.uint64(0x1234_5678_9ABC_DEF)


def intern(pool: BlockPool, path: np.ndarray, tenant: int = 0, base: np.uint64 = BASE) -> int:
    """Intern and hold; returns the tail."""
    hashes = prefix_hashes(path, base)
    chain = pool.find(path, hashes, tenant)
    missing = BlockPool.blocks_of(len(path)) - chain.blocks
    if pool.live + missing > pool.capacity:
        pool.grow(pool.live + missing)
    pool.hold(chain.tail)
    tail = pool.append(path, hashes, tenant, chain)
    pool.hold(tail)
    pool.release(chain.tail)
    return tail


def path_of(*pieces: tuple[int, int]) -> np.ndarray:
    """Concatenated `(length, seed)` pieces of random tokens."""
    return np.concatenate(
        [np.random.default_rng(seed).integers(0, 50000, length, dtype=np.int32) for length, seed in pieces]
    )


def test_next_turn_shares_the_full_blocks_of_the_turn_before() -> None:
    pool = BlockPool()
    first, second = path_of((3 * BLOCK + 10, 1)), path_of((3 * BLOCK + 10, 1), (2 * BLOCK, 2))
    a = intern(pool, first)
    assert pool.live == 4
    b = intern(pool, second)
    assert pool.live == 4 + 3  # the partial block and the new ones
    pool.check_integrity(Counter([a, b]))
    assert (pool.read(b, len(second), 0, len(second)) == second).all()
    pool.release(b)
    assert pool.live == 4
    assert (pool.read(a, len(first), 5, 3 * BLOCK + 7) == first[5 : 3 * BLOCK + 7]).all()
    pool.release(a)
    assert pool.live == 0
    pool.check_integrity({})


def test_siblings_share_their_prefix_and_equal_paths_are_one() -> None:
    pool = BlockPool()
    siblings = [path_of((10 * BLOCK, 1), (BLOCK, seed)) for seed in range(2, 10)]
    tails = [intern(pool, path) for path in siblings]
    assert pool.live == 10 + 8
    assert intern(pool, siblings[3].copy()) == tails[3]
    assert pool.live == 10 + 8
    pool.check_integrity(Counter([*tails, tails[3]]))


def test_tenants_share_nothing() -> None:
    pool = BlockPool()
    path = path_of((4 * BLOCK, 1))
    tails = [intern(pool, path, tenant) for tenant in range(3)]
    assert len(set(tails)) == 3 and pool.live == 12
    pool.release(tails[1])
    assert pool.live == 8
    pool.check_integrity(Counter([tails[0], tails[2]]))


def test_freed_blocks_are_used_again() -> None:
    pool = BlockPool()
    for seed in range(20):
        tail = intern(pool, path_of((5 * BLOCK + 1, seed)))
        pool.release(tail)
    assert pool.capacity == 6 and pool.live == 0
    pool.check_integrity({})


def test_bytes_follow_the_arrays() -> None:
    pool = BlockPool()
    assert pool.nbytes == BlockPool.bytes_for(0)
    for capacity in (1, 7, 64, 1000):
        pool.grow(capacity)
        assert pool.nbytes == BlockPool.bytes_for(capacity)
    for limit in (0, 1000, 2000, 10_000, 1 << 20, 100 << 20):
        capacity = BlockPool.capacity_for(limit)
        assert capacity == 0 or BlockPool.bytes_for(capacity) <= limit
        assert BlockPool.bytes_for(capacity + 1) > limit


@pytest.mark.parametrize("base", [BASE, np.uint64(0), np.uint64(1)], ids=["random", "zero", "one"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_reads_back_what_was_interned(base: np.uint64, data: st.DataObject) -> None:
    """Also under bases that make most prefixes collide: the hash is never believed."""
    pool, held = BlockPool(), []
    pieces = st.lists(
        st.tuples(st.sampled_from([1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK]), st.integers(0, 2)),
        min_size=1,
        max_size=3,
    )
    for _ in range(data.draw(st.integers(1, 12))):
        if held and data.draw(st.booleans()):
            tail, _, _ = held.pop(data.draw(st.integers(0, len(held) - 1)))
            pool.release(tail)
        else:
            # Tokens 0 and 1 only, so that different paths have equal sums and equal last tokens.
            path, tenant = path_of(*data.draw(pieces)) % 2, data.draw(st.integers(0, 1))
            held.append((intern(pool, path, tenant, base), path, tenant))
        pool.check_integrity(Counter(tail for tail, _, _ in held))
        for tail, path, _ in held:
            assert (pool.read(tail, len(path), 0, len(path)) == path).all()
        assert len({tail for tail, _, _ in held}) == len({(path.tobytes(), tenant) for _, path, tenant in held})
