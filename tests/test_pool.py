"""Pool conservation: SGLang's own strict checks find no slot lost or owned twice, whatever happens at the same time."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
from tiny_model import make_tiny_llama

from sglang_relay.engine.requests import KINDS
from sglang_relay.measure.server import Server

VOCAB = 1024
POOL = 2560
AT_ONCE = 8
ROUND = 80
"""Requests between two moments at which the server is idle, so that a flush goes through."""
ABORTED = (13, 5)
"""Of 13 requests the client aborts number 5."""
STRICT = {
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "2",
    "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE": "1",
    "SGLANG_CHECK_KV_PAGE_INVARIANTS": "1",
    "SGLANG_TEST_RETRACT": "1",
    "SGLANG_TEST_RETRACT_INTERVAL": "9",
    "SGLANG_RELAY_MIN_RELAYED": "32",
}
POLICIES = ("rotate", "relay", "full")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("pool"), vocab=VOCAB)


class Tally(NamedTuple):
    reused: int
    aborted: int
    retractions: int


class Storm:
    """Clients that read each other's outputs while requests are aborted, the cache flushed and weights reloaded."""

    def __init__(self, server: Server, model: Path, count: int, seed: int) -> None:
        self.server, self.model, self.count = server, model, count
        self._seed = seed
        self._outputs: list[list[int]] = []
        self._lock = threading.Lock()

    def run(self) -> Tally:
        answers: list[dict[str, Any]] = []
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for first in range(0, self.count, ROUND):
                answers += pool.map(self._one, range(first, min(first + ROUND, self.count)))
                self._between_rounds(first // ROUND)
        metas = [a["meta_info"] for a in answers]
        finished = [m for m in metas if m["finish_reason"]["type"] != "abort"]
        for number, meta in enumerate(metas):
            every, which = ABORTED
            assert meta in finished or number % every == which, f"failed, though nobody aborted it: {meta}"
        for meta in finished:
            report = meta["relay"]
            counts = [report[kind] for kind in KINDS]
            assert min(counts) >= 0 and sum(counts) == meta["prompt_tokens"], meta
        return Tally(
            sum(m["relay"]["relayed"] + m["relay"]["recomputed"] for m in finished),
            len(metas) - len(finished),
            sum(m.get("num_retractions", 0) for m in finished),
        )

    def _one(self, number: int) -> dict[str, Any]:
        rng = random.Random(self._seed * 100_003 + number)
        self._disturb(number)
        prompt = self._prompt(rng)
        rid = f"storm-{self._seed}-{number}"
        body = {
            "input_ids": prompt,
            "rid": rid,
            "sampling_params": {
                "max_new_tokens": rng.randint(20, 90),
                "ignore_eos": True,
                "temperature": 0,
                "custom_params": {
                    "relay_policy": rng.choice(POLICIES),
                    "relay": rng.choice(("on", "on", "on", "exact")),
                },
            },
        }
        if number % ABORTED[0] == ABORTED[1]:
            delay = threading.Timer(rng.uniform(0.02, 0.3), self._abort, (rid,))
            delay.start()
        answer = self.server.post("/generate", body)
        with self._lock:
            self._outputs.append(answer["output_ids"])
            del self._outputs[:-12]
        return answer

    def _prompt(self, rng: random.Random) -> list[int]:
        tokens = [rng.randrange(3, VOCAB) for _ in range(rng.randint(5, 40))]
        with self._lock:
            chosen = rng.sample(self._outputs, min(len(self._outputs), rng.randint(0, 3)))
        for output in chosen:
            tokens += output + [rng.randrange(3, VOCAB) for _ in range(rng.randint(1, 20))]
        return [*tokens, rng.randrange(3, VOCAB)]

    def _abort(self, rid: str) -> None:
        requests.post(self.server.url + "/abort_request", json={"rid": rid}, timeout=60)

    def _between_rounds(self, number: int) -> None:
        """The server is idle: flushes and weight updates go through, and the idle check looks at every slot."""
        if number % 3 == 0:
            self.server.post("/flush_cache", timeout=60)
        else:
            body = {"model_path": str(self.model), "flush_cache": number % 3 == 1}
            assert self.server.post("/update_weights_from_disk", body)["success"]

    def _disturb(self, number: int) -> None:
        """A flush is refused while requests run, and a weight update then fails to flush: both must be harmless."""
        if number % 40 == 20:
            requests.post(self.server.url + "/flush_cache", timeout=60)
        if number % 100 == 50:
            body = {"model_path": str(self.model), "flush_cache": number % 200 == 50}
            requests.post(self.server.url + "/update_weights_from_disk", json=body, timeout=120)


def storm(model: Path, count: int, *args: object) -> None:
    flags = ("--radix-cache-backend", "relay", "--max-total-tokens", POOL, "--chunked-prefill-size", 192)
    with Server(model, *flags, *args, env=STRICT) as server:
        tally = Storm(server, model, count, seed=count).run()
        server.post("/flush_cache")
        # The idle check runs when nothing is left to do, and a violation ends the scheduler.
        assert server.generate([5, 6, 7], max_new_tokens=2)["output_ids"]
        stats = server.get("/server_info")["internal_states"][0]["relay"]["stats"]
        log = server.log()
    print(tally, stats)
    assert (stats["failures"], stats["fallbacks"]) == (0, 0), stats
    assert tally.reused > count and tally.aborted > 0 and tally.retractions > 0, tally
    assert stats["batches"] > count // 10
    for word in ("memory leak", "pool_leak", "Prefill out of memory", "Scheduler hit an exception"):
        assert word not in log, word


@pytest.mark.parametrize("args", [("--enable-mixed-chunk",), ("--page-size", 16)], ids=["page-1", "page-16"])
def test_nothing_leaks(model: Path, args: tuple[object, ...]) -> None:
    storm(model, 160, *args)


@pytest.mark.slow
@pytest.mark.parametrize("args", [("--enable-mixed-chunk",), ("--page-size", 16)], ids=["page-1", "page-16"])
def test_nothing_leaks_in_the_long_run(model: Path, args: tuple[object, ...]) -> None:
    storm(model, 2000, *args)


@pytest.fixture(scope="module")
def small(model: Path) -> Iterator[Server]:
    flags = ("--radix-cache-backend", "relay", "--max-total-tokens", 640, "--chunked-prefill-size", 512)
    env = {k: v for k, v in STRICT.items() if "RETRACT" not in k}
    with Server(model, *flags, env=env) as server:
        yield server


@pytest.mark.parametrize("policy", POLICIES)
def test_a_single_request_at_the_edge_of_the_pool_is_not_aborted(small: Server, policy: str) -> None:
    """Donor and consumer together exceed the pool: the donor must be evictable again as soon as it has been copied, or
    the next decode step finds no room and aborts the only request."""
    rng = random.Random(POLICIES.index(policy))
    small.post("/flush_cache")
    donor = small.generate([rng.randrange(3, VOCAB) for _ in range(20)], max_new_tokens=220, ignore_eos=True)
    prompt = [rng.randrange(3, VOCAB) for _ in range(30)] + donor["output_ids"] + [rng.randrange(3, VOCAB)] * 3
    answer = small.generate(prompt, max_new_tokens=360, ignore_eos=True, custom_params={"relay_policy": policy})
    report = answer["meta_info"]["relay"]
    assert report["relayed"] + report["recomputed"] == 219, report
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 360}


def test_donors_that_leave_no_room_are_given_up_by_name(small: Server) -> None:
    """Locked, the donor would not leave the prompt room; the request is served all the same."""
    rng = random.Random(9)
    small.post("/flush_cache")
    donor = small.generate([rng.randrange(3, VOCAB) for _ in range(20)], max_new_tokens=280, ignore_eos=True)
    prompt = [rng.randrange(3, VOCAB) for _ in range(150)] + donor["output_ids"] + [7]
    answer = small.generate(prompt, max_new_tokens=4, ignore_eos=True)
    report = answer["meta_info"]["relay"]
    assert report["declined"] == "pool_pressure" and report["fresh"] == len(prompt), report
