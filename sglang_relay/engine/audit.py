"""Live audits: for a few relayed requests the exact distribution of the next token is computed too, and served.

How far the relayed one was from it goes to the breaker of the request's tier and tenant (``breaker.py``). The stock
forward that gives the exact answer overwrites whatever was placed, for the whole batch; what earlier chunks of a probed
prompt placed is computed in front of it (``recompute.py``).

An audit needs exact KV in front of what it judges. So it reaches a probed prompt, of however many chunks, in its last
one, and of a prompt that is repaired chunk by chunk the first chunk that reuses text. It does not reach what follows
approximate KV: later chunks of these, and prompts whose cached prefix a relayed request left (breaker.py,
``unreachable``).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sglang_relay.breaker import Action, Band, Breakers, Change
from sglang_relay.engine.consensus import Consensus
from sglang_relay.engine.namespaces import Tenant
from sglang_relay.engine.requests import RelayRequest
from sglang_relay.policies import Policy

if TYPE_CHECKING:
    from sglang_relay.plan import RelayPlan

logger = logging.getLogger(__name__)

AUDITED = "audited"
"""Why a request that was audited reports no reuse: it was served exactly."""
BREAKER_OPEN = "breaker_open"
QUOTA = 8
"""A tier's tenant whose last audit is this many mean gaps back is audited next. By chance so long a gap is one in
3,000, so that the mean stays."""


class Auditor:
    """Decisions are functions of counts and of a secret that all ranks share, made at points that all of them pass
    alike; ``KL`` is rank 0's.

    every: one reachable chunk in this many is audited, 0 for none. Which one is drawn for each by itself, so that no
    count of requests, whoever's, tells; secret: the key of the draws.
    """

    def __init__(self, consensus: Consensus, band_of: Callable[[str], Band], every: int, secret: str) -> None:
        self.breakers = Breakers(band_of)
        self._consensus = consensus
        self._every = every
        self._secret = secret.encode()
        self._draws = 0

    def trips(self, tier: str, tenant: Tenant) -> int:
        """How often ``tenant``'s requests of ``tier`` have tripped their breaker."""
        return self.breakers.trips(tier, tenant.digest)

    def admits(self, state: RelayRequest) -> bool:
        """Whether the request may relay; asked once per request, when donors have been found for it."""
        if state.verdict is None:
            state.breaker = self.breakers.of(state.controls.tier, state.tenant.digest)
            state.verdict = state.breaker.admit()
        return state.verdict.action is not Action.STOCK

    def choose(self, plans: Sequence[RelayPlan], states: Sequence[RelayRequest], policy: Policy) -> list[Action]:
        """What becomes of each plan of a batch; changes nothing. ``STOCK``: its breaker is half-open, and it cannot be
        audited."""
        return [
            self._action(plan, state, policy, self._draws + number)
            for number, (plan, state) in enumerate(zip(plans, states, strict=True), 1)
        ]

    def _action(self, plan: RelayPlan, state: RelayRequest, policy: Policy, draw: int) -> Action:
        if policy.exact or state.verdict is None or state.breaker is None:
            return Action.RELAY
        on_trial = state.verdict.action is Action.AUDIT
        if not _exact_before(state, policy):
            return Action.STOCK if on_trial else Action.RELAY
        if not _reachable(plan, policy):
            return Action.RELAY
        overdue = state.breaker.unaudited >= QUOTA * self._every > 0
        return Action.AUDIT if on_trial or overdue or self._drawn(draw) else Action.RELAY

    def _drawn(self, draw: int) -> bool:
        if not self._every:
            return False
        drawn = hashlib.blake2b(draw.to_bytes(8, "little"), key=self._secret, digest_size=8, person=b"audits").digest()
        return int.from_bytes(drawn, "little") % self._every == 0

    def count(
        self, plans: Sequence[RelayPlan], states: Sequence[RelayRequest], policy: Policy, actions: Sequence[Action]
    ) -> None:
        """The ranks have agreed on what ``choose`` said."""
        self._draws += len(plans)
        for plan, state, action in zip(plans, states, actions, strict=True):
            if policy.exact or state.verdict is None or state.breaker is None or action is Action.STOCK:
                continue
            exact = _exact_before(state, policy)
            if not exact or _reachable(plan, policy):
                state.breaker.count(reachable=exact, audited=action is Action.AUDIT)

    def record(self, states: Sequence[RelayRequest], measured: Callable[[], list[float]]) -> list[Change]:
        """Take in the audits of one batch. measured: this rank's values, one per state; rank 0's count."""
        values: list[float] | None = None
        try:
            values = measured()
        except Exception as error:
            logger.error("relay: an audit failed", exc_info=error)
        agreed: Any = self._consensus.broadcast(values)
        changes = []
        for state, kl in zip(states, agreed or (), strict=False):
            if state.verdict is None or state.breaker is None:
                continue
            change = state.breaker.record(kl, state.verdict.round)
            if change is not None:
                logger.warning("relay: %s is %s: %s", state.controls.tier, change.state, change.reason)
                changes.append(change)
        return changes


def _exact_before(state: RelayRequest, policy: Policy) -> bool:
    """Whether the KV in front of what is repaired next is exact; what a probe has yet to repair is part of that."""
    return (state.inherited_depth if policy.probes else state.depth) == 0


def _reachable(plan: RelayPlan, policy: Policy) -> bool:
    """Whether this chunk's repair can be judged by its last row's logits."""
    if policy.probes and not plan.last:
        return False
    return plan.pending is not None or any(not s.exact for s in plan.segments)


def divergence(relayed: torch.Tensor, exact: torch.Tensor) -> list[float]:
    """KL(exact || relayed), nats, of each row; logits [rows, vocab]."""
    p, q = exact.double().log_softmax(-1), relayed.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).tolist()
