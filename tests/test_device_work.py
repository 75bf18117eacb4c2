"""A server whose relay works as on a GPU, with Triton's interpreter for a device: the same answers as in PyTorch, and
the host waits for the device at most once in a forward."""

from __future__ import annotations

import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from plugins import Inspector, install_plugin
from prompts import random_tokens
from sync_counter import OURS, SyncCounter
from tiny_model import make_tiny_llama

from sglang_relay.measure.server import Server

VOCAB = 512
POLICIES = ("rotate", "legolink", "relay", "probe")
WORK = ("copy", "deviation", "probe", "interpolation")
FAULTS = {
    "realign_on_device": ("rotate", "internal_error:place"),
    "value_deviation": ("relay", "internal_error:attention"),
    "add_probe_scores": ("probe", "internal_error:attention"),
}
"""Kernel, policy that launches it, and how a request is declined where the launch fails."""
HERE = Path(__file__).parent


class Run(NamedTuple):
    """answers: per policy, those of its batch. broken: per kernel that failed, the answer's report. forwards: what the
    plugin wrote. state: of ``/server_info``."""

    answers: dict[str, list[Any]]
    broken: dict[str, Any]
    forwards: list[dict[str, Any]]
    state: dict[str, Any]


def serve(model: Path, folder: Path, *, triton: bool) -> Run:
    """Two donors, and per policy a batch of two prompts that quote them."""
    inspector = Inspector(folder)
    install_plugin(folder, "relay_test_device", (HERE / "device_plugin.py").read_text(encoding="utf-8"))
    for module in (HERE / "sync_counter.py", HERE / "kernels" / "triton_interpreter.py"):
        shutil.copy(module, folder)
    log = folder / "forwards.jsonl"
    fault = folder / "fault"
    env = inspector.env | {"RELAY_TEST_FORWARDS": str(log), "RELAY_TEST_FAULT": str(fault)}
    env |= {"SGLANG_RELAY_ROUTE_ABOVE": "9", "SGLANG_RELAY_INFLUENCE": "auto"}
    if triton:
        env["RELAY_TEST_TRITON"] = "1"
    rng, answers, broken = random.Random(1), {}, {}
    with Server(model, "--radix-cache-backend", "relay", "--max-total-tokens", 4096, env=env) as server:
        first, second = (
            server.generate(random_tokens(20, rng, VOCAB), max_new_tokens=90, ignore_eos=True)["output_ids"]
            for _ in range(2)
        )
        for policy in POLICIES:
            a, b, c, d = (random_tokens(n, rng, VOCAB) for n in (9, 40, 12, 30))
            inspector.ask(server, "gather", count=2)
            with ThreadPoolExecutor(2) as pool:
                both = [[*a, *first, *b, *second[5:80], *c], [*d, *second, *a]]
                answers[policy] = list(pool.map(lambda tokens, policy=policy: ask(server, tokens, policy), both))
        state = server.get("/server_info")["internal_states"][0]["relay"]
        for kernel, (policy, _) in FAULTS.items():
            fault.write_text(kernel, encoding="utf-8")
            broken[kernel] = ask(server, [*random_tokens(7, rng, VOCAB), *first, 5], policy)["meta_info"]["relay"]
    return Run(answers, broken, [json.loads(line) for line in log.read_text().splitlines()], state)


def ask(server: Server, tokens: list[int], policy: str) -> Any:
    return server.generate(
        tokens,
        max_new_tokens=3,
        ignore_eos=True,
        custom_params={"relay_policy": policy},
        fields={"return_logprob": True},
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("device"), vocab=VOCAB, hidden=64, layers=5)


