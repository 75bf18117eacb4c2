"""Whatever fails between SGLang and the relay, wherever: the request is answered, and nothing stays locked.

A prompt that recomputes everything (policy ``full``) has the answer of a stock server, relayed or not.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plugins import Inspector

from sglang_relay.measure.server import Server

VOCAB = 1024
FLAGS = ("--chunked-prefill-size", 256, "--max-total-tokens", 6000, "--dtype", "float32")
ELSEWHERE = {
    "HiddenStates.begin": "needs a setting that the others do without",
    "Learning.start_over": "tensor parallelism only",
    "Learning.on_weights": "has a test of its own below",
    "Stats.fallback": "beside another failure only",
    "RelayManager.count_quoted": "called where an answer happens to quote",
    "RelayManager.wait": "asked of requests that do not fit a batch, and so by chance",
}
"""Places that the traffic of one round need not pass, and why."""


class World:
    def __init__(self, relay: Server, stock: Server, inspector: Inspector) -> None:
        self.relay, self.stock, self.inspector = relay, stock, inspector
        self.rng, self.rounds = random.Random(11), 0

    def ask(self, server: Server, prompts: list[list[int]], new: int, **custom: Any) -> list[dict[str, Any]]:
        """In a scope of the round: a breaker that audits of this model trip is not asked again."""
        custom["relay_scope"] = str(self.rounds)
        return server.generate(prompts, max_new_tokens=new, ignore_eos=True, custom_params=custom)

    def fresh(self, n: int) -> list[int]:
        return [self.rng.randrange(3, VOCAB) for _ in range(n)]

    def texts(self) -> list[list[int]]:
        """Decoded by the relay server, whatever fails there meanwhile."""
        donors = [self.fresh(30) for _ in range(2)]
        return [a["output_ids"] for a in self.ask(self.relay, donors, 120, relay="exact")]

    def round(self) -> None:
        """Requests that pass all places: donors, relayed ones of one chunk and of several, under several policies; an
        answer that quotes; audits."""
        self.rounds += 1
        one, two = self.texts()
        short = [*self.fresh(20), *one, *self.fresh(9)]
        long = [*self.fresh(20), *one, *self.fresh(200), *two, *self.fresh(9)]
        mates = [[*self.fresh(12), *two, *self.fresh(5)] for _ in range(2)]
        prompts = [short, long, *mates]
        answers = self.ask(self.relay, prompts, 6, relay_policy="full")
        exact = self.ask(self.stock, prompts, 6)
        assert [a["output_ids"] for a in answers] == [a["output_ids"] for a in exact]
        for policy, start in (("probe", 9999), ("relay", 3), ("rotate", 9999)):
            again = [self.fresh(3) + p for p in prompts]
            self.check(self.ask(self.relay, again, 6, relay_policy=policy, relay_generated_from=start))
        quoting = [*self.fresh(9), *one, *self.fresh(3), *one[:20]]
        self.check(self.ask(self.relay, [quoting], 40, relay_policy="probe", relay_budget=0.02))
        self.inspector.ask(self.relay, "audit_every", every=1)
        self.check(self.ask(self.relay, [self.fresh(5) + p for p in (short, long)], 3, relay_policy="probe"))
        self.inspector.ask(self.relay, "audit_every", every=0)

    def check(self, answers: list[dict[str, Any]]) -> None:
        for answer in answers:
            meta = answer["meta_info"]
            assert meta["finish_reason"]["type"] == "length"
            if (report := meta.get("relay")) is not None and report["declined"] is None:
                kinds = ("exact", "approximate", "relayed", "recomputed", "fresh")
                assert min(report[kind] for kind in kinds) >= 0, report

    def conserved(self) -> None:
        """Nothing is locked, and all of the pool is free after a flush."""
        self.inspector.ask(self.relay, "inject")
        self.ask(self.relay, [self.fresh(20)], 1)  # what a failure has left locked is given back with the next
        assert self.inspector.ask(self.relay, "locks") == 0
        self.relay.post("/flush_cache")
        assert self.inspector.ask(self.relay, "pool")["held"] == 0

    def relays(self) -> None:
        (text, _) = self.texts()
        (answer,) = self.ask(self.relay, [[*self.fresh(9), *text, *self.fresh(9)]], 1, relay_policy="rotate")
        assert answer["meta_info"]["relay"]["relayed"] == len(text) - 1, answer["meta_info"]["relay"]


@pytest.fixture(scope="module")
def world(model: Path, inspector: Inspector) -> Iterator[World]:
    env = {**inspector.env, "SGLANG_RELAY_INFLUENCE": "auto", "SGLANG_RELAY_COST_MODEL": "true"}
    with (
        Server(model, "--radix-cache-backend", "relay", *FLAGS, env=env) as relay,
        Server(model, *FLAGS) as stock,
    ):
        yield World(relay, stock, inspector)


@pytest.mark.slow
def test_each_place_fails_once(world: World) -> None:
    places = world.inspector.ask(world.relay, "inject")["places"]
    quiet = []
    for place in places:
        world.inspector.ask(world.relay, "inject", place=place)
        world.round()
        world.relay.post("/flush_cache")
        if not world.inspector.ask(world.relay, "inject")["failed"]:
            quiet.append(place)
        world.conserved()
    world.relays()
    assert set(quiet) <= set(ELSEWHERE), sorted(quiet)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_each_call_fails_by_chance(world: World, seed: int) -> None:
    count = 0
    for number in range(6):
        world.inspector.ask(world.relay, "inject", share=0.01, seed=100 * seed + number)
        world.round()
        count += world.inspector.ask(world.relay, "inject")["count"]
        world.conserved()
    world.relays()
    assert count > 20


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_weights_that_change_over_a_failure_leave_nothing_of_the_old(world: World, model: Path, times: int) -> None:
    """The relay cannot forget what it has learnt of them, and so it is off."""
    (text, _) = world.texts()
    prompts = [[*world.fresh(9), *text, *world.fresh(9)]]
    world.ask(world.relay, prompts, 6, relay_policy="rotate")
    for _ in range(times):
        world.inspector.ask(world.relay, "inject", place="Learning.on_weights")
        for server in (world.relay, world.stock):
            assert server.post("/update_weights_from_disk", {"model_path": str(model), "flush_cache": False})["success"]
    answers = world.ask(world.relay, prompts, 6, relay_policy="rotate")
    assert [a["output_ids"] for a in answers] == [a["output_ids"] for a in world.ask(world.stock, prompts, 6)]
    assert answers[0]["meta_info"]["relay"]["declined"] == "unsupported:internal_error:weights"
    world.conserved()
