"""Polynomial hashes of token windows and token prefixes, exact modulo the Mersenne prime 2^61 - 1.

With the tokens of a path written t[0], t[1], ... the prefix hash is P[0] = 0, P[i + 1] = P[i] * base + (uint32(t[i]) +
1), and the hash of the window [i, i + w) is P[i + w] - P[i] * base^w: it depends on the window's tokens alone, so a
window hashes alike wherever it stands. For a base drawn at random two different windows collide with probability at
most w / 2^61 (Karp and Rabin 1987), whoever chose the tokens. A hash only proposes: callers compare tokens before they
believe.
"""

import numpy as np

from ._jit import kernel

MODULUS = (1 << 61) - 1

_P = np.uint64(MODULUS)
_ONE = np.uint64(1)
_U27, _U30, _U31, _U61 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(61)
_LOW30, _LOW31 = np.uint64((1 << 30) - 1), np.uint64((1 << 31) - 1)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A, _MIX_B = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


@kernel
def multiply(a: np.uint64, b: np.uint64) -> np.uint64:
    """`a * b mod 2^61 - 1` for `a, b < 2^61 - 1`.

    Numba has no 128-bit integers, so the product is taken in halves of 30 and 31 bits; 2^61 = 1 folds the high parts
    down, and the sum stays below 2^63 + 2^33.
    """
    high_a, low_a = a >> _U31, a & _LOW31
    high_b, low_b = b >> _U31, b & _LOW31
    middle = low_a * high_b + high_a * low_b
    total = ((high_a * high_b) << _ONE) + (middle >> _U30) + ((middle & _LOW30) << _U31) + low_a * low_b
    folded = (total & _P) + (total >> _U61)
    return folded - _P if folded >= _P else folded


@kernel
def power(base: np.uint64, exponent: int) -> np.uint64:
    """`base^exponent mod 2^61 - 1`; `exponent >= 0` is small (a window)."""
    result = _ONE
    for _ in range(exponent):
        result = multiply(result, base)
    return result


@kernel
def prefix_hashes(tokens: np.ndarray, base: np.uint64) -> np.ndarray:
    """`tokens`: int32 `[n]`. Returns uint64 `[n + 1]`: entry `i` is the hash of `tokens[:i]`."""
    hashes = np.empty(len(tokens) + 1, np.uint64)
    value = np.uint64(0)
    hashes[0] = value
    for i in range(len(tokens)):
        # The added one tells a prefix from the same prefix behind zeros.
        value = multiply(value, base) + np.uint64(np.uint32(tokens[i])) + _ONE
        if value >= _P:
            value -= _P
        hashes[i + 1] = value
    return hashes


@kernel
def window_hash(hashes: np.ndarray, at: int, window: int, factor: np.uint64) -> np.uint64:
    """Hash of the `window` tokens from `at` on, from `prefix_hashes` and `factor = power(base, window)`."""
    value = hashes[at + window] + _P - multiply(hashes[at], factor)
    return value - _P if value >= _P else value


@kernel
def mix(value: np.uint64) -> np.uint64:
    """The splitmix64 finaliser (Steele, Lea and Flood 2014), a bijection that spreads every bit over the word."""
    value = value + _GOLDEN
    value = (value ^ (value >> _U30)) * _MIX_A
    value = (value ^ (value >> _U27)) * _MIX_B
    return value ^ (value >> _U31)


@kernel
def table_key(value: np.uint64, seed: np.uint64) -> np.uint64:
    """Key of hash `value` in the key space of `seed`; never 0, which marks an empty table slot."""
    key = mix(value ^ seed)
    return key if key != np.uint64(0) else _ONE