@pytest.fixture(scope="module")
def on_kernels(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return serve(model, tmp_path_factory.mktemp("kernels"), triton=True)


@pytest.fixture(scope="module")
def in_pytorch(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return serve(model, tmp_path_factory.mktemp("pytorch"), triton=False)


def test_the_server_says_what_it_uses(on_kernels: Run, in_pytorch: Run) -> None:
    assert on_kernels.state["kernels"] == dict.fromkeys(WORK, "triton")
    assert in_pytorch.state["kernels"] == dict.fromkeys(WORK, "torch")
    assert (on_kernels.state["attention"], in_pytorch.state["attention"]) == ("triton", "torch")


@pytest.mark.parametrize("policy", POLICIES)
def test_the_kernels_answer_as_pytorch_does(policy: str, on_kernels: Run, in_pytorch: Run) -> None:
    for found, want in zip(on_kernels.answers[policy], in_pytorch.answers[policy], strict=True):
        one, other = found["meta_info"]["relay"], want["meta_info"]["relay"]
        assert one["relayed"] > 40 and (one["recomputed"] > 0) == (policy != "rotate")
        assert one.get("influence") == ("used" if policy == "relay" else None)
        assert {**one, "match_ms": 0} == {**other, "match_ms": 0}
        assert found["output_ids"] == want["output_ids"]
        logprobs = [[v for v, *_ in a["meta_info"]["output_token_logprobs"]] for a in (found, want)]
        assert np.allclose(*logprobs, atol=2e-4, rtol=0), logprobs
    for run in (on_kernels, in_pytorch):
        assert not run.state["stats"]["fallbacks"] and not run.state["stats"]["failures"]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_host_waits_once_at_most(policy: str, on_kernels: Run) -> None:
    """For the selection of both prompts, and which of their tokens have an influence. What is selected beforehand is on
    the host already, and read the same way."""
    steps = [f for f in on_kernels.forwards if f["policy"] == policy and f["plans"] == 2]
    assert [f["step"] for f in steps] == ["prepare", "place", "run"]
    assert [place for f in steps for place in f["waits"]] == ["transfer.py:read_back: cpu"]


@pytest.mark.parametrize("kernel", FAULTS)
def test_a_kernel_that_fails_sends_the_batch_down_the_stock_path(kernel: str, on_kernels: Run, in_pytorch: Run) -> None:
    found = on_kernels.broken[kernel]
    assert found["declined"] == FAULTS[kernel][1] and found["relayed"] + found["recomputed"] == 0
    assert in_pytorch.broken[kernel]["declined"] is None, "launches it nevertheless"


WAITS = {
    "item": "x[0].item()",
    "int": "int(x[0])",
    "if": "1 if x[0] > 0 else 2",
    "max": "max(x[0], x[1])",
    "tolist": "x.tolist()",
    "cpu": "x.cpu()",
    "numpy": "x.cpu().numpy()",
    "nonzero": "x.nonzero()",
    "mask": "x[x > 0]",
    "masked_select": "torch.masked_select(x, x > 0)",
    "unique": "x.unique()",
    "equal": "torch.equal(x, x)",
    "repeat": "x.repeat_interleave(n)",
    "upload": "torch.tensor([1, 2], device=x.device)",
    "from_numpy": "torch.from_numpy(numpy.arange(3)).to(x.device)",
    "new_tensor": "x.new_tensor([1.0])",
    "store": "x.__setitem__(n, 1.0)",
    "cholesky": "torch.cholesky_inverse(torch.eye(3))",
}
WAITS_NOT = {
    "select": "x.index_select(0, n)",
    "index": "x[n]",
    "store": "x.__setitem__(n, x[n] + 1)",
    "fill": "x.index_fill_(0, n, 1.0)",
    "where": "torch.where(x > 0, x, 0.0)",
    "make": "x.new_full((2,), 3.0)",
    "sort": "torch.argsort(x, stable=True)",
    "repeat": "x.repeat_interleave(n, output_size=3)",
}


def waits(expression: str, folder: str) -> list[str]:
    scope: dict[str, Any] = {"torch": torch, "numpy": np}
    exec(compile(f"def f(x, n):\n    return {expression}", f"{folder}/made_up.py", "exec"), scope)
    with SyncCounter() as counter:
        scope["f"](torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1, 2, 0]))
    return counter.found


@pytest.mark.parametrize("expression", WAITS.values(), ids=WAITS)
def test_a_call_that_waits_is_found(expression: str) -> None:
    assert len(waits(expression, OURS[0])) == 1 and len(waits(expression, OURS[1])) == 1
    assert not waits(expression, "/somewhere/else"), "SGLang's own code"


@pytest.mark.parametrize("expression", WAITS_NOT.values(), ids=WAITS_NOT)
def test_one_that_does_not_is_not(expression: str) -> None:
    assert not waits(expression, OURS[0])
