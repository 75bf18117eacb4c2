"""Turns relay off where live audits leave the certified band, and on again after trials.

An audit is one relayed request whose next-token distribution was also computed exactly; its KL(exact || relayed), in
nats, is scored against the band of its policy: at most ``edge`` -1, above it +3, above ``GROSS`` times it (or not a
number) +6; the running sum never falls below 0, and 15 trips the breaker (a Bernoulli CUSUM, Page 1954; Reynolds and
Stoumbos 1999). ``edge`` bounds the 90th percentile from above, so at most one audit in ten is above it while the
certificate holds. What follows, in audits (``Rule.mean_audits``, exact; the tests simulate it):

==========================================  =======================
fault                                       mean audits to the trip
==========================================  =======================
none (10 % above, none gross)               11,700
none (10 % above, of them 1 in 50 gross)    7,700
three of ten above                          47
half above                                  15
all above                                   5
all gross                                   3
==========================================  =======================

A log-normal with a p90 of nine medians, about as wide as the policy study's samples, has one gross audit in 50 above
the edge. With one request in 200 audited, a sound model then trips once in 1.5 million relayed requests.

There is no clock and no randomness, only counts of requests: tensor-parallel ranks that make the same calls hold the
same state. Which requests are audited is decided elsewhere (engine/audit.py).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np

GROSS = 16.0
"""A KL above this many times the band's edge is gross."""
ROUNDING = 1e-4
"""Nats; no edge lies below it: there a KL between two exact passes is bf16 rounding."""
DEFAULT_EDGE = 0.1
"""Nats; the edge where no certificate speaks. It lies above the p90 of every policy of the policy study, rotation alone
included (.089), so that a sound model is not switched off. The price: only faults that large are seen; a repair that
has become useless is not. A certificate narrows it."""


class State(StrEnum):
    CLOSED = "closed"
    """Relay is on; a sample is audited."""
    OPEN = "open"
    """Relay is off."""
    HALF_OPEN = "half-open"
    """Every request that an audit can reach is audited, and served the exact answer; all others are served stock."""


class Action(StrEnum):
    RELAY = "relay"
    AUDIT = "audit"
    STOCK = "stock"


class Band(NamedTuple):
    """Where audits of a sound model lie. edge: nats, an upper bound of their 90th percentile; source: who says so."""

    edge: float
    source: str


UNCERTIFIED = Band(DEFAULT_EDGE, "default, no certificate")


_ACTIONS = {State.CLOSED: Action.RELAY, State.OPEN: Action.STOCK, State.HALF_OPEN: Action.AUDIT}


class Verdict(NamedTuple):
    """What to do with a request, and the round it belongs to: hand it back with the audit's result."""

    action: Action
    round: int


class Change(NamedTuple):
    """A breaker changed its state, and why, as text for the log."""

    state: State
    reason: str


@dataclass(frozen=True, slots=True)
class Rule:
    """Numbers of the sequential rule.

    above, gross, inside: steps of the score for an audit above the edge, above ``GROSS`` edges, and inside; limit:
    score that trips. rest: requests served stock before the first half-open round; doubled at every round that fails,
    up to most_rest. good: audits inside the band in a row that close a half-open breaker; trials: audits after which a
    half-open round without them has failed. Of a sound model's rounds (10 % above) 97 % end closed; with half the
    audits above, 5 %.
    """

    above: int = 3
    gross: int = 6
    inside: int = -1
    limit: int = 15
    rest: int = 200
    most_rest: int = 12_800
    good: int = 8
    trials: int = 32

    def mean_audits(self, above: float, gross: float = 0.0) -> float:
        """Mean number of audits until a closed breaker trips, where a share ``above`` lies between one and ``GROSS``
        edges and a share ``gross`` beyond. Exact: expected absorption time of the score's Markov chain."""
        steps = ((1.0 - above - gross, self.inside), (above, self.above), (gross, self.gross))
        system = np.eye(self.limit)
        for score in range(self.limit):
            for chance, step in steps:
                to = max(0, score + step)
                if to < self.limit:
                    system[score, to] -= chance
        return float(np.linalg.solve(system, np.ones(self.limit))[0])


RULE = Rule()


