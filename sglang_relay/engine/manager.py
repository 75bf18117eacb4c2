"""The relay of one scheduler process: match at admission, plan per chunk, learn at the end.

Everything here is a pure function of state that all tensor-parallel ranks hold alike; ``Consensus`` confirms it.
A host failure is logged once, counted, and answered with the stock path.
"""

from __future__ import annotations

import logging
import time
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams, TreeLock
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_relay.config import RelayConfig
from sglang_relay.engine.consensus import Consensus, digest_of
from sglang_relay.engine.guards import batch_reason, request_reason
from sglang_relay.engine.namespaces import Namespaces, Tenant
from sglang_relay.engine.report import Stats
from sglang_relay.engine.requests import RelayRequest, new_report, read_controls
from sglang_relay.index import ContentIndex, DepthMap
from sglang_relay.plan import Candidate, Decline, RelayPlan, Segment, cover
from sglang_relay.policies import Policy, make_policy

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    from sglang_relay.engine.tree import RelayCache

logger = logging.getLogger(__name__)

EXACT_PREFIX = -1
"""Donor id of a piece that continues the prefix from the exact namespace: same tokens, same positions."""


@dataclass(slots=True, eq=False)
class BatchPlan:
    """A planned batch. ``plans[i].row`` indexes ``reqs``. Donor locks are held until ``release``."""

    policy: Policy
    plans: list[RelayPlan]
    reqs: list[Req]
    locks: list[TreeLock | None]
    fell_back: str | None = None
    """Why the batch ran on the stock path after all."""


