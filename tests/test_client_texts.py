"""Texts that clients choose, of whatever length and content: none ends the server, and none is kept."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plugins import Inspector

from sglang_relay.engine.namespaces import LONGEST_NAME
from sglang_relay.engine.requests import named_scope
from sglang_relay.measure.server import Server

VOCAB = 1024
LONG = 4_000_000
"""Characters; SGLang takes them."""
KEPT = 4096
"""Characters of the longest text that is held without clients (a description of a setting), and with them."""


class World:
    def __init__(self, server: Server, inspector: Inspector) -> None:
        self.server, self.inspector = server, inspector
        self.rng = random.Random(3)
        self.text: list[int] = self.ask(self.fresh(40), 120, relay="exact")["output_ids"]

    def fresh(self, n: int) -> list[int]:
        return [self.rng.randrange(3, VOCAB) for _ in range(n)]

    def ask(self, prompt: list[int], new: int = 1, fields: dict[str, Any] | None = None, **custom: Any) -> Any:
        return self.server.generate(prompt, max_new_tokens=new, ignore_eos=True, custom_params=custom, fields=fields)

    def report(self, fields: dict[str, Any] | None = None, **custom: Any) -> dict[str, Any]:
        """Of a prompt that holds another request's answer."""
        return self.ask([*self.fresh(20), *self.text, *self.fresh(9)], 1, fields, **custom)["meta_info"]["relay"]


@pytest.fixture(scope="module")
def world(model: Path, inspector: Inspector) -> Iterator[World]:
    with Server(model, "--radix-cache-backend", "relay", env=inspector.env) as server:
        yield World(server, inspector)


def long(seed: int) -> str:
    return f"{seed:08d}" * (LONG // 8)


@pytest.mark.parametrize("mode", ["on", "exact"])
@pytest.mark.parametrize("name", ["extra_key", "cache_salt", "rid"])
def test_names_of_any_length_are_not_kept(world: World, name: str, mode: str) -> None:
    for seed in range(4):
        answer = world.ask([*world.fresh(99), seed], 80, {name: long(seed)}, relay=mode, relay_donate="all")
        report = answer["meta_info"]["relay"]
        if name == "rid":
            assert report["declined"] == {"on": "nothing_to_reuse", "exact": "exact_requested"}[mode], report
        else:
            assert report["declined"] == "name_too_long" and str(LONGEST_NAME) in report["why"], report
    assert world.inspector.ask(world.server, "kept_text") < KEPT


@pytest.mark.parametrize(
    "custom",
    [
        {"relay_scope": long(1)},
        {"relay_policy": long(2)},
        {"relay_budget": long(3)},
        {"relay_budget": "coverage:" + long(4)},
        {"relay_capture": long(5)},
        {"relay_donate": long(6)},
        {"relay_quote_tokens": 10**15},
        {"relay_generated_from": 10**15},
        {"relay" + long(7): 1},
        {"relay_scope": [[[[1]]]]},
        {"relay_scope": {"a": 1}},
        {"relay_scope": 1e308},
    ],
    ids=lambda custom: str(custom)[:40],
)
def test_parameters_of_any_length_are_declined_by_name_and_not_kept(world: World, custom: dict[str, Any]) -> None:
    report = world.report(**custom)
    assert report["declined"] == "bad_custom_params" and 0 < len(report["why"]) <= 300, report
    assert world.inspector.ask(world.server, "kept_text") < KEPT


@pytest.mark.parametrize("scope", ["\0", "\u202e/#1//", "0" * 256])
def test_a_scope_of_any_characters_confines_and_relays(world: World, scope: str) -> None:
    prompt = world.fresh(60)
    text = world.ask(prompt, 120, relay_scope=scope)["output_ids"]
    again = [*world.fresh(20), *text, *world.fresh(9)]
    inside = world.ask(again, 1, relay_scope=scope, relay_donate="none")["meta_info"]["relay"]
    outside = world.ask(again, 1, relay_scope=scope[1:] + "x", relay_donate="none")["meta_info"]["relay"]
    assert inside["relayed"] + inside["recomputed"] == len(text) - 1, inside
    assert outside["fresh"] == len(again), outside


def test_names_up_to_the_limit_relay(world: World) -> None:
    for name in ("extra_key", "cache_salt"):
        fields = {name: "k" * LONGEST_NAME}
        text = world.ask(world.fresh(40), 120, fields)["output_ids"]
        answer = world.ask([*world.fresh(20), *text, *world.fresh(9)], 1, fields)["meta_info"]["relay"]
        assert answer["relayed"] + answer["recomputed"] == len(text) - 1, answer


def test_scopes_that_cannot_be_written_down_confine_too() -> None:
    deep: Any = "a"
    for _ in range(100_000):
        deep = [deep]
    named = [named_scope({"relay_scope": scope}) for scope in (deep, 10**5000, "a", 5, "5", 5.0, "", long(1), "\ud800")]
    assert len(set(named)) == len(named) and {len(name or "") for name in named} == {32}
    assert named_scope({"relay_scope": None}) is named_scope({}) is named_scope(None) is named_scope([1]) is None
