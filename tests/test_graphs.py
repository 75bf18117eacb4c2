"""Whole passes of the relay replayed from SGLang's breakable prefill graphs.

Two relay servers, in which SGLang captures its prefill graphs and replays them for what is not relayed; one of them
replays them for the relay's passes, too. The graphs are graph_plugin.RecordedGraph; everything around them is SGLang's.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from plugins import Inspector, install_plugin
from prompts import Cut, Donor, Prompt, compose, random_tokens
from tiny_model import make_tiny_llama

from sglang_relay.measure.server import Server

VOCAB = 1024
LAYERS = 4
PASSES = {"rotate": 1, "legolink": 1, "full": 1, "probe": 2, "probe_only": 2, "relay": 1, "cacheblend": 0}
"""How many passes of a relayed prompt keep their rows in every layer. `relay` selects at layer 3, which is the last one
of this model."""
PROMPTS = 3
BOUND = 1e-5
"""Of log-probabilities: a padded pass, and a last layer of all rows, multiply matrices of another shape."""


class Side(NamedTuple):
    server: Server
    inspector: Inspector
    donors: list[Donor]

    def passes(self) -> int | None:
        return self.server.get("/server_info")["internal_states"][0]["relay"]["graph_passes"]

    def stats(self) -> dict[str, Any]:
        return self.server.get("/server_info")["internal_states"][0]["relay"]["stats"]

    def ask(self, prompt: list[int], fields: dict[str, Any] | None = None, **custom: Any) -> dict[str, Any]:
        params, fields = {"custom_params": custom} if custom else {}, {"return_logprob": True, **(fields or {})}
        return self.server.generate(prompt, max_new_tokens=6, ignore_eos=True, fields=fields, **params)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), vocab=VOCAB, layers=LAYERS)


def serve(model: Path, directory: Path, graphs: str, *args: object) -> Iterator[Side]:
    inspector = Inspector(directory / "inspector")
    code = (Path(__file__).parent / "graph_plugin.py").read_text(encoding="utf-8")
    install_plugin(directory / "graphs", "relay_test_graphs", code)
    env = inspector.env | {
        "PYTHONPATH": str(directory / "graphs") + os.pathsep + inspector.env["PYTHONPATH"],
        "SGLANG_RELAY_GRAPHS": graphs,
        "SGLANG_RELAY_ROUTE_ABOVE": "1000",
    }
    rng = random.Random(5)
    with Server(model, "--radix-cache-backend", "relay", "--max-total-tokens", 16384, *args, env=env) as server:
        donors = []
        for _ in range(2):
            head = random_tokens(20, rng, VOCAB)
            sampling = {"max_new_tokens": 120, "ignore_eos": True, "custom_params": {"relay": "exact"}}
            donors.append(Donor(head, server.generate(head, **sampling)["output_ids"]))
        yield Side(server, inspector, donors)


@pytest.fixture(scope="module")
def replaying(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    yield from serve(model, tmp_path_factory.mktemp("replaying"), "auto")


@pytest.fixture(scope="module")
def eager(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    yield from serve(model, tmp_path_factory.mktemp("eager"), "off")


def prompt_of(donors: list[Donor], seed: int) -> Prompt:
    """20 and 30 fresh tokens around 90 that a donor decoded: all passes have a graph that fits."""
    rng = random.Random(seed)
    prompt = compose(donors, [Cut(rng.randrange(2), rng.randrange(20), 90, 20)], 30, rng, VOCAB)
    prompt.tokens[0] = 3 + seed  # no prompt shares a prefix with another
    return prompt


def logprobs(answer: dict[str, Any]) -> list[float]:
    return [value for value, *_ in answer["meta_info"]["output_token_logprobs"]]


@pytest.mark.parametrize("context", [0, 100])
def test_a_replayed_pass_is_the_eager_one_to_the_bit(replaying: Side, context: int) -> None:
    """Where a graph has just the rows. Every layer attends once, with the relay's rows."""
    found = replaying.inspector.ask(replaying.server, "replay", context=context, rows=96)
    assert found["same_logits"] and found["same_kv"], found
    assert found["written"] and not found["outside"], found
    assert found["calls"] == [[[layer, 96] for layer in range(LAYERS)]] * 2