class RelayManager:
    """State and decisions of the relay. One per scheduler process."""

    def __init__(
        self,
        config: RelayConfig,
        tree: RelayCache,
        consensus: Consensus,
        *,
        num_layers: int,
        pool_slots: int,
        secret: str,
        base: int,
        isolated: bool,
        unsupported: list[str],
    ) -> None:
        self.config = config
        self.tree = tree
        self.consensus = consensus
        self.isolated = isolated
        self.unsupported = unsupported
        self.num_layers = num_layers
        self.pool_slots = pool_slots
        self.namespaces = Namespaces(secret)
        self.stats = Stats()
        self.index = ContentIndex(
            base=base,
            window=config.window,
            stride=config.stride,
            min_run=config.min_segment,
            max_bytes=config.index_bytes,
            max_runs=2 * config.max_segments,
        )
        self.depths = DepthMap(base, max_entries=1 << 18)
        self.learnt = 0
        layers = config.resolve_layer_range(num_layers)
        self._policies = {
            name: make_policy(name, num_layers=num_layers, layers=layers, tau_dev=config.tau_dev, suffix=config.suffix)
            for name in ("rotate", "relay", "full")
        }
        self._logged: set[str] = set()
        self._outstanding: BatchPlan | None = None

    # ------------------------------------------------------------------ requests

    def adopt(self, req: Req, *, has_multimodal: bool) -> None:
        """Give a new request its relay state and, if it may relay, its namespace."""
        declined = None
        tenant = Tenant(req.extra_key, req.cache_salt, None)
        try:
            controls = read_controls(req.sampling_params.custom_params, self.config)
            tenant = Tenant(req.extra_key, req.cache_salt, controls.scope)
            declined = self._admission_reason(req, controls.mode, tenant, has_multimodal)
        except Decline as decline:
            self.log_once(decline.reason, str(decline))
            declined = decline.reason
            controls = read_controls({"relay": "off"}, self.config)
        state = RelayRequest(
            controls, tenant, self.namespaces.epoch, new_report(controls.policy if not declined else None, declined)
        )
        state.declined = declined
        req.relay = state  # type: ignore[attr-defined]
        req.customized_info = {**(req.customized_info or {}), "relay": [state.report]}
        if state.relays:
            req.extra_key = self.namespaces.key(tenant, controls.tier)
        else:
            self.stats.decline(declined or "")

    def _admission_reason(self, req: Req, mode: str, tenant: Tenant, has_multimodal: bool) -> str | None:
        if self.unsupported:
            return f"unsupported:{self.unsupported[0]}"
        if mode != "on":
            return {"off": "relay_off", "exact": "exact_requested"}[mode]
        if self.isolated and tenant.salt is None and tenant.scope is None:
            return "no_cache_salt"
        return request_reason(req, has_multimodal)

    def may_donate(self, state: RelayRequest) -> bool:
        if self.unsupported or state.controls.donate == "none" or state.epoch != self.namespaces.epoch:
            return False
        return not self.isolated or state.tenant.salt is not None or state.tenant.scope is not None

    # ------------------------------------------------------------------ match

    def propose(self, req: Req) -> RelayRequest | None:
        """Choose the pieces of ``req``'s uncached prompt that donors hold; None if it does not relay.

        Called when the scheduler considers the request; cached until the index learns something new.
        """
        state: RelayRequest | None = getattr(req, "relay", None)
        if state is None or not state.relays:
            return None
        if state.pieces_version == self.learnt and req.prefix_len in (state.pieces_from, state.reached):
            return state
        began = time.perf_counter()
        pieces: list[Candidate] = []
        ok = True
        try:
            pieces = self._match(req, state)
        except Exception as error:
            self.failure("match", error)
            ok = False
        digest = digest_of(req.rid, [tuple(p) for p in pieces])
        if not self.consensus.agree(ok, digest):
            pieces = []
            self.stats.decline("ranks_disagree" if ok else "match_failed")
            self.log_once("ranks_disagree", "tensor-parallel ranks found different segments; served by exact prefill")
        state.pieces, state.pieces_version, state.pieces_from = pieces, self.learnt, req.prefix_len
        elapsed = time.perf_counter() - began
        state.report["match_ms"] = round(state.report["match_ms"] + 1e3 * elapsed, 3)
        self.stats.match_seconds += elapsed
        return state

    def _match(self, req: Req, state: RelayRequest) -> list[Candidate]:
        tokens = np.frombuffer(req.full_untruncated_fill_ids, dtype=np.int64).astype(np.int32)
        start, stop = req.prefix_len, len(tokens) - 1
        if req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids):
            # Prompt logprobs need the hidden state of every row from there on.
            stop = min(stop, max(start, req.logprob_start_len - 1))
        pieces: list[Candidate] = []
        exact_stop = self._exact_prefix(req, state, start, stop)
        if exact_stop > start:
            pieces.append(Candidate(start, exact_stop, EXACT_PREFIX, start, 0))
        runs = self.index.match(state.tenant, tokens, exact_stop)
        candidates = [Candidate(r.start, r.stop, r.donor, r.source, r.depth) for r in runs]
        found = self._cover(candidates, exact_stop, stop)
        if sum(p.stop - p.start for p in found) >= self.config.min_relayed:
            pieces += found
        return pieces

    def _exact_prefix(self, req: Req, state: RelayRequest, start: int, stop: int) -> int:
        """How far the exact namespace continues the request's prefix."""
        if not self.namespaces.exact_is_current or state.tenant.scope is not None:
            return start
        key = RadixKey(req.full_untruncated_fill_ids, state.tenant.key, cache_salt=state.tenant.salt, limit=stop)
        reached = self.tree.match_prefix(MatchPrefixParams(key=key)).device_prefix_len
        return reached if reached - start >= self.config.min_segment else start

    def _cover(self, candidates: list[Candidate], start: int, stop: int) -> list[Candidate]:
        """Disjoint pieces, best candidates first, as long as their donors' KV is in the tree. Bounded look-ups."""
        held: list[Candidate] = []
        for candidate in candidates[: 2 * self.config.max_segments]:
            if candidate.depth > self.config.max_depth - 1:
                continue
            available = self._available(candidate)
            if available >= self.config.min_segment:
                held.append(candidate._replace(stop=candidate.start + available))
        return cover(held, start, stop, self.config.min_segment, self.config.max_segments)

    def _available(self, candidate: Candidate) -> int:
        """Tokens of ``candidate`` whose KV the donor's path still holds on the device."""
        length = candidate.stop - candidate.start
        reached = self.tree.match_prefix(
            MatchPrefixParams(key=self._donor_key(candidate.donor, candidate.source + length))
        ).device_prefix_len
        available = min(length, reached - candidate.source)
        if available <= 0:
            self.index.forget(candidate.donor)
        return available

    def _donor_key(self, donor: int, stop: int) -> RadixKey:
        record = self.index.donor(donor)
        path = array("q")
        path.frombytes(self.index.path(donor, stop).astype(np.int64).tobytes())
        return RadixKey(path, record.namespace, cache_salt=record.tenant.salt)

    # ------------------------------------------------------------------ budget

    def computed(self, req: Req, state: RelayRequest, start: int, stop: int) -> int:
        """Tokens' worth of computing that extending ``[start, stop)`` costs: fresh tokens + expected repair."""
        copied = 0.0
        share = self._policies[state.controls.policy].expected_share()
        for piece in state.pieces:
            part = piece.clip(start, stop - 1)
            if part.stop > part.start:
                copied += (part.stop - part.start) * (1.0 if piece.donor == EXACT_PREFIX else 1.0 - share)
        return stop - start - int(copied)

    def reach(self, req: Req, state: RelayRequest, start: int, stop: int, budget: int) -> int:
        """Largest end in ``[start, stop]`` up to which extending costs at most ``budget`` tokens of computing."""
        low, high = start, stop
        while low < high:
            middle = (low + high + 1) // 2
            if self.computed(req, state, start, middle) <= budget:
                low = middle
            else:
                high = middle - 1
        return low

    # ------------------------------------------------------------------ plan

    def plan(self, batch: ScheduleBatch) -> BatchPlan | None:
        """Plan the batch about to be allocated and lock its donors; None when nothing is reused.

        With several ranks every batch that holds a relaying request reaches the same agreement, planned or not.
        """
        self.release(self._outstanding)
        self._outstanding = None
        states = [getattr(r, "relay", None) for r in batch.reqs]
        for req, state in zip(batch.reqs, states, strict=True):
            if state is not None:
                self._begin_chunk(req, state)
        if not any(s is not None and s.relays for s in states):
            return None
        planned, reason = None, None
        try:
            reason = batch_reason(batch)
            planned = None if reason else self._plan(batch, states)
        except Decline as decline:
            reason = decline.reason
            self.log_once(reason, str(decline))
        except Exception as error:
            reason = self.failure("plan", error)
        shape = [] if planned is None else [self._shape(p) for p in planned.plans]
        agreed = self.consensus.agree(reason is None, digest_of(batch.extend_num_tokens or 0, shape))
        if not agreed and planned is not None:
            self.release(planned)
            planned, reason = None, reason or "ranks_disagree"
        if reason is not None:
            for state in states:
                if state is not None and state.relays and state.pieces:
                    self._decline(state, reason)
        self._account(batch.reqs, states, planned)
        self._outstanding = planned
        return planned

    @staticmethod
    def _shape(plan: RelayPlan) -> tuple:
        return plan.row, plan.prefix, plan.stop, [(s.start, s.stop, s.source, s.depth, s.exact) for s in plan.segments]

    def _begin_chunk(self, req: Req, state: RelayRequest) -> None:
        if state.reached == req.prefix_len and state.reached >= 0:
            return
        # First chunk, or a new attempt after retraction: count from the prefix that the tree gave.
        prompt = len(req.origin_input_ids)
        for key in ("relayed", "recomputed", "fresh", "segments"):
            state.report[key] = 0
        state.report["exact"] = min(req.prefix_len, prompt)
        state.fresh.clear()
        state.depth = 0
        if state.relays and req.prefix_len:
            tokens = np.frombuffer(req.full_untruncated_fill_ids, dtype=np.int64).astype(np.int32)
            state.depth = self.depths.depth(req.extra_key, tokens, req.prefix_len)
        state.report["depth"] = state.depth

    def _plan(self, batch: ScheduleBatch, states: list[RelayRequest | None]) -> BatchPlan | None:
        policy: Policy | None = None
        plans: list[RelayPlan] = []
        locks: list[TreeLock | None] = []
        try:
            for row, (req, state) in enumerate(zip(batch.reqs, states, strict=True)):
                if state is None or not state.relays or not state.pieces:
                    continue
                wanted = self._policies[state.controls.policy]
                if policy is not None and wanted is not policy:
                    self._decline(state, "other_policy_in_batch")
                    continue
                segments = self._segments(req, state, locks)
                if segments:
                    policy = wanted
                    plan = RelayPlan(row, req.prefix_len, req.extend_end, tuple(segments), state.controls.budget)
                    plan.check(self.pool_slots)
                    plans.append(plan)
            if policy is None:
                self._unlock(locks)
                return None
            self._check_memory(batch)
        except BaseException:
            self._unlock(locks)
            raise
        return BatchPlan(policy, plans, list(batch.reqs), locks)

    def _segments(self, req: Req, state: RelayRequest, locks: list[TreeLock | None]) -> list[Segment]:
        segments: list[Segment] = []
        # The chunk's last row stays fresh: the logits processor reads it.
        low, high = req.prefix_len, req.extend_end - 1
        for piece in state.pieces:
            part = piece.clip(low, high)
            if part.stop <= part.start:
                continue
            exact = piece.donor == EXACT_PREFIX
            if exact and part.start != low:
                continue  # the exact prefix was not continued from its start, so it is no prefix any more
            if exact:
                tokens = req.full_untruncated_fill_ids
                key = RadixKey(tokens, state.tenant.key, cache_salt=state.tenant.salt, limit=part.stop)
            else:
                try:
                    key = self._donor_key(piece.donor, part.source + part.stop - part.start)
                except KeyError:
                    continue  # evicted from the index since admission
            match = self.tree.match_prefix(MatchPrefixParams(key=key))
            length = min(part.stop - part.start, match.device_prefix_len - part.source)
            if length <= 0:
                continue
            locks.append(self.tree.lock(match.last_device_node))
            slots = self.tree.path_device_indices(match.last_device_node)
            segments.append(
                Segment(
                    start=part.start,
                    stop=part.start + length,
                    source=part.source,
                    depth=piece.depth,
                    slots=slots[part.source : part.source + length],
                    exact=exact,
                    end=piece.stop,
                )
            )
            if not exact:
                self.index.touch(piece.donor)
        return segments

    def _check_memory(self, batch: ScheduleBatch) -> None:
        """Admission counted the donors as evictable; locked, they may no longer leave room for the batch."""
        allocator = self.tree.token_to_kv_pool_allocator
        page = allocator.page_size
        need = sum(-(-r.extend_len // page) * page + page for r in batch.reqs)
        if allocator.available_size() + self.tree.evictable_size() < need:
            raise Decline("pool_pressure", "locked donors would leave no room for the batch")

    # ------------------------------------------------------------------ run

    def finish(self, planned: BatchPlan) -> None:
        """The batch's copies are launched (or the batch failed): note depths, drop the donor locks."""
        try:
            if planned.fell_back is not None:
                self._account_fallback(planned)
            elif not planned.policy.exact:
                self._mark_depths(planned)
        finally:
            self.release(planned)
            self._outstanding = None

    def release(self, planned: BatchPlan | None) -> None:
        if planned is not None:
            self._unlock(planned.locks)

    def _unlock(self, locks: list[TreeLock | None]) -> None:
        while locks:
            self.tree.unlock(locks.pop())

    def _mark_depths(self, planned: BatchPlan) -> None:
        for plan in planned.plans:
            req = planned.reqs[plan.row]
            state: RelayRequest = req.relay  # type: ignore[attr-defined]
            approximate = [s for s in plan.segments if not s.exact]
            if not approximate:
                continue
            state.depth = max(state.depth, 1 + max(s.depth for s in approximate))
            state.report["depth"] = state.depth
            tokens = np.frombuffer(req.full_untruncated_fill_ids, dtype=np.int64).astype(np.int32)
            self.depths.mark(req.extra_key, tokens, approximate[0].start, state.depth)

    # ------------------------------------------------------------------ learn

    def learn(self, req: Req, up_to: int) -> None:
        """The tree now holds ``[0, up_to)`` of a finished request: offer its decoded span, or all that it computed."""
        state: RelayRequest | None = getattr(req, "relay", None)
        if state is None or not self.may_donate(state) or isinstance(req.finished_reason, FINISH_ABORT):
            return
        began = time.perf_counter()
        try:
            page = self.tree.page_size
            held = up_to // page * page
            prompt = len(req.origin_input_ids)
            spans = [(prompt, held)]
            if state.controls.donate == "all":
                spans = self._computed_spans(state, prompt) + spans
            tokens = np.frombuffer(req.full_untruncated_fill_ids, dtype=np.int64).astype(np.int32)[:held]
            for start, stop in spans:
                stop = min(stop, held)
                if stop - start < self.config.min_segment:
                    continue
                depth = self.depths.depth(req.extra_key, tokens, stop) if state.relays else 0
                if depth < self.config.max_depth:
                    self.index.learn(state.tenant, req.extra_key, tokens, start, stop, depth)
                    self.learnt += 1
        except Exception as error:
            self.failure("learn", error)
        self.stats.learn_seconds += time.perf_counter() - began

    def _computed_spans(self, state: RelayRequest, prompt: int) -> list[tuple[int, int]]:
        """Prompt ranges that the request computed itself, adjacent chunks joined."""
        joined: list[tuple[int, int]] = []
        for start, stop in state.fresh:
            if joined and joined[-1][1] == start:
                joined[-1] = (joined[-1][0], stop)
            else:
                joined.append((start, stop))
        return [(a, min(b, prompt)) for a, b in joined if a < prompt]

    def on_flush(self) -> None:
        """The tree was reset: no donor's KV is left."""
        self.index.clear()
        self.depths.clear()
        self.learnt += 1
        self.namespaces.exact_is_current = True

    def on_weights(self, waiting: list[Req], *, begin: bool) -> None:
        """Weights are about to change (``begin``) or have changed: nothing learnt before is found again.

        SGLang does not always flush then (``flush_cache=False``), and a busy flush fails after the weights changed.
        """
        self.namespaces.epoch += 1
        self.index.clear()
        self.learnt += 1
        if begin:
            self.namespaces.exact_is_current = False
        for req in waiting:
            state: RelayRequest | None = getattr(req, "relay", None)
            if state is not None and not req.kv.holds_kv:
                state.epoch = self.namespaces.epoch
                if state.relays:
                    req.extra_key = self.namespaces.key(state.tenant, state.controls.tier)

    # ------------------------------------------------------------------ accounting

    def _decline(self, state: RelayRequest, reason: str) -> None:
        state.report["declined"] = reason
        self.stats.decline(reason)

    def _account(self, reqs: list[Req], states: list[RelayRequest | None], planned: BatchPlan | None) -> None:
        """Report what this chunk does to each request's prompt, before the selection is known."""
        plans = {p.row: p for p in planned.plans} if planned is not None else {}
        for row, (req, state) in enumerate(zip(reqs, states, strict=True)):
            if state is None:
                continue
            prompt = len(req.origin_input_ids)
            plan = plans.get(row)
            segments = plan.segments if plan is not None else ()
            report, at = state.report, req.prefix_len
            for s in segments:
                if s.start > at:
                    state.fresh.append((at, s.start))
                inside = max(0, min(s.stop, prompt) - s.start)
                kind = "exact" if s.exact else ("recomputed" if planned and planned.policy.exact else "relayed")
                report[kind] += inside
                report["segments"] += not s.exact
                at = s.stop
            if req.extend_end > at:
                state.fresh.append((at, req.extend_end))
            placed = sum(max(0, min(s.stop, prompt) - s.start) for s in segments)
            chunk = max(0, min(req.extend_end, prompt) - req.prefix_len)
            report["fresh"] += chunk - placed
            state.reached = req.extend_end
            reused = report["relayed"] + report["recomputed"]
            if reused:
                report["declined"] = None
            elif state.relays and report["declined"] is None and req.extend_end >= prompt:
                report["declined"] = "nothing_to_reuse"
            self.stats.chunk(fresh=chunk - placed, segments=segments)

    def count_selected(self, planned: BatchPlan, selected: list[int]) -> None:
        """``selected[i]``: tokens of plan ``i`` that the policy recomputes."""
        for plan, count in zip(planned.plans, selected, strict=True):
            report = planned.reqs[plan.row].relay.report  # type: ignore[attr-defined]
            report["relayed"] -= count
            report["recomputed"] += count
            self.stats.repaired(count)

    def _account_fallback(self, planned: BatchPlan) -> None:
        """The stock path recomputed everything that was placed: it is fresh after all."""
        for plan in planned.plans:
            req = planned.reqs[plan.row]
            state: RelayRequest = req.relay  # type: ignore[attr-defined]
            prompt = len(req.origin_input_ids)
            for s in plan.segments:
                inside = max(0, min(s.stop, prompt) - s.start)
                kind = "exact" if s.exact else ("recomputed" if planned.policy.exact else "relayed")
                state.report[kind] -= inside
                state.report["fresh"] += inside
                state.report["segments"] -= not s.exact
            self._decline(state, planned.fell_back or "internal_error")

    def failure(self, where: str, error: BaseException) -> str:
        """A host failure inside the relay: counted, logged once per kind; returns its reason."""
        reason = f"internal_error:{where}"
        self.stats.failures += 1
        if (kind := f"{reason}:{type(error).__name__}") not in self._logged:
            self._logged.add(kind)
            logger.error("relay: %s failed; served by the stock path", where, exc_info=error)
        return reason

    def log_once(self, kind: str, text: str) -> None:
        if kind not in self._logged:
            self._logged.add(kind)
            logger.warning("relay: %s", text)
