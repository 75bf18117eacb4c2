"""The decorator of every compiled kernel in the index."""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba


@functools.cache
def _source_digest() -> str:
    digest = hashlib.blake2b(digest_size=4)
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` with numba on its first call, and keep the machine code on disk where a folder is writable.

    Numba names a cache entry after the file that holds the function, and does not see that a kernel inlined from
    another file has changed. The digest of the whole folder in the name makes such an entry unreachable: a server
    upgraded in place must not run an old table layout against a new one.
    """
    function.__qualname__ = f"{function.__qualname__}_{_source_digest()}"
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache folder is writable: compile in memory
        return numba.njit(function)
