"""The cost model (``cost.py``) at work: which pieces of a prompt are worth relaying, and what forwards really took.

Tensor parallel: decisions read published coefficients only. Which forwards are timed, when their times are taken in,
and after which of them the ranks publish depends on nothing but the batches, which all ranks have alike. A time is
taken in ``LAG`` timed forwards later: a device that is not there yet is not waited for, its forward is left out.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sglang_relay.cost import CostModel, Features, publishes_at, relay_features, stock_features, together
from sglang_relay.engine.consensus import Consensus, digest_of
from sglang_relay.engine.donors import EXACT_PREFIX
from sglang_relay.engine.timing import Stopwatch
from sglang_relay.plan import Candidate, RelayPlan
from sglang_relay.policies import row_layers

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_relay.budget import Budget
    from sglang_relay.engine.selection import Work
    from sglang_relay.policies import Policy

LAG = 2
"""Timed forwards between a forward and the reading of its time: the scheduler is at most one step ahead of the device,
so that it is known by then."""


class Costs:
    """layers: of the model. chunk: most rows of a prefill forward, None: no limit. probe_queries: as in the settings.
    failure: counts and logs a host failure (``RelayManager.failure``)."""

    def __init__(
        self,
        consensus: Consensus,
        failure: Callable[[str, BaseException], str],
        *,
        layers: int,
        chunk: int | None,
        probe_queries: int,
    ) -> None:
        self.model = CostModel()
        self.calibration_seconds: float | None = None
        """None while the start values are not measured."""
        self.off = False
        """Every prompt relays: the ranks did not publish alike."""
        self._consensus = consensus
        self._failure = failure
        self._layers = layers
        self._chunk = chunk
        self._probe_queries = probe_queries
        self._forwards: Counter[str] = Counter()
        self._waiting: deque[tuple[Features | None, Stopwatch | None]] = deque()
        self._taken = 0
        self._learnt = 0

    # ------------------------------------------------------------------ decisions

    def choose(
        self, rid: str, start: int, stop: int, pieces: list[Candidate], policy: Policy, budget: Budget | None
    ) -> tuple[list[Candidate], dict[str, float] | None]:
        """The ``pieces`` of prompt ``[start, stop)`` that are worth copying: all, those that continue the prefix
        exactly, or none. With fewer than all, the predicted milliseconds without the others (``stock``) and with them
        (``relay``). rid: the request's id."""
        if self.off or policy.exact or not pieces:
            return pieces, None
        ticket = digest_of(rid)
        kept: list[Candidate] = []
        without = stock_features(start, stop, self._chunk)
        whole = self._relayed(start, stop, pieces, policy, budget)
        exact = [p for p in pieces if p.donor == EXACT_PREFIX]
        if 0 < len(exact) < len(pieces):
            alone = self._relayed(start, stop, exact, policy, budget)
            if self.model.saves(without, alone, ticket=ticket):
                kept, without = exact, alone
        if self.model.saves(without, whole, ticket=ticket):
            return pieces, None
        predicted = {"stock": self.model.predict(without), "relay": self.model.predict(whole)}
        return kept, {name: round(1e3 * seconds, 3) for name, seconds in predicted.items()}

    def _relayed(
        self, start: int, stop: int, pieces: list[Candidate], policy: Policy, budget: Budget | None
    ) -> Features:
        share = policy.expected_share(budget)
        reused = [(p.start, p.stop) for p in pieces if p.donor != EXACT_PREFIX]
        exact = [(p.start, p.stop) for p in pieces if p.donor == EXACT_PREFIX]
        again = 0
        if policy.probes and reused:
            again = min(self._probe_queries, stop - reused[-1][1]) + self._repeated(start, stop, reused)
        return relay_features(start, stop, reused, share, exact=exact, probe_rows=again, chunk=self._chunk)

    def _repeated(self, start: int, stop: int, reused: list[tuple[int, int]]) -> int:
        """Fresh tokens behind the first reused one that earlier chunks compute; the last one, which repairs, computes
        them again."""
        if self._chunk is None:
            return 0
        last = start + (stop - 1 - start) // self._chunk * self._chunk
        copied = sum(max(0, min(b, last) - a) for a, b in reused)
        return max(0, last - reused[0][0] - copied)

    # ------------------------------------------------------------------ learning

    def time_stock(
        self, forward: Callable[..., Any], runner: Any, batch: ForwardBatch, *args: Any, **kwargs: Any
    ) -> Any:
        """Run ``forward``, ModelRunner.forward, and take the time of a prefill."""
        features = None
        try:
            measured = measurable(batch)
            if measured:
                features = together([stock_features(*r) for r in _ranges(batch)])
        except Exception as error:
            self._failure("time", error)
            measured = False
        if not measured:
            return forward(runner, batch, *args, **kwargs)
        watch = self.start(runner.device)
        output = forward(runner, batch, *args, **kwargs)
        self.take("stock", watch, lambda: features)
        return output

    def take_relayed(
        self,
        watch: Stopwatch | None,
        batch: ForwardBatch,
        policy: Policy,
        plans: Sequence[RelayPlan],
        work: Sequence[Work],
    ) -> None:
        """A relayed batch has been launched. One that repairs for earlier chunks is left out: its rows run again."""
        if measurable(batch) and not any(plan.pending for plan in plans):
            self.take("relay", watch, lambda: self._features(_ranges(batch), policy, plans, work))

    def _features(
        self, ranges: list[tuple[int, int]], policy: Policy, plans: Sequence[RelayPlan], work: Sequence[Work]
    ) -> Features:
        """Of a batch that ran: with the repair that it took, not the expected one."""
        found = {row: stock_features(*r) for row, r in enumerate(ranges)}
        for plan, done in zip(plans, work, strict=True):
            reused = [(s.start, s.stop) for s in plan.segments if not s.exact]
            exact = [(s.start, s.stop) for s in plan.segments if s.exact]
            placed = sum(b - a for a, b in reused)
            probe = min(self._probe_queries, plan.stop - reused[-1][1]) if policy.probes and plan.last and reused else 0
            rows = done.layers / row_layers(self._layers) - probe
            repair = min(1.0, max(0.0, rows / placed)) if placed else 0.0
            found[plan.row] = relay_features(plan.prefix, plan.stop, reused, repair, exact=exact, probe_rows=probe)
        return together(list(found.values()))

    def start(self, device: Any) -> Stopwatch | None:
        try:
            return Stopwatch(device)
        except Exception as error:
            self._failure("time", error)
            return None

    def take(self, path: str, watch: Stopwatch | None, features: Callable[[], Features | None]) -> None:
        """Called by all ranks after the same forwards. The first one of a path pays for what later ones find warm."""
        self._forwards[path] += 1
        if self._forwards[path] == 1:
            return
        found = None
        try:
            if watch is not None:
                watch.stop()
                found = features()
        except Exception as error:
            self._failure("time", error)
        self._waiting.append((found, watch))
        if len(self._waiting) > LAG:
            self._observe(*self._waiting.popleft())

    def _observe(self, features: Features | None, watch: Stopwatch | None) -> None:
        self._taken += 1
        try:
            if features is not None and watch is not None and not math.isnan(seconds := watch.seconds()):
                self.model.observe(features, seconds)
                self._learnt += 1
        except Exception as error:
            self._failure("observe", error)
        if publishes_at(self._taken):
            self._publish()

    def _publish(self) -> None:
        """A collective. Ranks without the same coefficients would decide differently: from then on none decides."""
        mine: Any = None
        try:
            if self._consensus.leads:
                mine = tuple(self.model.publish())
        except Exception as error:
            self._failure("publish", error)
        agreed: Any = self._consensus.broadcast(mine)
        loaded = True
        try:
            if agreed is not None:
                self.model.load(agreed)
        except Exception as error:
            loaded = False
            self._failure("publish", error)
        if not self._consensus.agree(loaded, digest_of(self.model.state())):
            self.off = True

    # ------------------------------------------------------------------ report

    def as_dict(self) -> dict[str, Any]:
        """For ``/server_info``; plain types only."""
        return {
            "deciding": not self.off,
            "coefficients": self.model.state()._asdict(),
            "calibration_seconds": self.calibration_seconds,
            "timed": self._taken,
            "learnt": self._learnt,
        }


def measurable(batch: ForwardBatch) -> bool:
    """A prefill and nothing else: no decoding rows, no logits beyond those of the last rows. Equal on all ranks."""
    return bool(
        batch.forward_mode.name == "EXTEND"
        and batch.extend_seq_lens_cpu
        and batch.extend_prefix_lens_cpu is not None
        and not batch.return_logprob
    )


def _ranges(batch: ForwardBatch) -> list[tuple[int, int]]:
    lens, prefixes = batch.extend_seq_lens_cpu or (), batch.extend_prefix_lens_cpu or ()
    return [(p, p + n) for p, n in zip(prefixes, lens, strict=True)]
