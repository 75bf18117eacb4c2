"""The breaker: how seldom it trips on a sound model, how soon on a broken one, and how it recovers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from sglang_relay.breaker import (
    DEFAULT_EDGE,
    GROSS,
    RULE,
    UNCERTIFIED,
    Action,
    Band,
    Breaker,
    Breakers,
    Change,
    Rule,
    State,
)

EDGE = 0.01
BAND = Band(EDGE, "certificate")
SOUND, BAD, WORST = EDGE / 2, 2 * EDGE, 2 * GROSS * EDGE


def feed(breaker: Breaker, *kls: float) -> list[Change]:
    """Admit a request for each KL, audit it, and return the changes of state."""
    changes = [breaker.record(kl, breaker.admit().round) for kl in kls]
    return [c for c in changes if c is not None]


def tripped(rule: Rule = RULE) -> Breaker:
    breaker = Breaker(BAND, rule)
    feed(breaker, *[WORST] * 3)
    assert breaker.state is State.OPEN
    return breaker


def half_open(rule: Rule = RULE) -> Breaker:
    breaker = tripped(rule)
    while breaker.admit().action is Action.STOCK:
        pass
    assert breaker.state is State.HALF_OPEN
    return breaker


def audits_to_trip(draw: np.ndarray) -> int:
    """Audits until the breaker trips on the KLs of ``draw``, or their number."""
    breaker = Breaker(BAND)
    for count, kl in enumerate(draw.tolist(), 1):
        if breaker.record(kl, 0) is not None:
            return count
    return len(draw)


@pytest.mark.parametrize(
    ("above", "gross", "stated"),
    [(0.1, 0, 11_700), (0.098, 0.002, 7_700), (0.3, 0, 47), (0.5, 0, 15), (1, 0, 5), (0, 1, 3)],
)
def test_the_stated_delays_are_the_chain_s(above: float, gross: float, stated: float) -> None:
    assert RULE.mean_audits(above, gross) == pytest.approx(stated, rel=0.05)


@pytest.mark.parametrize(("above", "gross"), [(0.3, 0.0), (0.5, 0.0), (0.2, 0.1), (0.0, 1.0)])
def test_delays_of_real_breakers_are_the_chain_s(above: float, gross: float) -> None:
    rng = np.random.default_rng(1)
    kinds = rng.choice([SOUND, BAD, WORST], size=(400, 600), p=[1 - above - gross, above, gross])
    delays = [audits_to_trip(row) for row in kinds]
    spread = float(np.std(delays)) / math.sqrt(len(delays))
    assert np.mean(delays) == pytest.approx(RULE.mean_audits(above, gross), abs=4 * spread + 1e-9)


def test_false_alarms_under_the_certified_distribution_are_as_rare_as_stated() -> None:
    # Log-normal KLs with the edge at their true p90 and a spread as wide as the policy study's (median to p90 9x).
    sigma = math.log(9) / 1.2816
    draws = EDGE / 9 * np.exp(sigma * np.random.default_rng(2).standard_normal((60, 2000)))
    trips = sum(len(feed(breaker, *row.tolist())) for row in draws if (breaker := Breaker(BAND, Rule(rest=10**9))))
    gross = float((draws > GROSS * EDGE).mean())
    expected = draws.size / RULE.mean_audits(0.1 - gross, gross)
    assert 0 < trips <= expected + 4 * math.sqrt(expected)
    assert gross == pytest.approx(0.002, abs=5e-4) and expected < draws.size / 7000


@pytest.mark.parametrize("sigma", [0.5, 1.7])
def test_a_fault_is_caught_within_64_audits(sigma: float) -> None:
    # A fault that moves the median to the edge: half of the audits are above it.
    draws = EDGE * np.exp(sigma * np.random.default_rng(3).standard_normal((300, 64)))
    caught = [audits_to_trip(row) < 64 for row in draws]
    assert np.mean(caught) > 0.99


@pytest.mark.parametrize("kl", [WORST, math.inf, math.nan])
def test_gross_audits_trip_at_the_third(kl: float) -> None:
    breaker = Breaker(BAND)
    assert not feed(breaker, kl, kl)
    (change,) = feed(breaker, kl)
    assert change.state is breaker.state is State.OPEN
    assert breaker.trips == 1 and breaker.above == breaker.audits == 3


def test_the_edge_itself_is_inside_and_rounding_is_no_fault() -> None:
    breaker = Breaker(BAND)
    assert not feed(breaker, *[EDGE] * 50) and breaker.above == 0 and breaker.idle
    assert Breaker(Band(0.0, "policy full")).record(5e-5, 0) is None
    exact = Breaker(Band(0.0, "policy full"))
    assert not feed(exact, *[5e-5, -1e-9] * 50) and exact.idle


def test_open_serves_stock_for_its_rest_and_then_audits_everything() -> None:
    breaker = tripped()
    assert [breaker.admit().action for _ in range(RULE.rest)] == [Action.STOCK] * RULE.rest
    assert breaker.admit().action is Action.AUDIT
    assert breaker.state is State.HALF_OPEN


def test_good_trials_close_it_and_the_next_fault_trips_it_again() -> None:
    breaker = half_open()
    assert not feed(breaker, *[SOUND] * (RULE.good - 1))
    (change,) = feed(breaker, SOUND)
    assert change.state is breaker.state is State.CLOSED and breaker.reason is None
    assert breaker.admit().action is Action.RELAY
    assert [c.state for c in feed(breaker, *[WORST] * 3)] == [State.OPEN]
    while breaker.admit().action is Action.STOCK:
        pass
    assert not feed(breaker, *[SOUND] * (RULE.good - 1)), "a new round counts its good audits anew"


def test_one_audit_above_the_edge_starts_the_row_again() -> None:
    breaker = half_open()
    assert not feed(breaker, *[SOUND] * (RULE.good - 1), BAD, *[SOUND] * (RULE.good - 1))
    assert [c.state for c in feed(breaker, SOUND)] == [State.CLOSED]


@pytest.mark.parametrize("kls", [[WORST], [SOUND, BAD] * 16])
def test_a_failed_round_doubles_the_rest_up_to_its_bound(kls: list[float]) -> None:
    rule = Rule(rest=10, most_rest=35)
    breaker = half_open(rule)
    for rest in (20, 35, 35):
        assert [c.state for c in feed(breaker, *kls)] == [State.OPEN]
        served = [breaker.admit().action for _ in range(rest + 1)]
        assert served == [Action.STOCK] * rest + [Action.AUDIT]
    feed(breaker, *[SOUND] * rule.good, *[WORST] * 3)
    served = [breaker.admit().action for _ in range(rule.rest + 1)]
    assert served == [Action.STOCK] * rule.rest + [Action.AUDIT], "closing resets the rest"


def test_how_often_a_half_open_round_succeeds() -> None:
    rng = np.random.default_rng(4)

    def closes(above: float) -> float:
        rounds = [half_open(Rule(rest=1)) for _ in range(500)]
        for breaker in rounds:
            while breaker.state is State.HALF_OPEN:
                feed(breaker, BAD if rng.random() < above else SOUND)
        return float(np.mean([b.state is State.CLOSED for b in rounds]))

    assert closes(0.1) == pytest.approx(0.97, abs=0.025)
    assert closes(0.5) == pytest.approx(0.05, abs=0.03)


def test_late_audits_of_an_earlier_round_change_nothing() -> None:
    breaker = Breaker(BAND)
    early = breaker.admit().round
    feed(breaker, *[WORST] * 3)
    while breaker.admit().action is Action.STOCK:
        pass
    before = breaker.as_dict()
    assert breaker.record(WORST, early) is None
    assert all(breaker.record(SOUND, early) is None for _ in range(RULE.good))
    assert breaker.as_dict() == before | {"audits": before["audits"] + 1 + RULE.good, "above": before["above"] + 1}


def test_the_reason_says_what_was_seen() -> None:
    breaker = tripped()
    assert breaker.reason is not None
    for part in ("score 18 of 15", f"KL {WORST:.3g}", "0.01 (certificate)", "3 of 3 audits", "200 requests"):
        assert part in breaker.reason, breaker.reason


def test_equal_calls_give_equal_states() -> None:
    rng = np.random.default_rng(5)
    kls = rng.choice([SOUND, BAD, WORST], size=5000, p=[0.7, 0.2, 0.1]).tolist()
    ranks = [Breaker(BAND, Rule(rest=5)), Breaker(BAND, Rule(rest=5))]
    seen = set()
    for kl in kls:
        verdicts = [b.admit() for b in ranks]
        assert verdicts[0] == verdicts[1]
        seen.add(verdicts[0].action)
        if verdicts[0].action is not Action.STOCK:
            assert ranks[0].record(kl, verdicts[0].round) == ranks[1].record(kl, verdicts[1].round)
    assert seen == set(Action) and ranks[0].as_dict() == ranks[1].as_dict()


def test_without_a_certificate_the_band_is_the_wide_default() -> None:
    breaker = Breaker()
    assert breaker.band == UNCERTIFIED and breaker.band.edge == DEFAULT_EDGE
    assert not feed(breaker, *[0.09] * 100)
    assert [c.state for c in feed(breaker, *[2.0] * 3)] == [State.OPEN]


def test_breakers_are_one_per_tier_and_namespace() -> None:
    breakers = Breakers(lambda tier: Band({"probe@0.2": 0.01, "rotate": 0.2}[tier], "certificate"))
    feed(breakers.of("probe@0.2", "a"), *[WORST] * 3)
    assert breakers.of("probe@0.2", "a").state is State.OPEN
    assert breakers.of("probe@0.2", "b").state is State.CLOSED
    assert breakers.of("rotate", "a").state is State.CLOSED
    assert breakers.of("rotate", "a").band.edge == 0.2
    assert list(breakers.tripped()) == [("probe@0.2", "a")]
    sums = breakers.as_dict()
    assert sums["probe@0.2"]["open"] == 1 and sums["probe@0.2"]["closed"] == 1 and sums["probe@0.2"]["audits"] == 3
    assert sums["probe@0.2"]["reason"] and sums["rotate"]["reason"] is None


def test_new_namespaces_push_out_idle_breakers_before_closed_before_open() -> None:
    breakers = Breakers(lambda tier: BAND, most=3)
    feed(breakers.of("t", "open"), *[WORST] * 3)
    feed(breakers.of("t", "scored"), BAD)
    breakers.of("t", "idle")
    breakers.of("t", "new1")
    assert breakers.of("t", "open").state is State.OPEN
    assert not breakers.of("t", "scored").idle, "the idle one went first"
    for name in itertools.islice((f"new{i}" for i in itertools.count(2)), 50):
        feed(breakers.of("t", name), BAD)
    assert breakers.of("t", "open").state is State.OPEN, "clients cannot close a breaker by naming others"


def test_the_breaker_in_use_stays() -> None:
    breakers = Breakers(lambda tier: BAND, most=2)
    first, _ = breakers.of("t", "first"), breakers.of("t", "second")
    assert breakers.of("t", "first") is first
    breakers.of("t", "third")
    assert breakers.of("t", "first") is first
