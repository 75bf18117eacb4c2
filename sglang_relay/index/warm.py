"""Compilation ahead of use."""

import functools

import numpy as np

from .content import ContentIndex
from .depth import DepthMap


@functools.cache
def warm_up() -> None:
    """Compile every kernel of the index, or load it from numba's cache. Call before serving: seconds the first time on
    a machine, then a fraction of one."""
    path = np.arange(200, dtype=np.int32)
    index = ContentIndex(base=257)
    donor = index.learn("", None, path, 0, 200, 0)
    other = index.learn("", None, path, 10, 199, 0)
    assert donor is not None and other is not None
    index.match("", path)
    index.same_start(donor, other, 150)
    index.deepen("", None, path, 100, 1)
    index.path(donor, 200)
    index.forget(donor)
    depths = DepthMap(257, 2)
    depths.mark("", path, 0, 1)
    depths.mark("", path, 1, 1)
    depths.depth("", path, 200)
