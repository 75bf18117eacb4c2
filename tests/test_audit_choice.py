"""Who is audited: by chance that nobody can count on, and, on trial, everybody whom an audit can reach."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from sglang_relay.breaker import Action, Band, State
from sglang_relay.config import RelayConfig
from sglang_relay.engine.audit import QUOTA, Auditor
from sglang_relay.engine.consensus import Consensus
from sglang_relay.engine.namespaces import Namespaces, Tenant
from sglang_relay.engine.requests import RelayRequest, new_report, read_controls
from sglang_relay.plan import Pending, Placed, RelayPlan, Segment
from sglang_relay.policies import make_policies

EVERY = 200
STEPS = 100_000
BAND = Band(0.01, "certificate")
CONFIG = RelayConfig(policy="probe")
POLICIES = make_policies(CONFIG, 6)


def auditor(secret: str = "5ec4e7", every: int = EVERY) -> Auditor:
    return Auditor(Consensus(None), lambda tier: BAND, every, secret)


def request(name: str, policy: str = "probe", *, inherited: int = 0) -> RelayRequest:
    controls = read_controls({"relay_policy": policy}, CONFIG, POLICIES)
    state = RelayRequest(controls, Tenant(name, None, None), 0, new_report(policy, None))
    state.depth = state.inherited_depth = inherited
    return state


def chunk(*, first: bool = True, last: bool = True, exact: bool = False) -> RelayPlan:
    """64 reused tokens of a chunk of 100; a prompt's chunks follow each other at 0 and 100."""
    prefix = 0 if first else 100
    segment = Segment(prefix + 8, prefix + 72, 0, 0, torch.arange(1, 65), exact, prefix + 72, 0)
    pending = None if first else Pending(8, (Placed(8, 72, 72, 0),), torch.zeros(92).numpy())
    return RelayPlan(0, prefix, prefix + 100, (segment,), None, last, pending)


def ask(audits: Auditor, state: RelayRequest, plan: RelayPlan | None = None) -> Action:
    """One request in a batch of its own: found donors for, planned, agreed on."""
    if not audits.admits(state):
        return Action.STOCK
    plans, policy = [plan or chunk()], POLICIES[state.controls.policy]
    actions = audits.choose(plans, [state], policy)
    audits.count(plans, [state], policy, actions)
    return actions[0]


def trip(audits: Auditor, name: str, policy: str = "probe") -> None:
    state = request(name, policy)
    while audits.admits(state):
        audits.record([state], lambda: [math.inf])
        state.verdict = None


def half_open(audits: Auditor, name: str, policy: str = "probe") -> None:
    trip(audits, name, policy)
    while not audits.admits(request(name, policy)):
        pass


# ---------------------------------------------------------------------- shares


