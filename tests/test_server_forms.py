"""Forms in which people run a server (docs/situations.md): each relays, and answers as a stock server of its form."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
from prompts import random_tokens

from sglang_relay.engine.requests import KINDS
from sglang_relay.measure.server import Server

pytestmark = pytest.mark.slow

VOCAB = 1024
FLAGS = ("--chunked-prefill-size", 256, "--max-total-tokens", 16_384)
FORMS: dict[str, tuple[object, ...]] = {
    "incremental streams": ("--incremental-streaming-output", "--stream-interval", 4),
    "no tokenizer": ("--skip-tokenizer-init",),
    "two replicas": ("--dp-size", 2),
    "priorities": ("--enable-priority-scheduling", "--enable-mixed-chunk"),
    "reasoning": ("--reasoning-parser", "qwen3", "--strip-thinking-cache"),
}
CLOSE = 1e-3
FULL = {"relay_policy": "full"}


class Form(NamedTuple):
    name: str
    relay: Server
    stock: Server


@pytest.fixture(scope="module", params=FORMS)
def form(model: Path, request: pytest.FixtureRequest) -> Iterator[Form]:
    flags = (*FLAGS, *FORMS[request.param])
    with Server(model, *flags, "--radix-cache-backend", "relay") as relay, Server(model, *flags) as stock:
        yield Form(request.param, relay, stock)


def logprobs(answer: dict[str, Any]) -> list[float]:
    return [value for value, *_ in answer["meta_info"]["output_token_logprobs"]]


def reused(answer: dict[str, Any]) -> int:
    report = answer["meta_info"]["relay"]
    assert sum(report[kind] for kind in KINDS) == answer["meta_info"]["prompt_tokens"], report
    return report["relayed"] + report["recomputed"]


def test_it_relays_and_answers_like_stock(form: Form) -> None:
    rng = random.Random(form.name)
    text = random_tokens(150, rng, VOCAB)
    for _ in range(4):  # each replica has an index of its own
        form.relay.generate(text, max_new_tokens=1, custom_params={"relay": "exact", "relay_donate": "all"})
    prompts = [[*random_tokens(20 + i, rng, VOCAB), *text, *random_tokens(5, rng, VOCAB)] for i in range(12)]
    fields = [{"return_logprob": True, **({"priority": i % 3} if form.name == "priorities" else {})} for i in range(12)]

    def ask(server: Server, i: int) -> dict[str, Any]:
        custom = {"custom_params": FULL} if server is form.relay else {}
        return server.generate(prompts[i], max_new_tokens=1 + 5 * (i % 4), ignore_eos=True, fields=fields[i], **custom)

    with ThreadPoolExecutor(4) as pool:
        ours = list(pool.map(lambda i: ask(form.relay, i), range(12)))
        theirs = list(pool.map(lambda i: ask(form.stock, i), range(12)))
    for a, b in zip(ours, theirs, strict=True):
        assert a["output_ids"] == b["output_ids"] and logprobs(a) == pytest.approx(logprobs(b), abs=CLOSE)
    assert all(reused(a) > 0 for a in ours) or form.name == "two replicas"
    assert any(reused(a) > 0 for a in ours)
    for state in form.relay.get("/server_info")["internal_states"]:
        assert state["relay"]["active"] and state["relay"]["stats"]["failures"] == 0, state["relay"]


@pytest.mark.parametrize("new", [1, 9])
def test_a_stream_is_the_stock_servers(form: Form, new: int) -> None:
    rng = random.Random(form.name)
    sampling: dict[str, Any] = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
    body = {"input_ids": random_tokens(40, rng, VOCAB), "stream": True}
    streams = []
    for server in (form.relay, form.stock):
        custom = {"custom_params": FULL} if server is form.relay else {}
        request = {**body, "sampling_params": {**sampling, **custom}}
        with requests.post(server.url + "/generate", json=request, stream=True, timeout=300) as response:
            lines = [line.removeprefix(b"data: ") for line in response.iter_lines() if line]
        streams.append([json.loads(line) for line in lines if line != b"[DONE]"])
    assert "relay" in streams[0][0]["meta_info"]
    ours, theirs = ([chunk["output_ids"] for chunk in stream] for stream in streams)
    if form.name == "incremental streams":
        assert list(itertools.chain(*ours)) == list(itertools.chain(*theirs))
    else:
        assert ours[-1] == theirs[-1]


def test_a_full_queue_refuses_like_stock(model: Path) -> None:
    flags = (*FLAGS, "--max-queued-requests", 2, "--max-running-requests", 1)
    rng = random.Random(5)
    prompts = [random_tokens(60, rng, VOCAB) for _ in range(12)]
    counts = []
    for backend in (("--radix-cache-backend", "relay"), ()):
        with Server(model, *flags, *backend) as server, ThreadPoolExecutor(12) as pool:

            def ask(prompt: list[int], url: str = server.url) -> int:
                body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 200, "ignore_eos": True}}
                return requests.post(url + "/generate", json=body, timeout=300).status_code

            counts.append(set(pool.map(ask, prompts)))
            assert server.generate(prompts[0], max_new_tokens=2)["output_ids"]
    assert counts[0] == counts[1] and len(counts[0]) == 2, counts


ENGINE = """
import asyncio, json, sys
import sglang as sgl

def main():
    text, head = json.loads(sys.argv[2])
    engine = sgl.Engine(model_path=sys.argv[1], radix_cache_backend="relay", max_total_tokens=16384, log_level="error")
    one = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    donate = {**one, "custom_params": {"relay": "exact", "relay_donate": "all"}}
    engine.generate(input_ids=text, sampling_params=donate)
    batch = engine.generate(input_ids=[[h, *text, 5] for h in head], sampling_params={**one, "n": 2})
    async def stream():
        generator = await engine.async_generate(input_ids=[9, *text, 6], sampling_params=one, stream=True)
        return [chunk async for chunk in generator]
    chunks = asyncio.get_event_loop().run_until_complete(stream())
    engine.flush_cache()
    after = engine.generate(input_ids=[10, *text, 6], sampling_params=one)
    engine.shutdown()
    print(json.dumps([[a["meta_info"]["relay"] for a in x] for x in (batch, chunks[:1], [after])]))

if __name__ == "__main__":
    main()
"""


def test_an_offline_engine(model: Path, tmp_path: Path) -> None:
    script = tmp_path / "engine.py"
    script.write_text(ENGINE, encoding="utf-8")
    text = random_tokens(150, random.Random(6), VOCAB)
    arguments = (str(model), json.dumps([text, [7, 8]]))
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    batch, first, after = json.loads(done.stdout.splitlines()[-1])
    assert len(batch) == 4 and all(report["approximate"] > 0 for report in batch)
    assert first[0]["relayed"] + first[0]["recomputed"] >= 149
    assert after[0]["declined"] == "nothing_to_reuse"