@pytest.mark.parametrize("rows", [50, 130, 255])
def test_padding_is_neither_attended_to_nor_written(replaying: Side, rows: int) -> None:
    found = replaying.inspector.ask(replaying.server, "replay", context=40, rows=rows)
    assert found["calls"] == [[[layer, rows] for layer in range(LAYERS)]] * 2
    assert found["written"] and not found["outside"], found
    assert found["apart"] < BOUND, found


@pytest.mark.parametrize("rows", [3, 257, 100])
def test_a_pass_that_fits_no_graph_runs_eagerly(replaying: Side, rows: int) -> None:
    """Too few rows for the smallest, too many for the largest, more padding than rows."""
    before = replaying.passes()
    found = replaying.inspector.ask(replaying.server, "replay", context=40, rows=rows)
    assert replaying.passes() == before
    assert found["same_logits"] and found["same_kv"] and found["written"] and not found["outside"], found


def test_a_replayed_pass_may_end_with_keys_and_values(replaying: Side) -> None:
    replaying.inspector.ask(replaying.server, "logits")
    before = replaying.passes()
    found = replaying.inspector.ask(replaying.server, "replay", context=40, rows=96, ends_early=True)
    assert replaying.passes() == (before or 0) + 1
    assert found["same_kv"] and found["written"] and not found["outside"], found
    assert found["calls"] == [[[layer, 96] for layer in range(LAYERS)]] * 2
    assert replaying.inspector.ask(replaying.server, "logits") == [], "nobody reads logits of such a pass"


@pytest.fixture(scope="module")
def ranks(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    yield from serve(model, tmp_path_factory.mktemp("ranks"), "auto", "--tp-size", 2)


@pytest.mark.parametrize("policy", PASSES)
def test_relayed_answers_are_those_of_eager_passes(replaying: Side, eager: Side, policy: str) -> None:
    answer_alike(replaying, eager, policy, 10 * list(PASSES).index(policy))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["rotate", "probe_only"])
def test_two_ranks_replay_alike(ranks: Side, eager: Side, policy: str) -> None:
    """With the all-reduces inside the graphs, and a probe pass that all ranks leave at the same break. Not `probe`,
    which answers a little differently on two ranks (attention/interpolation.py)."""
    answer_alike(ranks, eager, policy, 300 + 10 * len(policy))


def answer_alike(replaying: Side, eager: Side, policy: str, seed: int) -> None:
    assert replaying.donors == eager.donors
    for number in range(PROMPTS):
        prompt = prompt_of(eager.donors, seed + number)
        passes, found = replaying.passes() or 0, []
        for side in (replaying, eager):
            answer = side.ask(prompt.tokens, relay_policy=policy)
            report = answer["meta_info"]["relay"]
            assert report["declined"] is None and report["relayed"] + report["recomputed"] == prompt.matched, report
            found.append((answer, report["recomputed"], report["cost"]))
        assert replaying.passes() == passes + PASSES[policy]
        (a, recomputed, cost), (b, same, least) = found
        assert recomputed == same
        # A replay runs the last layer whole, of all rows: of `relay`, which has no layer left to select for, too.
        rows = prompt.matched if policy == "relay" else recomputed if PASSES[policy] else 0
        assert cost - least == pytest.approx(0.9 * rows / prompt.matched / LAYERS, abs=1e-4)
        assert a["output_ids"] == b["output_ids"]
        assert max(abs(x - y) for x, y in zip(logprobs(a), logprobs(b), strict=True)) < BOUND
    assert eager.passes() is None
    for side in (replaying, eager):
        assert (side.stats()["fallbacks"], side.stats()["failures"]) == (0, 0), side.stats()


@pytest.mark.parametrize("policy", ["probe", "cacheblend"])
def test_no_pass_has_logits_that_nobody_reads(replaying: Side, eager: Side, policy: str) -> None:
    for side in (replaying, eager):
        side.inspector.ask(side.server, "logits")
        answer = side.ask(prompt_of(eager.donors, 150 + len(policy)).tokens, relay_policy=policy)
        assert answer["meta_info"]["relay"]["declined"] is None
        assert len(side.inspector.ask(side.server, "logits")) == 1


