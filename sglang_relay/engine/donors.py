"""Donor KV in the tree: what of a candidate is still there, and its slots, locked."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
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
    """Slots of a donor's run, int64 [n] with n possibly shorter than asked. lock, key: what keeps them, and where they
    were found; both are None where those of another piece of the same request do."""

    slots: torch.Tensor
    lock: TreeLock | None
    donor: int
    key: RadixKey | None


class _Walk(NamedTuple):
    """A look-up in the tree: the path, how many of its tokens the device holds, and the node where they end."""

    key: RadixKey
    reached: int
    node: int


MOST_WALKED = 1 << 21
"""Tokens of donors' paths that are looked up for one prompt, some 3 ns each."""
_COMPARED = 4
"""Walks that a path is compared with before it is walked itself."""


class Donors:
    """Looks donors up in the tree. The index stores token paths only; slots are resolved at each use, because inserts
    rebind slots and eviction frees them without telling anyone.

    The pieces of a prompt are looked up together, each path once: the tree walks a path from its first token on, and
    what is asked of one donor, or of the turns of one conversation, lies on one path.

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

    def available(self, candidates: Sequence[Candidate]) -> list[int]:
        """Of each candidate, the tokens whose KV the donor's path still holds on the device; 0 for those whose paths
        would take longer than ``MOST_WALKED``. Forgets donors without any."""
        walks = self._walk_all(candidates)
        held = [
            max(0, min(c.stop - c.start, walks[c.donor].reached - c.source)) if c.donor in walks else 0
            for c in candidates
        ]
        for donor, walk in walks.items():
            if walk.reached <= self._index.donor(donor).start:
                self._index.forget(donor)  # eviction takes a path from its end: nothing of the span is left
        return held

    def prefix_held(self, req: Req, space: Space, stop: int) -> int:
        """How many of the first ``stop`` tokens of ``req`` the namespace ``space`` holds."""
        return min(stop, self._walk(self._prefix_key(req, space, stop)).reached)

    def hold(self, req: Req, space: Space, parts: Sequence[Candidate]) -> list[Held | None]:
        """Lock what the tree still holds of ``parts``; None for those of which nothing is left.

        space: the namespace that continues the request's own prefix, for ``EXACT_PREFIX`` pieces.
        """
        walks = self._walk_all([p for p in parts if p.donor != EXACT_PREFIX])
        found: list[Held | None] = [None] * len(parts)
        slots: dict[int, torch.Tensor] = {}
        for number, part in enumerate(parts):
            exact = part.donor == EXACT_PREFIX
            walk = self._walk(self._prefix_key(req, space, part.stop)) if exact else walks.get(part.donor)
            length = 0 if walk is None else min(part.stop - part.start, walk.reached - part.source)
            if walk is None or length <= 0:
                continue
            first = walk.node not in slots
            if first:
                slots[walk.node] = self._tree.path_device_indices(walk.node)
            run = slots[walk.node][part.source : part.source + length]
            found[number] = Held(run, None, part.donor, walk.key if first else None)
        nodes = iter(slots)
        try:
            for number, held in enumerate(found):  # last: what raises before it leaves nothing locked
                if held is not None and held.key is not None:
                    found[number] = held._replace(lock=self._tree.lock(next(nodes)))
                    self.locked += 1
        except BaseException:
            self.release([held for held in found if held is not None])
            raise
        return found

    def touch(self, held: Iterable[Held]) -> None:
        """Make what is used the most recently used, in the index and in the tree."""
        for h in held:
            self._index.touch(h.donor)
            if h.key is not None:
                self._tree.touch_prefix(h.key)

    def release(self, held: list[Held]) -> None:
        """Give the locks back. One that the tree does not take stays in ``held``; its error is raised at the end."""
        left, failed = [], None
        while held:
            one = held.pop()
            if one.lock is None:
                continue
            try:
                self._tree.unlock(one.lock)
                self.locked -= 1
            except Exception as error:
                left.append(one)
                failed = error
        held += left
        if failed is not None:
            raise failed

    def _walk_all(self, parts: Sequence[Candidate]) -> dict[int, _Walk]:
        """One walk per donor of ``parts``, as far as they reach; the longest paths first, as others begin like them."""
        ends: dict[int, int] = {}
        for part in parts:
            ends[part.donor] = max(ends.get(part.donor, 0), part.source + part.stop - part.start)
        walks: dict[int, _Walk] = {}
        own: list[int] = []
        walked = 0
        for donor, end in sorted(ends.items(), key=lambda item: (-item[1], item[0])):
            try:
                key = None
                shared = self._same_path(donor, end, own[-_COMPARED:])
                if shared is None and walked + end <= MOST_WALKED:
                    key = self._key(donor, end)
            except KeyError:
                continue  # evicted from the index since admission
            if shared is not None:
                walks[donor] = walks[shared]
            elif key is not None:
                walked += end
                walks[donor] = self._walk(key)
                own.append(donor)
        return walks

    def _same_path(self, donor: int, end: int, others: Sequence[int]) -> int | None:
        """Which of ``others`` has the same KV up to ``end``."""
        record = self._index.donor(donor)
        for other in others:
            if self._index.donor(other).namespace == record.namespace and self._index.same_start(donor, other, end):
                return other
        return None

    def _walk(self, key: RadixKey) -> _Walk:
        reached, node, _ = self._tree.tree_core.match_full_device_prefix(key)
        return _Walk(key, reached, node)

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
