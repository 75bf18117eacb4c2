"""What a report tells its client: all, nothing that says how long a match is, or nothing; the operator sees all."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from sglang_relay.engine.report import GRAIN, coarse
from sglang_relay.engine.requests import KINDS, new_report
from sglang_relay.measure.server import Server

VOCAB = 1024


class World:
    def __init__(self, server: Server) -> None:
        self.server, self.rng = server, random.Random(2)
        self.text: list[int] = self.answer(self.fresh(30), 300, relay="exact")["output_ids"]

    def fresh(self, n: int) -> list[int]:
        return [self.rng.randrange(3, VOCAB) for _ in range(n)]

    def answer(self, prompt: list[int], new: int = 1, **custom: Any) -> Any:
        custom |= {"relay_scope": "customer"}
        return self.server.generate(prompt, max_new_tokens=new, ignore_eos=True, custom_params=custom)

    def report(self, match: int, policy: str = "rotate") -> dict[str, Any] | None:
        """Of a prompt of 400 tokens, ``match`` of which stand in somebody's answer."""
        other = self.text[match] ^ 4  # not what the text goes on with
        prompt = [*self.fresh(40), *self.text[:match], other, *self.fresh(359 - match)]
        answer = self.answer(prompt, relay_policy=policy, relay_donate="none")
        return answer["meta_info"].get("relay")

    def relayed(self) -> int:
        (internal,) = self.server.get("/server_info")["internal_states"]
        return internal["relay"]["stats"]["tokens"]["relayed"]


def served(model: Path, *flags: object) -> Iterator[World]:
    with Server(model, "--radix-cache-backend", *flags) as server:
        yield World(server)


@pytest.fixture(scope="module")
def isolated(model: Path) -> Iterator[World]:
    yield from served(model, "relay-isolated")


@pytest.mark.parametrize("policy", ["rotate", "relay", "probe"])
def test_no_report_of_an_isolated_server_tells_the_length_of_a_match(isolated: World, policy: str) -> None:
    """One known token more at a time is how an answer is spelt out; no step of it shows."""
    before = isolated.relayed()
    reports = [isolated.report(match, policy) for match in (64, 65, 66, 100, 200, 255)]
    assert all(report == reports[0] for report in reports), reports
    assert reports[0] is not None and reports[0] == {
        **dict.fromkeys(KINDS, 0),
        **{"fresh": 400, "policy": policy, "declined": "nothing_to_reuse", "why": None},
    }
    assert isolated.relayed() - before > 100, "the operator sees all"
    far = isolated.report(299)
    assert far is not None and far["declined"] is None and (far["relayed"], far["fresh"]) == (256, 144), far


def test_streams_and_the_openai_api_bring_the_same(isolated: World) -> None:
    prompt = [*isolated.fresh(40), *isolated.text[:100], *isolated.fresh(260)]
    ask: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": 2}
    ask["custom_params"] = {"relay_scope": "customer", "relay_policy": "rotate", "relay_donate": "none"}
    whole = isolated.server.post("/v1/completions", ask)["sglext"]["relay"]
    lines = requests.post(f"{isolated.server.url}/v1/completions", json={**ask, "stream": True}, timeout=300).text
    first = next(line for line in lines.splitlines() if line.startswith("data: {"))
    streamed = json.loads(first[len("data: ") :])["sglext"]["relay"]
    for report in (whole, streamed):
        assert "match_ms" not in report and sum(report[kind] for kind in KINDS) == 400
        assert all(report[kind] % GRAIN == 0 for kind in KINDS if kind != "fresh"), report


def test_none_says_nothing_and_serves_all_the_same(model: Path) -> None:
    for world in served(model, "relay", "--relay-report", "none"):
        assert world.report(100) is None and world.relayed() == 100
        ask = {"model": "tiny", "prompt": world.fresh(40), "max_tokens": 1}
        assert "sglext" not in world.server.post("/v1/completions", ask)


def test_full_tells_lengths(model: Path) -> None:
    """Otherwise the comparison above would prove nothing."""
    for world in served(model, "relay-isolated", "--relay-report", "full"):
        (one, two) = (world.report(match) for match in (100, 101))
        assert one is not None and two is not None and (one["relayed"], two["relayed"]) == (100, 101)


@given(st.lists(st.integers(0, 10_000), min_size=5, max_size=5), st.sampled_from(["probe", None]))
def test_coarse_counts_add_up_to_the_prompt(counts: list[int], policy: str | None) -> None:
    report = new_report(policy, None if policy else "relay_off") | dict(zip(KINDS, counts, strict=True))
    said = coarse(report)
    assert sum(said[kind] for kind in KINDS) == sum(counts) and said["fresh"] >= report["fresh"]
    assert all(said[kind] % GRAIN == 0 for kind in KINDS if kind != "fresh")
    found = said["approximate"] + said["relayed"] + said["recomputed"]
    assert said["declined"] == ("relay_off" if policy is None else None if found else "nothing_to_reuse")


@pytest.mark.parametrize("reason", ["long_suffix", "predicted_slower", "below_min_relayed", "audited", "breaker_open"])
def test_a_reason_that_a_match_gave_is_not_told(reason: str) -> None:
    """A prompt's end can be made so long that it tips with one token more of a match."""
    assert coarse(new_report("probe", reason)) == coarse(new_report("probe", "nothing_to_reuse"))
