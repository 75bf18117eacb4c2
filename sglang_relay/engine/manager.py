"""The relay of one scheduler process: match at admission, plan per chunk, account for what ran.

Everything here is a pure function of state that all tensor-parallel ranks hold alike; ``Consensus`` confirms it.
A host failure is logged once, counted, and answered with the stock path.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sglang_relay.breaker import Action, Band
from sglang_relay.budget import Budget
from sglang_relay.config import RelayConfig
from sglang_relay.engine.accounting import begin_chunk, count_chunk, count_fallback, note_pending
from sglang_relay.engine.audit import BREAKER_OPEN, Auditor
from sglang_relay.engine.consensus import Consensus, digest_of
from sglang_relay.engine.costing import Costs
from sglang_relay.engine.donors import EXACT_PREFIX, Held
from sglang_relay.engine.guards import batch_reason, neighbour_reason, request_reason
from sglang_relay.engine.invariants import broken_invariant
from sglang_relay.engine.learning import Learning
from sglang_relay.engine.log import Log
from sglang_relay.engine.matching import Matcher
from sglang_relay.engine.namespaces import LONGEST_NAME, Namespaces, Tenant
from sglang_relay.engine.planning import Planner
from sglang_relay.engine.report import REPORT_KEY, Stats
from sglang_relay.engine.requests import Controls, RelayRequest, new_report, read_controls, relay_of
from sglang_relay.plan import Candidate, Decline, RelayPlan
from sglang_relay.policies import Policy, make_policies, row_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    from sglang_relay.engine.hidden import HiddenStates
    from sglang_relay.engine.influence import Influence
    from sglang_relay.engine.selection import Work
    from sglang_relay.engine.tools import ForwardTools
    from sglang_relay.engine.tree import RelayCache

logger = logging.getLogger(__name__)

T = TypeVar("T")

STOCK = "stock"
"""A batch in which nothing may be reused."""


@dataclass(slots=True, eq=False)
class BatchPlan:
    """A planned batch. ``plans[i].row`` indexes ``reqs``. Donor locks are held until they are released.

    actions: what becomes of each plan; of an audited one the relayed answer is compared with the exact one, which is
    then served.
    fell_back: why the batch ran on the stock path after all, or None; why: what more there is to say about it.
    """

    policy: Policy
    plans: list[RelayPlan]
    reqs: list[Req]
    held: list[Held]
    actions: list[Action] = field(default_factory=list)
    fell_back: str | None = None
    why: str | None = None

    @property
    def audits(self) -> list[int]:
        """The plans that are audited."""
        return [i for i, action in enumerate(self.actions) if action is Action.AUDIT]

    def states(self) -> list[RelayRequest]:
        """Of the plans' requests, all of which relay."""
        return [state for plan in self.plans if (state := relay_of(self.reqs[plan.row])) is not None]


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
        chunk: int | None,
        secret: str,
        base: int,
        isolated: bool,
        unsupported: list[str],
        budgets: Mapping[str, Budget],
        band_of: Callable[[str], Band],
    ) -> None:
        """``config.policy`` is a policy's name here; budgets: defaults of policies that differ from their own; chunk:
        most rows of a prefill forward, None without a limit."""
        self.config = config
        self.tree = tree
        self.consensus = consensus
        self.unsupported = unsupported
        self.auditor = Auditor(consensus, band_of, config.audit_every, secret)
        self.namespaces = Namespaces(secret, isolated, trips=self.auditor.trips)
        self.stats = Stats()
        self.learning = learning = Learning(
            config, tree, self.namespaces, self.stats, self.failure, base=base, unsupported=unsupported
        )
        self.donors = learning.donors
        self.influence: Influence | None = None
        self.influence_missing = "off"
        """Why there is none."""
        self.hidden: HiddenStates | None = None
        self.hidden_missing = "off"
        self.tools: ForwardTools | None = None
        """None where nothing will relay."""
        self.costs: Costs | None = None
        if config.cost_model and not unsupported:
            queries = config.probe_queries
            self.costs = Costs(consensus, self.failure, layers=num_layers, chunk=chunk, probe_queries=queries)
        self.matcher = Matcher(config, self.donors, learning.depths, self.namespaces, self.costs, chunk)
        self.layers = config.resolve_layer_range(num_layers)
        self.num_layers = num_layers
        self.chunk = chunk
        self._policies = make_policies(config, num_layers)
        for name, budget in budgets.items():
            self._policies[name].default_budget = budget
        self._log = Log(logger)
        self.planner = Planner(tree, self.donors, self._policies, pool_slots)
        self._outstanding: BatchPlan | None = None

    @property
    def default_tier(self) -> str:
        """The tier of a request that asks for nothing."""
        return self._controls(None).tier

    def policy_of(self, state: RelayRequest) -> Policy:
        return self._policies[state.controls.policy]

    def keep_hidden(self, hidden: HiddenStates) -> None:
        """Segments enter at its layer from now on."""
        self.hidden = hidden
        for policy in self._policies.values():
            policy.enters = hidden.layer if policy.start == hidden.layer else 0

    # ------------------------------------------------------------------ requests

    def adopt(self, req: Req, tenant: Tenant, *, has_multimodal: bool) -> None:
        """Give a new request of ``tenant`` its relay state and its namespace."""
        req.extra_key, why = self.namespaces.exact_key(tenant), None
        try:
            if tenant.too_long:
                raise Decline("name_too_long", f"extra_key and cache_salt: allowed are {LONGEST_NAME} characters")
            controls = self._controls(req.sampling_params.custom_params)
            declined = self._admission_reason(req, controls, tenant, has_multimodal)
        except Decline as decline:
            why = self.log_once(decline.reason, decline.detail)
            declined = self._unsupported_reason() or decline.reason
            controls = self._controls({"relay": "off"})
        report = new_report(None if declined else controls.policy, declined, why)
        if declined is None and self._policies[controls.policy].reads_influence:
            report["influence"] = f"unavailable:{self.influence_missing}" if self.influence is None else "none"
        if declined is None and self._policies[controls.policy].start is not None:
            report["entry"] = f"embeddings:{self.hidden_missing}" if self.hidden is None else "embeddings"
        state = RelayRequest(controls, tenant, self.namespaces.epoch, report, declined)
        req.relay = state  # type: ignore[attr-defined]
        req.customized_info = {**(req.customized_info or {}), REPORT_KEY: [report]}
        if declined is None:
            self.namespaces.note_tier(controls.tier)
            req.extra_key = self.namespaces.key(tenant, controls.tier)
        else:
            self.stats.decline(declined)

    def _controls(self, params: Any) -> Controls:
        return read_controls(params, self.config, self._policies)

    def agree_on(self, req: Req, tenant: Tenant, failed: str | None) -> None:
        """All ranks relay ``req`` in one namespace, or none does."""
        if self.unsupported or self.consensus.agree(failed is None, digest_of(req.rid, req.extra_key)):
            return
        reason = failed or "ranks_disagree"
        req.extra_key = self.namespaces.exact_key(tenant)
        controls = self._controls({"relay": "off"})
        report = new_report(None, reason)
        req.customized_info = {**(req.customized_info or {}), REPORT_KEY: [report]}
        state = RelayRequest(controls, tenant, self.namespaces.epoch, report, reason)
        req.relay = state  # type: ignore[attr-defined]
        self.stats.decline(reason)

    def _unsupported_reason(self) -> str | None:
        return f"unsupported:{self.unsupported[0]}" if self.unsupported else None

    def _admission_reason(self, req: Req, controls: Controls, tenant: Tenant, has_multimodal: bool) -> str | None:
        if self.unsupported:
            return self._unsupported_reason()
        if controls.mode != "on":
            return {"off": "relay_off", "exact": "exact_requested"}[controls.mode]
        if self.namespaces.unscoped(tenant):
            return "no_cache_salt"
        return request_reason(req, has_multimodal, primes=controls.primes)

    # ------------------------------------------------------------------ match

    def propose(self, req: Req) -> RelayRequest | None:
        """Choose the pieces of ``req``'s uncached prompt that donors hold; None if it does not relay.

        Called when the scheduler considers the request; cached until the index learns something new. A prompt in the
        middle of its chunks keeps its pieces: what a chunk's end has left of one may be too short to be found again.
        """
        state = relay_of(req)
        if state is None or not state.relays or self.unsupported:
            return None
        if req.return_hidden_states:  # wanted of every row that is computed, so none is copied; prefix hits stay
            state.shortfall = "hidden_states_requested"
            return None
        if req.prefix_len == state.reached and any(p.stop > state.reached for p in state.pieces):
            return state
        if state.pieces_version == self.learning.version and req.prefix_len in (state.pieces_from, state.reached):
            return state
        began = time.perf_counter()
        pieces: list[Candidate] = []
        failed = None
        digest = 0
        try:
            pieces = self._admitted(state, self.matcher.pieces(req, state, self.policy_of(state)))
            digest = digest_of(req.rid, [tuple(p) for p in pieces])
        except Exception as error:
            failed = self.failure("match", error)
        vote = self.consensus.vote(failed is None, digest)
        if vote.ok and not vote.equal:
            self.guarded("learn", None, self.learning.start_over)
        state.pieces, state.pieces_version, state.pieces_from = pieces, self.learning.version, req.prefix_len
        if not all(vote):
            state.pieces = []
            self._decline(state, failed or "ranks_disagree")
        elapsed = time.perf_counter() - began
        state.report["match_ms"] = round(state.report["match_ms"] + 1e3 * elapsed, 3)
        self.stats.match_seconds += elapsed
        return state

    def _admitted(self, state: RelayRequest, pieces: list[Candidate]) -> list[Candidate]:
        """``pieces``, or the exact ones of them where the request's breaker is open."""
        if all(p.donor == EXACT_PREFIX for p in pieces) or self.auditor.admits(state):
            return pieces
        state.shortfall = BREAKER_OPEN
        return [p for p in pieces if p.donor == EXACT_PREFIX]

    def company(self, req: Req) -> Policy | str | None:
        """What the batch that ``req`` joins has to be: of the policy under which it reuses text from here on, or
        repairs what it has reused; ``STOCK``, where nothing can be reused beside it; None where it may be either."""
        state = self.propose(req)
        if state is not None and (state.placed or any(p.stop > req.prefix_len for p in state.pieces)):
            return self.policy_of(state)
        return STOCK if neighbour_reason(req) else None

    def waited(self, req: Req) -> int:
        """How often ``req`` was left in the queue, as it could not join the batch."""
        state = relay_of(req)
        return 0 if state is None else state.waited

    def wait(self, req: Req) -> int:
        """``req`` is left in the queue. How often it was before."""
        before, state = self.waited(req), relay_of(req)
        if state is not None:
            state.waited += 1
        self.stats.waits += 1
        return before

    # ------------------------------------------------------------------ plan

    def plan(self, batch: ScheduleBatch) -> BatchPlan | None:
        """Plan the batch about to be allocated and lock its donors; None when nothing is reused.

        With several ranks every batch that holds a relaying request reaches the same agreement, planned or not.
        """
        began = time.perf_counter()
        self.release([] if self._outstanding is None else self._outstanding.held)
        states = [relay_of(r) for r in batch.reqs]
        try:
            for req, state in zip(batch.reqs, states, strict=True):
                if state is not None and begin_chunk(req, state, self.learning.depths):
                    follows = state.depth and state.controls.quote_tokens
                    state.quotes = self.learning.quotes.found(req) if follows else None
        except Exception as error:
            self.failure("report", error)
        relays = not self.unsupported and any(s is not None and s.relays for s in states)
        self._outstanding = planned = self._agreed_plan(batch, states) if relays else None
        self.guarded("report", None, self._count, batch, states, planned)
        self.stats.plan_seconds += time.perf_counter() - began
        return planned

    def _count(self, batch: ScheduleBatch, states: list[RelayRequest | None], planned: BatchPlan | None) -> None:
        plans = {} if planned is None else {p.row: p for p in planned.plans}
        for row, (req, state) in enumerate(zip(batch.reqs, states, strict=True)):
            if state is not None:
                plan = plans.get(row)
                before = state.report["declined"]
                count_chunk(req, state, plan, planned.policy if planned is not None else None)
                if (reason := state.report["declined"]) not in (None, before):
                    self.stats.decline(reason)

    def _agreed_plan(self, batch: ScheduleBatch, states: list[RelayRequest | None]) -> BatchPlan | None:
        planned, reason, why, digest = None, None, None, 0
        try:
            reason = batch_reason(batch) or self._broken_invariant(batch)
            planned = None if reason else self._plan(batch, states)
            shapes = [] if planned is None else list(map(_shape, planned.plans, planned.actions))
            digest = digest_of(batch.batch_size(), shapes)
        except Decline as decline:
            reason, why = decline.reason, decline.detail
        except Exception as error:
            reason = self.failure("plan", error)
        if not self.consensus.agree(reason is None, digest):
            if planned is not None:
                self.release(planned.held)
            reason = reason or "ranks_disagree"
            for state in states:
                if state is not None and state.relays and state.pieces:
                    self._decline(state, reason, why)
            return None
        # From here on the ranks run the same plans, whatever fails on one of them alone.
        if planned is not None:
            self.guarded("plan", None, self.donors.touch, planned.held)
            self.guarded("plan", None, self._settle, planned)
            if not planned.plans:
                self.release(planned.held)
                return None
        return planned

    def _broken_invariant(self, batch: ScheduleBatch) -> str | None:
        broken = broken_invariant(batch, self.chunk)
        if broken is not None:
            self.stats.failures += 1
            self.log_once(broken, f"an admitted batch breaks an invariant of SGLang's scheduler: {broken}")
        return broken

    def _plan(self, batch: ScheduleBatch, states: list[RelayRequest | None]) -> BatchPlan | None:
        held: list[Held] = []
        try:
            made = self.planner.plan(batch, states, self._decline, held)
            if made is None:
                return None
            planned = BatchPlan(made.policy, made.plans, list(batch.reqs), held)
            planned.actions = self.auditor.choose(planned.plans, planned.states(), planned.policy)
        except BaseException:
            self.release(held)
            raise
        return planned

    def _settle(self, planned: BatchPlan) -> None:
        """The ranks have agreed on ``planned``: count, and leave out the plans that are served stock."""
        plans, actions, states = planned.plans, planned.actions, planned.states()
        planned.plans = [p for p, a in zip(plans, actions, strict=True) if a is not Action.STOCK]
        planned.actions = [a for a in actions if a is not Action.STOCK]
        self.auditor.count(plans, states, planned.policy, actions)
        for state, action in zip(states, actions, strict=True):
            if action is Action.STOCK:
                state.verdict = state.verdict and state.verdict._replace(action=action)
                state.pieces = [p for p in state.pieces if p.donor == EXACT_PREFIX]
                self._decline(state, BREAKER_OPEN)

    # ------------------------------------------------------------------ run

    def finish(self, planned: BatchPlan) -> None:
        """The batch's copies are launched, or it failed: note depths, drop the donor locks."""
        try:
            for plan in planned.plans:
                req = planned.reqs[plan.row]
                state = relay_of(req)
                if state is None:
                    continue
                if planned.fell_back is not None:
                    count_fallback(req, state, plan, planned.policy)
                    self._decline(state, planned.fell_back, planned.why)
                elif not planned.policy.exact:
                    self.learning.mark_depth(req, state, plan)
                    note_pending(state, plan, planned.policy)
        except Exception as error:
            self.failure("finish", error)
        finally:
            self.release(planned.held)
            self._outstanding = None

    def record_audits(self, planned: BatchPlan, measured: Callable[[], list[float]]) -> None:
        """The exact answer of an audited batch is served; ``measured`` says how far the relayed one was from it."""
        states = [s for i in planned.audits if (s := relay_of(planned.reqs[planned.plans[i].row])) is not None]
        self.guarded("audit", None, self.auditor.record, states, measured)
        self.guarded("report", None, self.stats.audit, len(states))

    def count_work(self, planned: BatchPlan, work: list[Work]) -> None:
        """``work[i]``: what the repair of plan ``i`` took."""
        for plan, done in zip(planned.plans, work, strict=True):
            reused = sum(s.length for s in plan.segments if not s.exact)
            state = relay_of(planned.reqs[plan.row])
            if state is not None:
                report = state.report
                # After a retraction a chunk also extends outputs, whose selected rows are no part of the prompt.
                inside = min(done.selected, report["relayed"])
                report["relayed"] -= inside
                report["recomputed"] += inside
                state.reused += reused
                state.layers += done.layers
                if self.hidden is not None and planned.policy.enters:
                    report["entry"] = "hidden" if done.entered else "embeddings:not_held"
                if done.influence:
                    report["influence"] = "used"
                if done.unselected is not None and state.controls.quote_tokens:
                    state.quotes = self.learning.quotes.placed(planned.reqs[plan.row], state.quotes, done.unselected)
                self._report_cost(state)

    def _report_cost(self, state: RelayRequest) -> None:
        if approximate := state.reused + state.inherited:
            state.report["cost"] = round(state.layers / (approximate * self.num_layers), 4)

    def count_quoted(self, state: RelayRequest, positions: np.ndarray) -> None:
        """Reused tokens at these positions of a request's prompt have been recomputed while it decodes."""
        report, found = state.report, int(np.searchsorted(positions, state.inherited_stop))
        for kind, count in (("approximate", found), ("relayed", len(positions) - found)):
            inside = min(count, report[kind])
            report[kind] -= inside
            report["recomputed"] += inside
        report["quoted"] += len(positions)
        state.layers += len(positions) * row_layers(self.num_layers)
        self._report_cost(state)

    def finished(self, req: Req) -> None:
        """``req`` has its whole answer, and so its whole report."""
        if (state := relay_of(req)) is not None:
            self.stats.finished(state.report)

    # ------------------------------------------------------------------ failures

    def _decline(self, state: RelayRequest, reason: str, why: str | None = None) -> None:
        said = self.log_once(reason, why or "a chunk was served by exact prefill")
        state.report["declined"], state.report["why"] = reason, said if why else None
        self.stats.decline(reason)

    def failure(self, where: str, error: BaseException) -> str:
        """A host failure inside the relay: counted, logged once per kind; returns its reason."""
        reason = f"internal_error:{where}"
        self.stats.failures += 1
        self._log.failure(where, error)
        return reason

    def guarded(self, where: str, otherwise: T, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """What ``call`` returns, ``otherwise`` after a failure. SGLang's scheduler calls nothing of the relay but
        through here, or through what catches as much itself: it never sees an exception of ours."""
        try:
            return call(*args, **kwargs)
        except Exception as error:
            self.failure(where, error)
            return otherwise

    def release(self, held: list[Held]) -> None:
        self.guarded("release", None, self.donors.release, held)

    def weights_change(self, scheduler: Any, *, begin: bool) -> None:
        """Weights are about to change (``begin``) or have changed. Where a rank cannot forget what was learnt of the
        old ones, none relays any more."""
        try:
            waiting = [*scheduler.waiting_queue, *scheduler.grammar_manager.grammar_queue]
            self.learning.on_weights(waiting, begin=begin)
            failed = False
        except Exception as error:
            failed = bool(self.failure("weights", error))
        if not self.consensus.agree(not failed, 0) and not self.unsupported:
            self.unsupported.append("internal_error:weights")

    def log_once(self, reason: str, text: str) -> str:
        """Returns ``text`` as it may be shown (log.py, ``plain``)."""
        return self._log.once(reason, text)


def _shape(plan: RelayPlan, action: Action) -> tuple:
    waiting = None if plan.pending is None else (plan.pending.start, plan.pending.placed)
    segments = [(s.start, s.stop, s.source, s.depth, s.exact) for s in plan.segments]
    return plan.row, plan.prefix, plan.stop, waiting, segments, action