def within(audited: int, asked: int) -> bool:
    """Whether so many audits are a sample of one in EVERY: five standard deviations."""
    mean = asked / EVERY
    return abs(audited - mean) <= 5 * math.sqrt(mean)


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 5, 8, 10])
def test_clients_that_take_turns_are_audited_alike(clients: int) -> None:
    audits, found = auditor(), Counter[int]()
    for step in range(STEPS):
        client = step % clients
        found[client] += ask(audits, request(str(client))) is Action.AUDIT
    assert all(within(found[client], STEPS // clients) for client in range(clients)), found
    assert within(found.total(), STEPS)


def always(seen: list[bool]) -> bool:
    return True


def at_the_old_gap(seen: list[bool]) -> bool:
    """In front of the request that a count of one in EVERY would audit."""
    return len(seen) >= EVERY and seen[-EVERY] and not any(seen[-EVERY + 1 :])


def after_quiet(seen: list[bool]) -> bool:
    """As long as nobody has been audited for a mean gap."""
    return not any(seen[-EVERY:])


@pytest.mark.parametrize("steps_in", [always, at_the_old_gap, after_quiet])
def test_who_counts_cannot_keep_a_victim_unaudited(steps_in: Callable[[list[bool]], bool]) -> None:
    """An adversary sees every audit there is, and sends requests of his own in front of the victim's when he likes."""
    audits, seen = auditor(), list[bool]()
    asked, audited, gap, longest = 0, 0, 0, 0
    while len(seen) < STEPS:
        if steps_in(seen):
            seen.append(ask(audits, request("adversary")) is Action.AUDIT)
        hit = ask(audits, request("victim")) is Action.AUDIT
        seen.append(hit)
        asked, audited, gap = asked + 1, audited + hit, 0 if hit else gap + 1
        longest = max(longest, gap)
    assert within(audited, asked), (audited, asked)
    assert longest <= QUOTA * EVERY


def test_a_flood_of_tenants_changes_no_victim_s_share() -> None:
    """Each with a name of its own, so many that the victim's breaker is pushed out between two of its requests."""
    audits, names, audited = auditor(every=4), itertools.count(), 0
    audits.breakers._most = 8
    for _ in range(2000):
        audited += ask(audits, request("victim")) is Action.AUDIT
        for _ in range(9):
            ask(audits, request(f"other {next(names)}"))
    assert abs(audited - 500) <= 5 * math.sqrt(500 * 3 / 4)
    assert len(audits.breakers._held) == 8


def test_a_quota_bounds_the_longest_gap() -> None:
    """Whatever the draws say."""
    audits = auditor()
    audits._drawn = lambda draw: False  # type: ignore[method-assign]
    actions = [ask(audits, request(name)) for _ in range(2 * QUOTA * EVERY) for name in ("a", "b")]
    for mine in (actions[::2], actions[1::2]):
        assert mine.index(Action.AUDIT) == QUOTA * EVERY and mine.count(Action.AUDIT) == 1


def test_ranks_draw_alike_and_servers_do_not() -> None:
    def drawn(secret: str) -> list[Action]:
        audits = auditor(secret, every=10)
        return [ask(audits, request("a")) for _ in range(1000)]

    assert drawn("one") == drawn("one") != drawn("other")
    assert set(drawn("one")) == {Action.RELAY, Action.AUDIT}


def test_a_choice_that_is_not_agreed_on_changes_nothing() -> None:
    audits, state = auditor(every=2), request("a")
    assert audits.admits(state)
    chosen = [audits.choose([chunk()], [state], POLICIES["probe"]) for _ in range(50)]
    assert chosen == chosen[:1] * 50


def test_off_is_off() -> None:
    audits = auditor(every=0)
    assert {ask(audits, request("a")) for _ in range(1000)} == {Action.RELAY}


# ---------------------------------------------------------------------- reach


def test_an_audit_reaches_a_probed_prompt_of_several_chunks_in_its_last() -> None:
    audits, state = auditor(every=1), request("a")
    assert ask(audits, state, chunk(last=False)) is Action.RELAY
    state.depth = 1  # what the first chunk placed, and the last one repairs
    assert ask(audits, state, chunk(first=False)) is Action.AUDIT


@pytest.mark.parametrize("policy", ["relay", "cacheblend", "legolink", "rotate"])
def test_an_audit_reaches_the_first_chunk_of_a_prompt_repaired_chunk_by_chunk(policy: str) -> None:
    audits, state = auditor(every=1), request("a", policy)
    assert ask(audits, state, chunk(last=False)) is Action.AUDIT
    later = request("b", policy)
    later.depth = 1
    assert ask(audits, later, chunk(first=False)) is Action.RELAY


def test_a_copy_of_exact_kv_is_no_use_to_an_audit() -> None:
    assert ask(auditor(every=1), request("a"), chunk(exact=True)) is Action.RELAY


def test_the_breaker_knows_what_no_audit_reaches() -> None:
    audits = auditor(every=1)
    for name, inherited in (("a", 0), ("a", 2), ("b", 1)):
        ask(audits, request(name, inherited=inherited))
    ask(audits, request("a", "full"))
    tiers = audits.breakers.as_dict()
    assert (tiers["probe@0.2"]["reachable"], tiers["probe@0.2"]["unreachable"]) == (1, 2)
    assert (tiers["full"]["reachable"], tiers["full"]["unreachable"]) == (0, 0)


# ---------------------------------------------------------------------- half-open


def test_on_trial_only_who_cannot_be_audited_is_served_stock() -> None:
    audits = auditor(every=0)
    half_open(audits, "offender")
    for _ in range(1000):
        batch = [request("offender", inherited=1), request("mate")]
        assert all(audits.admits(state) for state in batch)
        assert audits.choose([chunk(), chunk()], batch, POLICIES["probe"]) == [Action.STOCK, Action.RELAY]


@pytest.mark.parametrize("policy", ["probe", "rotate"])
def test_prompts_of_several_chunks_end_a_half_open_breaker(policy: str) -> None:
    audits, trials = auditor(every=0), 0
    half_open(audits, "a", policy)
    breaker = audits.breakers.of(request("a", policy).controls.tier, request("a").tenant.digest)
    while breaker.state is State.HALF_OPEN:
        state = request("a", policy)
        actions = [ask(audits, state, chunk(last=False)), ask(audits, state, chunk(first=False))]
        assert Action.STOCK not in actions
        for _ in range(actions.count(Action.AUDIT)):
            audits.record([state], lambda: [0.0])
            trials += 1
    assert breaker.state is State.CLOSED and trials == 8


def test_what_was_relayed_before_a_trip_is_not_found_after_it() -> None:
    """Else a conversation over it could not be audited, and would keep the breaker half-open."""
    audits = auditor(every=0)
    spaces = Namespaces("5ec4e7", trips=audits.trips)
    tenant, other = Tenant("a", None, None), Tenant("b", None, None)
    tier = request("a").controls.tier
    keys = [spaces.key(tenant, tier)]
    for _ in range(3):
        half_open(audits, "a")
        keys.append(spaces.key(tenant, tier))
    assert len(set(keys)) == 4
    assert spaces.key(other, tier) == spaces.key(other, tier).replace("#", "")
    assert spaces.key(tenant, "rotate") == Namespaces("5ec4e7").key(tenant, "rotate"), "another tier has not tripped"


def test_names_of_any_length_are_kept_as_digests() -> None:
    audits, rng = auditor(), random.Random(1)
    for _ in range(20):
        long = "".join(rng.choices("ab", k=100)) * 10_000
        for tenant in (Tenant(long, None, None), Tenant(None, long, None), Tenant(None, None, long)):
            state = request("a")
            state.tenant = tenant
            ask(audits, state)
    held = list(audits.breakers._held)
    assert len(held) == 60 and {len(key.namespace) for key in held} == {16}  # type: ignore[arg-type]
