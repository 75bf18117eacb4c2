"""Rolling hashes against Python's own integers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_relay.index.rolling import MODULUS, mix, multiply, power, prefix_hashes, table_key, window_hash

residues = st.integers(0, MODULUS - 1) | st.sampled_from(
    [0, 1, 2, MODULUS - 1, MODULUS - 2, 1 << 60, (1 << 31) - 1, 1 << 31]
)
token_lists = st.lists(st.integers(-(1 << 31), (1 << 31) - 1) | st.integers(0, 3), max_size=40)


def direct_hash(tokens: list[int], base: int) -> int:
    value = 0
    for token in tokens:
        value = (value * base + token % (1 << 32) + 1) % MODULUS
    return value


@settings(max_examples=500, deadline=None)
@given(residues, residues)
def test_multiply_is_exact(a: int, b: int) -> None:
    assert multiply(np.uint64(a), np.uint64(b)) == a * b % MODULUS


@settings(deadline=None)
@given(residues, st.integers(0, 40))
def test_power_is_exact(base: int, exponent: int) -> None:
    assert power(np.uint64(base), exponent) == pow(base, exponent, MODULUS)


@settings(deadline=None)
@given(token_lists, residues)
def test_prefix_hashes_are_the_polynomial_of_each_prefix(tokens: list[int], base: int) -> None:
    hashes = prefix_hashes(np.array(tokens, np.int32), np.uint64(base))
    assert hashes.tolist() == [direct_hash(tokens[:i], base) for i in range(len(tokens) + 1)]


@settings(deadline=None)
@given(token_lists, residues, st.integers(1, 8))
def test_window_hash_depends_on_the_window_alone(tokens: list[int], base: int, window: int) -> None:
    hashes = prefix_hashes(np.array(tokens, np.int32), np.uint64(base))
    factor = np.uint64(power(np.uint64(base), window))
    for at in range(len(tokens) - window + 1):
        assert window_hash(hashes, at, window, factor) == direct_hash(tokens[at : at + window], base)


def test_prefixes_of_zeros_differ_in_length() -> None:
    hashes = prefix_hashes(np.zeros(100, np.int32), np.uint64(12345))
    assert len(set(hashes.tolist())) == 101


@pytest.mark.parametrize("seed", range(3))
def test_table_keys_spread_and_are_never_zero(seed: int) -> None:
    keys = [table_key(np.uint64(value), np.uint64(mix(np.uint64(seed)))) for value in range(20000)]
    assert len(set(keys)) == len(keys)
    assert min(keys) > 0
    # The upper half chooses the table slot: 20,000 keys in 64 bins, mean 312, standard deviation 17.5.
    bins = np.bincount(np.array(keys, np.uint64) >> np.uint64(58), minlength=64)
    assert bins.min() > 200
    assert bins.max() < 430


def test_a_hash_that_mixes_to_zero_still_gets_a_key() -> None:
    # Solve mix(x) = 0: each step of the finaliser maps 0 to 0, so x is minus the added constant.
    zero = (1 << 64) - 0x9E3779B97F4A7C15
    assert mix(np.uint64(zero)) == 0
    assert table_key(np.uint64(zero), np.uint64(0)) != 0
