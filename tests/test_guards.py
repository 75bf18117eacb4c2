"""What cannot be relayed is served stock, with a name for the reason, and a failure inside the relay never reaches a
client."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plugins import Inspector
from server import Server, ServerError
from tiny_model import make_tiny_llama

VOCAB = 1024


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("guards"), vocab=VOCAB)


@pytest.fixture(scope="module")
def inspector(tmp_path_factory: pytest.TempPathFactory) -> Inspector:
    return Inspector(tmp_path_factory.mktemp("inspector"))


@pytest.fixture(scope="module")
def server(model: Path, inspector: Inspector) -> Iterator[Server]:
    flags = ("--radix-cache-backend", "relay", "--enable-return-hidden-states")
    with Server(model, *flags, env=inspector.env) as server:
        yield server


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.node.name)


def tokens(rng: random.Random, n: int) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(n)]


def ask(server: Server, prompt: list[int], new: int = 8, fields: dict[str, Any] | None = None, **params: Any) -> Any:
    wanted = {"return_logprob": True, **(fields or {})}
    return server.generate(prompt, max_new_tokens=new, ignore_eos=True, fields=wanted, custom_params=params or None)


def consumer(server: Server, rng: random.Random) -> list[int]:
    """A prompt that a donor covers in its middle."""
    donor = ask(server, tokens(rng, 20), new=101)["output_ids"][:100]
    return [*tokens(rng, 12), *donor, *tokens(rng, 5)]


def report_of(answer: Any) -> dict[str, Any]:
    return answer["meta_info"]["relay"]


def stats(server: Server) -> dict[str, Any]:
    return server.get("/server_info")["internal_states"][0]["relay"]["stats"]


# ---------------------------------------------------------------------- requests


def test_prompt_logprobs_inside_a_segment_are_not_relayed(server: Server, rng: random.Random) -> None:
    """Only what lies before the first wanted row may be copied: a copied row has no hidden state."""
    prompt = consumer(server, rng)
    answer = ask(server, prompt, fields={"logprob_start_len": 60})
    report = report_of(answer)
    assert report["relayed"] + report["recomputed"] == 0, report
    exact = ask(server, prompt, fields={"logprob_start_len": 60}, relay="off")
    assert len(answer["meta_info"]["input_token_logprobs"]) == len(prompt) - 60
    assert answer["meta_info"]["input_token_logprobs"][1:] == exact["meta_info"]["input_token_logprobs"][1:]


def test_prompt_logprobs_behind_a_segment_go_with_relay(server: Server, rng: random.Random) -> None:
    prompt = consumer(server, rng)
    start = len(prompt) - 3
    answer = ask(server, prompt, fields={"logprob_start_len": start}, relay_policy="full")
    assert report_of(answer)["recomputed"] >= 90
    exact = ask(server, prompt, fields={"logprob_start_len": start}, relay="off")
    got, want = (a["meta_info"]["input_token_logprobs"] for a in (answer, exact))
    assert [g[1] for g in got] == [w[1] for w in want]
    assert all(abs(g[0] - w[0]) < 1e-4 for g, w in zip(got[1:], want[1:], strict=True))


def test_hidden_states_are_declined_by_name(server: Server, rng: random.Random) -> None:
    answer = ask(server, consumer(server, rng), fields={"return_hidden_states": True})
    assert report_of(answer)["declined"] == "hidden_states_requested"
    assert answer["meta_info"]["hidden_states"]


# ---------------------------------------------------------------------- host failures

FAULTS = {
    "match": "internal_error:match",
    "plan": "internal_error:plan",
    "prepare": "internal_error:prepare",
    "forward": "internal_error:forward",
    "select": "internal_error:select",
    "slots": "bad_plan",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failure_is_named_and_answered_exactly(
    server: Server, inspector: Inspector, rng: random.Random, fault: str
) -> None:
    prompt = consumer(server, rng)
    inspector.break_(server, fault)
    before = stats(server)
    try:
        answers = [ask(server, [*tokens(rng, 3), *prompt]) for _ in range(2)]
    finally:
        inspector.break_(server, None)
    after = stats(server)
    for answer in answers:
        report = report_of(answer)
        assert report["declined"] == FAULTS[fault], report
        assert (report["relayed"], report["recomputed"], report["segments"]) == (0, 0, 0), report
        assert report["fresh"] + report["exact"] == answer["meta_info"]["prompt_tokens"]
    counted = after["declined"].get(FAULTS[fault], 0) - before["declined"].get(FAULTS[fault], 0)
    assert counted >= 2
    if FAULTS[fault].startswith("internal_error"):
        assert after["failures"] == before["failures"] + 2
        where = FAULTS[fault].partition(":")[2]
        assert server.log().count(f"relay: {where} failed; served by the stock path") == 1, "logged once"
    assert report_of(ask(server, [9, *prompt]))["declined"] is None, "it relays again once nothing fails"


@pytest.mark.parametrize("fault", ["prepare", "forward", "select"])
def test_a_failed_batch_answers_like_stock(
    server: Server, inspector: Inspector, rng: random.Random, fault: str
) -> None:
    prompt = consumer(server, rng)
    inspector.break_(server, fault)
    try:
        failed = ask(server, prompt, new=16)
    finally:
        inspector.break_(server, None)
    exact = ask(server, prompt, new=16, relay="off")
    assert failed["output_ids"] == exact["output_ids"]
    assert failed["meta_info"]["output_token_logprobs"] == exact["meta_info"]["output_token_logprobs"]


def test_a_request_whose_adoption_fails_is_served(server: Server, inspector: Inspector, rng: random.Random) -> None:
    prompt = consumer(server, rng)
    inspector.break_(server, "adopt")
    try:
        failed = ask(server, prompt)
    finally:
        inspector.break_(server, None)
    assert failed["output_ids"] == ask(server, prompt, relay="off")["output_ids"]


def test_what_cannot_be_learnt_is_not_reused(server: Server, inspector: Inspector, rng: random.Random) -> None:
    inspector.break_(server, "learn")
    try:
        prompt = consumer(server, rng)
    finally:
        inspector.break_(server, None)
    assert report_of(ask(server, prompt))["declined"] == "nothing_to_reuse"


# ---------------------------------------------------------------------- servers


@pytest.mark.parametrize(
    ("args", "reason"),
    [(("--disable-radix-cache",), "radix_cache_disabled"), (("--enable-session-radix-cache",), "session_radix_cache")],
    ids=["radix-cache-disabled", "session-radix-cache"],
)
def test_an_unsuitable_server_serves_stock_and_says_why(model: Path, args: tuple[str, ...], reason: str) -> None:
    with Server(model, "--radix-cache-backend", "relay", *args) as server:
        answer = server.generate([5, 6, 7], max_new_tokens=4, ignore_eos=True)
        state = server.get("/server_info")["internal_states"][0]["relay"]
        log = server.log()
    assert answer["meta_info"]["relay"]["declined"] == f"unsupported:{reason}"
    assert reason in state["unsupported"] and not state["active"]
    assert f"relay: off, this server is served stock: {reason}" in log


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("SGLANG_RELAY_LAYER_RANGE", "1,2,9", "the last one allowed is 5"),
        ("SGLANG_RELAY_POLICY", "magic", "allowed are rotate, relay, full"),
    ],
)
def test_a_setting_that_is_not_allowed_ends_the_start(model: Path, setting: str, value: str, allowed: str) -> None:
    with pytest.raises(ServerError) as caught, Server(model, "--radix-cache-backend", "relay", env={setting: value}):
        pass
    assert allowed in caught.value.args[0]
