"""A pool that is too small, shared by requests of several priorities: some are retracted, and computed again."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prompts import random_tokens

from sglang_relay.engine.requests import KINDS
from sglang_relay.measure.server import Server

VOCAB = 1024
CHUNK = 64
FLAGS = ("--dtype", "float32", "--enable-mixed-chunk", "--chunked-prefill-size", CHUNK, "--enable-priority-scheduling")
POOL = ("--max-total-tokens", 1600)
"""KV slots for 8 requests of up to 320: what a retracted one has published is soon evicted."""
ENV = {
    "SGLANG_TEST_RETRACT": "1",
    "SGLANG_TEST_RETRACT_INTERVAL": "7",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "2",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
}
EXACT = {"relay": "exact"}
RELAYED = {"relay_policy": "rotate", "relay_donate": "all"}


@pytest.fixture(scope="module")
def relay(model: Path) -> Iterator[Server]:
    with Server(model, *FLAGS, *POOL, "--radix-cache-backend", "relay", env=ENV) as server:
        yield server


@pytest.fixture(scope="module")
def stock(model: Path) -> Iterator[Server]:
    """With room for everything: what it answers does not depend on retraction."""
    with Server(model, *FLAGS) as server:
        yield server


def ask(server: Server, prompt: list[int], new: int, params: dict[str, Any], priority: int = 0) -> Any:
    fields = {"priority": priority}
    return server.generate(prompt, max_new_tokens=new, ignore_eos=True, custom_params=params, fields=fields)


def reused(answer: dict[str, Any]) -> int:
    report = answer["meta_info"]["relay"]
    assert sum(report[kind] for kind in KINDS) == answer["meta_info"]["prompt_tokens"], report
    return report["approximate"] + report["relayed"] + report["recomputed"]


@pytest.mark.slow
def test_prompts_that_are_computed_again(relay: Server, stock: Server) -> None:
    """A retracted request keeps its output while its prompt is published again, chunk by chunk: that breaks no
    invariant (engine/invariants.py, ``answered_too_early``)."""
    rng = random.Random(25)
    lent = random_tokens(200, rng, VOCAB)
    ask(relay, lent, 1, {**EXACT, "relay_donate": "all"})

    def work(number: int) -> tuple[list[int], int, dict[str, Any], int]:
        text, params = (lent, RELAYED) if number % 2 else (random_tokens(rng.randint(200, 250), rng, VOCAB), EXACT)
        head, tail = random_tokens(rng.randint(5, 40), rng, VOCAB), random_tokens(9, rng, VOCAB)
        return [3 + number, *head, *text, *tail], rng.randint(20, 60), params, rng.randint(0, 2)

    wanted = [work(number) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda w: ask(relay, *w), wanted))
    again = relayed = 0
    for (prompt, new, params, _), answer in zip(wanted, answers, strict=True):
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": new}
        relayed += reused(answer) > CHUNK
        if params == EXACT:
            again += answer["meta_info"]["num_retractions"] > 0 and answer["meta_info"]["relay"]["fresh"] > CHUNK
            assert reused(answer) == 0
            assert answer["output_ids"] == ask(stock, prompt, new, {})["output_ids"]
    assert again > 3 and relayed > 3, (again, relayed)
    stats = relay.get("/server_info")["internal_states"][0]["relay"]["stats"]
    assert (stats["failures"], stats["fallbacks"]) == (0, 0), stats
    for said in ("host_invariant", "before its prompt was computed", "memory leak", "Scheduler hit an exception"):
        assert said not in relay.log(), said