class Breaker:
    """The breaker of one policy tier in one namespace.

    Ask ``admit`` for every request that would relay; hand every audit's result to ``record`` with the verdict's round.
    """

    def __init__(self, band: Band = UNCERTIFIED, rule: Rule = RULE) -> None:
        self.band = band._replace(edge=max(band.edge, ROUNDING))
        self.rule = rule
        self.state = State.CLOSED
        self.reason: str | None = None
        """Why relay is off; None while the breaker is closed."""
        self.audits = 0
        self.above = 0
        self.trips = 0
        self.reachable = 0
        self.unreachable = 0
        """Relayed chunks that an audit could reach, and those that none could."""
        self.unaudited = 0
        """Reachable ones since the last audit."""
        self._score = 0
        self._round = 0
        self._row = 0
        self._trials = 0
        self._rest = rule.rest
        self._resting = 0

    @property
    def idle(self) -> bool:
        """Whether it says nothing that a new breaker would not say: it never tripped, and has no score."""
        return self.trips == 0 and self._score == 0

    def admit(self) -> Verdict:
        """What to do with the next request. ``AUDIT`` where it can be reached, else it is to be served stock."""
        if self.state is State.OPEN:
            self._resting -= 1
            if self._resting < 0:
                self._enter(State.HALF_OPEN)
        return Verdict(_ACTIONS[self.state], self._round)

    def count(self, *, reachable: bool, audited: bool) -> None:
        """A chunk is relayed. reachable: whether an audit could reach it; audited: whether one does."""
        self.reachable += reachable
        self.unreachable += not reachable
        self.unaudited = 0 if audited else self.unaudited + reachable

    def record(self, kl: float, round: int) -> Change | None:
        """Take in one audit; returns the change of state it caused.

        An audit of an earlier round is counted and otherwise ignored: it tells of a state that was judged already.
        A KL that is not a number is gross: that is what corrupted logits give.
        """
        sound = not math.isnan(kl)
        above = not sound or kl > self.band.edge
        self.audits += 1
        self.above += above
        if round != self._round:
            return None
        gross = not sound or kl > GROSS * self.band.edge
        if self.state is State.HALF_OPEN:
            return self._trial(kl, above, gross)
        step = self.rule.gross if gross else self.rule.above if above else self.rule.inside
        self._score = max(0, self._score + step)
        if self._score < self.rule.limit:
            return None
        return self._open(f"score {self._score} of {self.rule.limit}", kl)

    def _trial(self, kl: float, above: bool, gross: bool) -> Change | None:
        self._trials += 1
        self._row = 0 if above else self._row + 1
        if self._row >= self.rule.good:
            self._rest = self.rule.rest
            self.reason = None
            self._enter(State.CLOSED)
            return Change(State.CLOSED, f"{self.rule.good} audits in a row at most {self._edge()}")
        if not gross and self._trials < self.rule.trials:
            return None
        self._rest = min(2 * self._rest, self.rule.most_rest)
        return self._open("gross in a trial" if gross else f"{self._trials} trials without {self.rule.good} good", kl)

    def _open(self, why: str, kl: float) -> Change:
        self.trips += 1
        self.reason = (
            f"{why}; last audit KL {kl:.3g}, band {self._edge()}, {self.above} of {self.audits} audits above it; "
            f"stock for {self._rest} requests"
        )
        self._resting = self._rest
        self._enter(State.OPEN)
        return Change(State.OPEN, self.reason)

    def _enter(self, state: State) -> None:
        self.state = state
        self._round += 1
        self._score = self._row = self._trials = 0

    def _edge(self) -> str:
        return f"{self.band.edge:.3g} ({self.band.source})"

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for ``/server_info``."""
        return {
            "state": str(self.state),
            "reason": self.reason,
            "score": self._score,
            "audits": self.audits,
            "above": self.above,
            "trips": self.trips,
            "reachable": self.reachable,
            "unreachable": self.unreachable,
            "edge": self.band.edge,
            "source": self.band.source,
        }


class Key(NamedTuple):
    """What one breaker watches. tier: policy and budget (``Controls.tier``); namespace: the tenant."""

    tier: str
    namespace: Hashable


_SUMS = ("audits", "above", "trips", "reachable", "unreachable")


class Breakers:
    """The breakers of one server, made when first asked for, at most ``most`` of them.

    Tenants are named by clients, so their number must be bounded: the least recently used breaker goes first that is
    idle, then one that is closed, and an open one only if all are open. A breaker that went and comes back is a new
    one.
    """

    def __init__(self, band_of: Callable[[str], Band], rule: Rule = RULE, most: int = 4096) -> None:
        self._band_of = band_of
        self._rule = rule
        self._most = most
        self._held: OrderedDict[Key, Breaker] = OrderedDict()

    def of(self, tier: str, namespace: Hashable) -> Breaker:
        key = Key(tier, namespace)
        if key not in self._held:
            if len(self._held) >= self._most:
                del self._held[self._victim()]
            self._held[key] = Breaker(self._band_of(tier), self._rule)
        self._held.move_to_end(key)
        return self._held[key]

    def trips(self, tier: str, namespace: Hashable) -> int:
        """How often that breaker has tripped; makes none."""
        held = self._held.get(Key(tier, namespace))
        return 0 if held is None else held.trips

    def tripped(self) -> dict[Key, Breaker]:
        """The breakers that are not closed."""
        return {key: b for key, b in self._held.items() if b.state is not State.CLOSED}

    def as_dict(self) -> dict[str, Any]:
        """Sums per tier, for ``/server_info``; namespaces are counted, not named: they hold tenants' salts."""
        tiers: dict[str, dict[str, Any]] = {}
        for key, breaker in self._held.items():
            one = breaker.as_dict()
            sums = tiers.setdefault(
                key.tier,
                {s.value: 0 for s in State} | dict.fromkeys(_SUMS, 0) | {"reason": None},
            )
            sums[one["state"]] += 1
            for name in _SUMS:
                sums[name] += one[name]
            sums["reason"] = one["reason"] or sums["reason"]
            sums |= {"edge": one["edge"], "source": one["source"]}
        return tiers

    def _victim(self) -> Key:
        closed = [key for key, b in self._held.items() if b.state is State.CLOSED]
        for key in closed:
            if self._held[key].idle:
                return key
        return closed[0] if closed else next(iter(self._held))
