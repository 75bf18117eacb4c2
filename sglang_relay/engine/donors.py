"""Donor KV in the tree: what of a candidate is still there, and its slots, locked."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams, TreeLock
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_relay.engine.namespaces import Tenant
from sglang_relay.index import ContentIndex
from sglang_relay.plan import Candidate

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_relay.engine.tree import RelayCache

EXACT_PREFIX = -1
"""Donor id of a piece that continues the prefix from another namespace: same tokens, same positions, exact KV."""

Space = tuple[str | None, str | None]
"""A tree namespace: extra_key and cache_salt."""


def tokens_of(req: Req) -> np.ndarray:
    """int32 [n]: prompt and output tokens of ``req`` so far."""
    return np.frombuffer(req.full_untruncated_fill_ids, dtype=np.int64).astype(np.int32)


class Held(NamedTuple):
    """Slots of a donor's run, int64 [n] with n possibly shorter than asked, and the lock that keeps them."""

    slots: torch.Tensor
    lock: TreeLock | None


class Donors:
    """Looks donors up in the tree. The index stores token paths only; slots are resolved at each use, because inserts
    rebind slots and eviction frees them without telling anyone."""

    def __init__(self, tree: RelayCache, index: ContentIndex) -> None:
        self._tree = tree
        self._index = index

    def available(self, candidate: Candidate) -> int:
        """Tokens of ``candidate`` whose KV the donor's path still holds on the device; forgets a donor without any."""
        length = candidate.stop - candidate.start
        try:
            key = self._key(candidate.donor, candidate.source + length)
        except KeyError:
            return 0  # forgotten at an earlier candidate of the same donor
        reached = self._tree.match_prefix(MatchPrefixParams(key=key)).device_prefix_len
        if reached <= self._index.donor(candidate.donor).start:
            self._index.forget(candidate.donor)  # eviction takes a path from its end: nothing of the span is left
        return max(0, min(length, reached - candidate.source))

    def prefix_held(self, req: Req, space: Space, stop: int) -> int:
        """How many of the first ``stop`` tokens of ``req`` the namespace ``space`` holds."""
        return self._tree.match_prefix(MatchPrefixParams(key=self._prefix_key(req, space, stop))).device_prefix_len

    def hold(self, req: Req, space: Space | None, part: Candidate) -> Held | None:
        """Lock what the tree still holds of ``part``; None if nothing is left.

        space: the namespace that continues the request's own prefix, for an ``EXACT_PREFIX`` piece.
        """
        length = part.stop - part.start
        try:
            if space is not None:
                key = self._prefix_key(req, space, part.stop)
            else:
                key = self._key(part.donor, part.source + length)
                self._index.touch(part.donor)
        except KeyError:
            return None  # evicted from the index since admission
        match = self._tree.match_prefix(MatchPrefixParams(key=key))
        length = min(length, match.device_prefix_len - part.source)
        if length <= 0:
            return None
        lock = self._tree.lock(match.last_device_node)
        slots = self._tree.path_device_indices(match.last_device_node)
        return Held(slots[part.source : part.source + length], lock)

    def release(self, locks: list[TreeLock | None]) -> None:
        while locks:
            self._tree.unlock(locks.pop())

    def _key(self, donor: int, stop: int) -> RadixKey:
        record = self._index.donor(donor)
        path = array("q")
        path.frombytes(self._index.path(donor, stop).astype(np.int64).tobytes())
        tenant: Tenant = record.tenant  # type: ignore[assignment]
        return RadixKey(path, record.namespace, cache_salt=tenant.salt)

    @staticmethod
    def _prefix_key(req: Req, space: Space, stop: int) -> RadixKey:
        return RadixKey(req.full_untruncated_fill_ids, space[0], cache_salt=space[1], limit=stop)
