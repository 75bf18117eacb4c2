"""Live audits: for a few relayed requests the exact distribution of the next token is computed too, and served.

How far the relayed one was from it goes to the breaker of the request's tier and tenant (``breaker.py``). Audited are
requests whose KV before the segments is exact and whose repair ends in this chunk; the stock forward that gives the
exact answer overwrites whatever was placed, for the whole batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from sglang_relay.breaker import Action, Band, Breaker, Breakers, Change
from sglang_relay.engine.consensus import Consensus
from sglang_relay.engine.requests import RelayRequest

if TYPE_CHECKING:
    from sglang_relay.plan import RelayPlan

logger = logging.getLogger(__name__)

AUDITED = "audited"
"""Why a request that was audited reports no reuse: it was served exactly."""
BREAKER_OPEN = "breaker_open"


class Auditor:
    """Decisions are functions of counts alone, made at points that all ranks pass alike; ``KL`` is rank 0's.

    every: one auditable request in this many is audited, 0 for none. seed: where the first one falls.
    """

    def __init__(self, consensus: Consensus, band_of: Callable[[str], Band], every: int, seed: int) -> None:
        self.breakers = Breakers(band_of)
        self._consensus = consensus
        self._every = every
        self._until = seed % every if every else -1

    def admits(self, state: RelayRequest) -> bool:
        """Whether the request may relay; asked once per request, when donors have been found for it."""
        verdict = state.verdict
        if verdict is None:
            verdict = state.verdict = self._breaker(state).admit(auditable=state.depth == 0)
        return verdict.action is not Action.STOCK

    def choose(self, plans: Sequence[RelayPlan], states: Sequence[RelayRequest]) -> list[int] | None:
        """Which of an agreed batch's plans are audited; None if one has to be and cannot: the batch goes stock."""
        chosen = []
        for number, (plan, state) in enumerate(zip(plans, states, strict=True)):
            # A prompt of several chunks has approximate KV, or exact KV of its own, before this one.
            auditable = plan.last and plan.pending is None and state.depth == 0
            due = state.verdict is not None and state.verdict.action is Action.AUDIT
            if due and not auditable:
                return None
            if auditable and not due and self._every:
                self._until -= 1
                if self._until < 0:
                    self._until, due = self._every - 1, True
            if due:
                chosen.append(number)
        return chosen

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
            if state.verdict is None:
                continue
            change = self._breaker(state).record(kl, state.verdict.round)
            if change is not None:
                logger.warning("relay: %s is %s: %s", state.controls.tier, change.state, change.reason)
                changes.append(change)
        return changes

    def _breaker(self, state: RelayRequest) -> Breaker:
        return self.breakers.of(state.controls.tier, state.tenant)


def divergence(relayed: torch.Tensor, exact: torch.Tensor) -> list[float]:
    """KL(exact || relayed), nats, of each row; logits [rows, vocab]."""
    p, q = exact.double().log_softmax(-1), relayed.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).tolist()
