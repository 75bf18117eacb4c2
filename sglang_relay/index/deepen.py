"""Donors whose text runs through a path that has been computed again, at another depth."""

import numpy as np

from ._jit import kernel
from .blocks import BLOCK
from .spans import DEPTH, ID, NAMESPACE, STOP, TAIL, TENANT

_SHIFT = 6
_UNKNOWN, _SAME, _OTHER = 0, 1, 2


@kernel
def deepen_rows(rows, tenant, namespace, path, tail, depth, tokens, parents):
    """Raise to `depth` the donors of this tenant and namespace, numbers of `rows`, whose paths begin with `path` (int32
    `[n]`, n at least 1). tail: the block, or the root, behind which its last block stands; tokens, parents: the pool.

    Every block is walked once, however many donors share it. Returns how many donors were raised."""
    last = (len(path) - 1) >> _SHIFT
    begin = last * BLOCK
    known = np.zeros(len(parents), np.int8)
    raised = 0
    for slot in range(len(rows)):
        if rows[slot, ID] < 0 or rows[slot, TENANT] != tenant or rows[slot, NAMESPACE] != namespace:
            continue
        if rows[slot, STOP] < len(path) or rows[slot, DEPTH] >= depth:
            continue
        block = rows[slot, TAIL]
        for _ in range(((rows[slot, STOP] - 1) >> _SHIFT) - last):
            if known[block] != _UNKNOWN:
                break
            block = parents[block]
        if known[block] == _UNKNOWN:
            same = parents[block] == tail
            for at in range(begin, len(path)):
                same &= tokens[block, at - begin] == path[at]
            known[block] = _SAME if same else _OTHER
        found, block = known[block], rows[slot, TAIL]
        while known[block] == _UNKNOWN:
            known[block] = found
            block = parents[block]
        if found == _SAME:
            rows[slot, DEPTH] = depth
            raised += 1
    return raised
