"""Several front ends (``--tokenizer-worker-num``): processes in which SGLang itself loads no plugins."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from sglang_relay.engine import doctor
from sglang_relay.measure.server import Server

PROMPT = [11, *range(100, 160)]
SAMPLING = {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True}
ATTACHED = """
import json, sys
from sglang.srt.entrypoints.engine import Engine
engine = Engine.attach_tokenizer_worker(int(sys.argv[1]))
answer = engine.generate(input_ids=json.loads(sys.argv[2]), sampling_params=json.loads(sys.argv[3]))
print(json.dumps(answer["meta_info"]["relay"]))
"""


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with Server(model, "--radix-cache-backend", "relay", "--tokenizer-worker-num", 2) as started:
        yield started


def many(server: Server, path: str, body: dict[str, Any], count: int = 12) -> list[Any]:
    """Answers to requests at the same time, each on a connection of its own, which any worker may take."""

    def one(_: int) -> Any:
        answer = requests.post(server.url + path, json=body, timeout=300)
        answer.raise_for_status()
        return answer.json() if not body.get("stream") else answer.text

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def check(report: Any) -> None:
    assert isinstance(report, dict), report
    assert report["exact"] + report["fresh"] == len(PROMPT) and report["declined"] == "nothing_to_reuse"


def test_every_worker_brings_the_report(server: Server) -> None:
    for answer in many(server, "/generate", {"input_ids": PROMPT, "sampling_params": SAMPLING}):
        check(answer["meta_info"]["relay"])


def test_every_worker_brings_the_report_in_the_openai_api(server: Server) -> None:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 2}
    for answer in many(server, "/v1/completions", body):
        check(answer["sglext"]["relay"])
    for text in many(server, "/v1/completions", {**body, "stream": True}):
        check(json.loads(text.splitlines()[0].removeprefix("data: "))["sglext"]["relay"])


def test_every_worker_shows_its_hooks(server: Server) -> None:
    for _ in range(12):
        info = requests.get(server.url + "/server_info", timeout=60).json()
        assert all(finding.ok for finding in doctor.server(info))


@pytest.mark.slow
def test_an_engine_that_attaches_itself_brings_the_report(server: Server) -> None:
    arguments = (str(server.pid), json.dumps(PROMPT), json.dumps(SAMPLING))
    done = subprocess.run([sys.executable, "-c", ATTACHED, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check(json.loads(done.stdout.splitlines()[-1]))
