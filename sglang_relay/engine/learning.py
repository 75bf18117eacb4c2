"""What finished requests teach: the spans that others may reuse, and how approximate the KV on a path is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from sglang_relay.config import RelayConfig
from sglang_relay.engine.accounting import own_spans
from sglang_relay.engine.donors import Donors, tokens_of
from sglang_relay.engine.namespaces import Namespaces
from sglang_relay.engine.quote_book import QuoteBook
from sglang_relay.engine.report import Stats
from sglang_relay.engine.requests import RelayRequest, relay_of
from sglang_relay.index import ContentIndex, DepthMap

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_relay.engine.tree import RelayCache
    from sglang_relay.plan import RelayPlan

_DEPTH_MARKS = 1 << 18
"""Paths whose approximation depth is remembered."""


def owner_of(tenant: Any) -> tuple[str | None, str | None]:
    """Whose share of the index a `Tenant`'s donors count in. Scopes cost a client nothing, so they are no owners."""
    return tenant.key, tenant.salt


class Learning:
    """Fills the index and the depths, and empties them when the KV or the weights they are about have gone.

    version: changes of the index so far: pieces chosen at an older one may have become better. base: of the hashes.
    unsupported: why nothing relays, and so nothing is learnt; the server's list, which may grow until it is ready.
    failure: counts and logs a host failure (``RelayManager.failure``).
    """

    def __init__(
        self,
        config: RelayConfig,
        tree: RelayCache,
        namespaces: Namespaces,
        stats: Stats,
        failure: Callable[[str, BaseException], str],
        *,
        base: int,
        unsupported: list[str],
    ) -> None:
        self.index = ContentIndex(
            base=base,
            window=config.window,
            stride=config.stride,
            min_run=config.min_segment,
            max_bytes=config.index_bytes,
            max_runs=2 * config.max_segments,
            owner_of=owner_of,
        )
        self.donors = Donors(tree, self.index)
        self.depths = DepthMap(base, max_entries=_DEPTH_MARKS)
        self.quotes = QuoteBook()
        self.version = 0
        self._config = config
        self._namespaces = namespaces
        self._stats = stats
        self._failure = failure
        self._page = tree.page_size
        self._unsupported = unsupported
        self._restarts = 0

    # ------------------------------------------------------------------ learn

    def mark_depth(self, req: Req, state: RelayRequest, plan: RelayPlan) -> None:
        """``plan`` has run: what it reused makes the KV of ``req`` approximate from there on."""
        approximate = [s for s in plan.segments if not s.exact]
        if approximate:
            state.depth = max(state.depth, 1 + max(s.depth for s in approximate))
            state.report["depth"] = state.depth
            tokens, start = tokens_of(req), approximate[0].start
            self.depths.mark(req.extra_key, tokens, start, state.depth)
            self.index.deepen(state.tenant, req.extra_key, tokens, start, state.depth)

    def learn(self, req: Req, up_to: int) -> None:
        """The tree now holds ``[0, up_to)`` of a finished request: offer its decoded span, and of its prompt what
        is to be donated, too."""
        state = relay_of(req)
        if state is None or not self._may_donate(state) or isinstance(req.finished_reason, FINISH_ABORT):
            return
        if state.pending is not None:
            return  # never repaired, and so never published
        began = time.perf_counter()
        self.version += 1  # before anything can fail: ranks must match again at the same requests
        try:
            prompt = len(req.origin_input_ids)
            tokens = tokens_of(req)[: up_to // self._page * self._page]
            spans = [*self._prompt_spans(state, tokens, prompt), (prompt, len(tokens))]
            for start, end in spans:
                self._learn_span(req, state, tokens, start, min(end, len(tokens)))
        except Exception as error:
            self._failure("learn", error)
        self._stats.learn_seconds += time.perf_counter() - began

    def _prompt_spans(self, state: RelayRequest, tokens: np.ndarray, prompt: int) -> list[tuple[int, int]]:
        """What to donate of the prompt: its transcript, or all of it. Lent text is its donor's to offer, and text that
        was found in the tree is offered unless an exact donor has it already."""
        transcript = state.controls.generated_from
        first = 0 if state.controls.donate == "all" else prompt if transcript is None else transcript
        spans = [(max(start, first), stop) for start, stop in own_spans(state, prompt) if stop > first]
        found = min(state.found, len(tokens))
        return _without(spans, self._offered(state, tokens[:found])) if found > first and spans else spans

    def _offered(self, state: RelayRequest, tokens: np.ndarray) -> list[tuple[int, int]]:
        """Ranges of ``tokens`` that exact donors of the tenant hold, sorted."""
        runs = [r for r in self.donors.candidates(state.tenant, tokens) if r.depth == 0]
        lengths = self.donors.available(runs)
        return sorted((r.start, r.start + length) for r, length in zip(runs, lengths, strict=True))

    def _learn_span(self, req: Req, state: RelayRequest, tokens: np.ndarray, start: int, stop: int) -> None:
        if stop - start < self._config.min_segment:
            return
        depth = self.depths.depth(req.extra_key, tokens, stop) if state.relays else 0
        if depth < self._config.max_depth:
            self.index.learn(state.tenant, req.extra_key, tokens, start, stop, depth)

    def _may_donate(self, state: RelayRequest) -> bool:
        if self._unsupported or state.controls.donate == "none" or state.epoch != self._namespaces.epoch:
            return False
        if not state.relays and not self._namespaces.exact_is_current:
            return False  # its path may hold KV of older weights, which an insert of equal tokens keeps
        return not self._namespaces.unscoped(state.tenant)

    # ------------------------------------------------------------------ forget

    def start_over(self) -> None:
        """All ranks found something, but not the same: their indices differ. Empty on all of them, with ids that none
        has given out, they are alike again."""
        self._restarts += 1
        self.index.clear(first_id=self._restarts << 40)
        self.version += 1

    def on_flush(self) -> None:
        """The tree was reset: no donor's KV is left."""
        self.index.clear()
        self.depths.clear()
        self.quotes.clear()
        self.version += 1
        self._namespaces.exact_is_current = True

    def on_weights(self, waiting: list[Req], *, begin: bool) -> None:
        """Weights are about to change (``begin``) or have changed: nothing learnt before is found again.

        SGLang does not always flush then (``flush_cache=False``), and a busy flush fails after the weights changed.
        """
        self._namespaces.epoch += 1
        self.index.clear()
        self.quotes.clear()
        self.version += 1
        if begin:
            self._namespaces.exact_is_current = False
        for req in waiting:
            state = relay_of(req)
            if state is not None and not req.kv.holds_kv:
                state.epoch = self._namespaces.epoch
                if state.relays:
                    req.extra_key = self._namespaces.key(state.tenant, state.controls.tier)


def _without(spans: list[tuple[int, int]], taken: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of ``spans`` outside ``taken``; both sorted, ``taken`` may overlap."""
    left: list[tuple[int, int]] = []
    for first, end in spans:
        at = first
        for start, stop in taken:
            if start < end and stop > at:
                left.append((at, start))
                at = stop
        left.append((at, end))
    return [(start, stop) for start, stop in left if stop > start]
