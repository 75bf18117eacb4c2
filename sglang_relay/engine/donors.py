"""Donor KV in the tree: what of a candidate is still there, and its slots, locked."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import TreeLock
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
    """Slots of a donor's run, int64 [n] with n possibly shorter than asked, the lock that keeps them, and where they
    were found."""

    slots: torch.Tensor
    lock: TreeLock | None
    donor: int
    key: RadixKey


class Donors:
    """Looks donors up in the tree. The index stores token paths only; slots are resolved at each use, because inserts
    rebind slots and eviction frees them without telling anyone.

    Looking up changes nothing in the tree, neither recency nor where nodes are split: tensor-parallel ranks may differ
    in what they look up, and their trees must not. ``touch`` is for what all ranks have agreed to use.
    """

    def __init__(self, tree: RelayCache, index: ContentIndex) -> None:
        self._tree = tree
        self._index = index
        self.locked = 0
        """Locks that are held now."""

    def candidates(self, tenant: Tenant, tokens: np.ndarray, start: int = 0) -> list[Candidate]:
        """What the index finds of ``tokens[start:]``, as ``ContentIndex.match`` sorts it; the tree may hold less."""
        runs = self._index.match(tenant, tokens, start)
        return [Candidate(r.start, r.stop, r.donor, r.source, r.depth) for r in runs]

    def available(self, candidate: Candidate) -> int:
        """Tokens of ``candidate`` whose KV the donor's path still holds on the device; forgets a donor without any."""
        length = candidate.stop - candidate.start
        try:
            key = self._key(candidate.donor, candidate.source + length)
        except KeyError:
            return 0  # forgotten at an earlier candidate of the same donor
        reached, _ = self._find(key)
        if reached <= self._index.donor(candidate.donor).start:
            self._index.forget(candidate.donor)  # eviction takes a path from its end: nothing of the span is left
        return max(0, min(length, reached - candidate.source))

    def prefix_held(self, req: Req, space: Space, stop: int) -> int:
        """How many of the first ``stop`` tokens of ``req`` the namespace ``space`` holds."""
        return min(stop, self._find(self._prefix_key(req, space, stop))[0])

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
        except KeyError:
            return None  # evicted from the index since admission
        reached, node = self._find(key)
        length = min(length, reached - part.source)
        if length <= 0:
            return None
        slots = self._tree.path_device_indices(node)[part.source : part.source + length]
        lock = self._tree.lock(node)  # last: what raises before it leaves nothing locked
        self.locked += 1
        return Held(slots, lock, part.donor, key)

    def touch(self, held: Iterable[Held]) -> None:
        """Make what is used the most recently used, in the index and in the tree."""
        for h in held:
            self._index.touch(h.donor)
            self._tree.touch_prefix(h.key)

    def release(self, held: list[Held]) -> None:
        """Give the locks back. One that the tree does not take stays in ``held``; its error is raised at the end."""
        left, failed = [], None
        while held:
            one = held.pop()
            try:
                self._tree.unlock(one.lock)
                self.locked -= 1
            except Exception as error:
                left.append(one)
                failed = error
        held += left
        if failed is not None:
            raise failed

    def _find(self, key: RadixKey) -> tuple[int, int]:
        """(tokens of ``key`` that the device holds, the node where they end)."""
        reached, node, _ = self._tree.tree_core.match_full_device_prefix(key)
        return reached, node

    def _key(self, donor: int, stop: int) -> RadixKey:
        """The path of ``donor`` up to ``stop``, and to the end of the page that ``stop`` cuts if the span goes on."""
        record = self._index.donor(donor)
        path = array("q")
        stop = min(self._page_end(stop), record.stop)
        path.frombytes(self._index.path(donor, stop).astype(np.int64).tobytes())
        tenant: Tenant = record.tenant  # type: ignore[assignment]
        return RadixKey(path, record.namespace, cache_salt=tenant.salt)

    def _prefix_key(self, req: Req, space: Space, stop: int) -> RadixKey:
        limit = self._page_end(stop)
        return RadixKey(req.full_untruncated_fill_ids, space[0], cache_salt=space[1], limit=limit)

    def _page_end(self, stop: int) -> int:
        page = self._tree.page_size
        return -(-stop // page) * page