def test_what_does_not_relay_is_served_to_the_bit(replaying: Side, eager: Side) -> None:
    """Passes of the relay leave nothing behind in the buffers that SGLang's own replays use, nor in its backend."""
    for number in range(PROMPTS):
        tokens = prompt_of(eager.donors, 100 + number).tokens
        a, b = (side.ask(tokens, relay="off") for side in (replaying, eager))
        assert (a["output_ids"], logprobs(a)) == (b["output_ids"], logprobs(b))
    kinds = {side.inspector.ask(side.server, "stock_attention") for side in (replaying, eager)}
    assert kinds == {"TorchCpuAttnBackend"}


@pytest.mark.parametrize("policy", ["rotate", "probe"])
def test_a_failure_in_a_break_ends_in_the_stock_path(replaying: Side, eager: Side, policy: str) -> None:
    tokens = prompt_of(eager.donors, 200 + len(policy)).tokens
    before = replaying.stats()["fallbacks"]
    replaying.inspector.break_(replaying.server, "attention")
    try:
        broken = replaying.ask(tokens, relay_policy=policy)
    finally:
        replaying.inspector.break_(replaying.server, None)
    stock = eager.ask(tokens, relay="off")
    assert (broken["output_ids"], logprobs(broken)) == (stock["output_ids"], logprobs(stock))
    assert replaying.stats()["fallbacks"] == before + 1
    assert replaying.inspector.ask(replaying.server, "stock_attention") == "TorchCpuAttnBackend"
    again = prompt_of(eager.donors, 210 + len(policy)).tokens
    assert replaying.ask(again, relay_policy=policy)["meta_info"]["relay"]["declined"] is None


@pytest.mark.parametrize(("policy", "budget"), [("legolink", 5), ("probe_only", 0.37)])
def test_an_audited_replay_is_judged_and_stock_answers(
    replaying: Side, eager: Side, policy: str, budget: float
) -> None:
    """The replayed pass has its logits in the buffer that the stock forward behind it writes to, too. Budgets of their
    own: breakers of other tests' tiers stay closed."""
    tokens = prompt_of(eager.donors, 230 + len(policy)).tokens
    params, whole = {"relay_policy": policy, "relay_budget": budget}, {"token_ids_logprob": list(range(VOCAB))}
    before, passes = replaying.stats(), replaying.passes() or 0
    replaying.inspector.ask(replaying.server, "audits", every=1)
    try:
        audited = replaying.ask(tokens, whole, **params)
    finally:
        found = replaying.inspector.ask(replaying.server, "audits", every=0)
    after = replaying.stats()
    assert audited["meta_info"]["relay"]["declined"] == "audited"
    assert replaying.passes() == passes + PASSES[policy]
    assert (after["audits"], after["fallbacks"]) == (before["audits"] + 1, before["fallbacks"])
    relayed = eager.ask(tokens, whole, **params)  # first: of an exact answer's KV nothing would be approximate
    stock = eager.ask(tokens, whole, relay="off")
    assert (audited["output_ids"], logprobs(audited)) == (stock["output_ids"], logprobs(stock))
    rows = replaying.inspector.rows(replaying.server, tokens, namespace={"tier": f"{policy}@{budget:g}"})
    assert rows == eager.inspector.rows(eager.server, tokens)
    guess, exact = first_token(relayed), first_token(stock)
    want = float(torch.nn.functional.kl_div(guess, exact, log_target=True, reduction="sum"))
    assert want > 100 * BOUND and found == [pytest.approx(want, rel=1e-3, abs=BOUND)]


def first_token(answer: dict[str, Any]) -> torch.Tensor:
    """Log-probabilities, float64 [vocab]."""
    values = answer["meta_info"]["output_token_ids_logprobs"][0]
    assert [token for _, token, _ in values] == list(range(VOCAB))
    return torch.tensor([value for value, *_ in values], dtype=torch.float64)


def test_no_replay_is_logged_as_a_failed_capture(replaying: Side) -> None:
    log = replaying.server.log()
    assert "Capture target prefill CUDA graph end" in log
    assert "Fail when using backend" not in log
