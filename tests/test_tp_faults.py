"""Two tensor-parallel ranks, one of which goes wrong: both serve the batch stock, by name, and nothing hangs.

SGLang's rank-consensus checker is on, which ends the server when the ranks take different decisions on the tree.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plugins import install_plugin
from prompts import Cut, Donor, Prompt, compose, random_tokens
from tiny_model import make_tiny_llama

from sglang_relay.measure.divergence import READ_ARGS, read
from sglang_relay.measure.server import Server

VOCAB = 1024
POOL = 4096
ANSWER_WITHIN = 120.0
"""Seconds; far more than an answer takes, far less than a collective waits for a rank that does not come."""


_RARE = ("admits", "plan", "place", "measure", "select", "other_rows", "hand_over")


def slow(*values: str) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


class Ranks:
    """A server of two ranks, of which a fault can break the second."""

    def __init__(self, server: Server, fault: Path) -> None:
        self.server = server
        self._fault = fault
        self._rng = random.Random(5)
        self.donors: list[Donor] = []

    def fault(self, name: str) -> None:
        self._fault.write_text(name, encoding="utf-8")

    def ask(self, tokens: list[int], length: int = 12, **custom: Any) -> Any:
        request = {
            "input_ids": tokens,
            "sampling_params": {
                "temperature": 0,
                "max_new_tokens": length,
                "ignore_eos": True,
                "custom_params": custom,
            },
        }
        return self.server.post("/generate", request, timeout=ANSWER_WITHIN)

    def decode_two(self) -> None:
        prompts = [self.fresh(30) for _ in range(2)]
        self.donors = [Donor(p, self.ask(p, 150, relay="exact")["output_ids"]) for p in prompts]

    def sums(self) -> list[str]:
        """What was summed for the first time (rank_fault_plugin.py)."""
        return Path(f"{self._fault}.sums").read_text(encoding="utf-8").splitlines()

    def fresh(self, n: int) -> list[int]:
        return random_tokens(n, self._rng, VOCAB)

    def prompt(self) -> Prompt:
        return compose(self.donors, [Cut(0, 11, 100, 20), Cut(1, 30, 90, 5)], 9, self._rng, VOCAB)

    def relays(self, policy: str = "relay") -> None:
        prompt = self.prompt()
        report = self.ask(prompt.tokens, relay_policy=policy)["meta_info"]["relay"]
        assert report["declined"] is None, report
        assert report["relayed"] + report["recomputed"] == prompt.matched, report

    def declines(self, policy: str = "relay") -> str:
        """A prompt that could be relayed is served fresh and answered as an exact request is; returns the reason."""
        prompt = self.prompt()
        answer = self.ask(prompt.tokens, relay_policy=policy)
        report = answer["meta_info"]["relay"]
        assert (report["relayed"], report["recomputed"], report["segments"]) == (0, 0, 0), report
        assert report["exact"] + report["fresh"] == len(prompt.tokens), report
        assert report["depth"] == 0, report
        assert answer["output_ids"] == self.ask(prompt.tokens, relay="off")["output_ids"]
        return report["declined"]

    def evict(self) -> None:
        """Push everything out of the pool, so that ranks whose trees rank their nodes differently fall apart."""
        for _ in range(POOL // 500 + 2):
            self.ask(self.fresh(500), 2, relay="off")


@contextlib.contextmanager
def serve(folder: Path, *args: object, at_start: str = "", **more: str) -> Iterator[Ranks]:
    model = make_tiny_llama(folder / "model", vocab=VOCAB)
    fault = folder / "fault"
    fault.write_text(at_start, encoding="utf-8")
    code = (Path(__file__).parent / "rank_fault_plugin.py").read_text(encoding="utf-8")
    env = install_plugin(folder / "plugin", "relay_test_rank_fault", code) | {"RELAY_TEST_FAULT": str(fault)} | more
    flags = ("--radix-cache-backend", "relay", "--tp-size", 2, "--max-total-tokens", POOL, *args)
    with Server(model, *flags, env=env) as server:
        yield Ranks(server, fault)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    beside_slots = {"SGLANG_RELAY_INFLUENCE": "auto"}
    with serve(tmp_path_factory.mktemp("ranks"), SGLANG_ENABLE_RANK_CONSENSUS_CHECKER="1", **beside_slots) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def quoting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Without the checker, which compares texts of requests: one whose answer is forced holds an address."""
    with serve(tmp_path_factory.mktemp("quoting"), *READ_ARGS) as ranks:
        ranks.decode_two()
        yield ranks


@pytest.fixture
def ranks(served: Ranks) -> Iterator[Ranks]:
    """The server with two fresh donors, without a fault before and after."""
    served.fault("")
    served.decode_two()
    yield served
    served.fault("")


@pytest.mark.parametrize("policy", ["rotate", "relay", "full"])
def test_ranks_relay_together(ranks: Ranks, policy: str) -> None:
    ranks.relays(policy)


@pytest.mark.parametrize("fault", ["adopt", "match", "choose", "prepare", "attention", *map(slow, _RARE)])
def test_one_broken_rank_makes_all_decline(ranks: Ranks, fault: str) -> None:
    ranks.relays()
    ranks.fault(fault)
    for _ in range(2):
        assert ranks.declines() == "ranks_disagree"
    ranks.fault("")
    ranks.relays()
    ranks.evict()
    ranks.decode_two()
    ranks.relays()


@pytest.mark.parametrize(
    ("fault", "policy"),
    [
        ("deviations", "relay"),
        ("scores", "probe"),
        slow("influence", "relay"),
        slow("last_layer", "relay"),
        ("work", "rotate"),
    ],
)
def test_rank_that_fails_where_the_others_go_on_to_meet(ranks: Ranks, fault: str, policy: str) -> None:
    """Just before the ranks sum what they measured, between two layers, and behind the last agreement of a pass."""
    ranks.relays(policy)
    ranks.fault(fault)
    assert ranks.declines(policy) == "ranks_disagree"
    ranks.fault("")
    ranks.relays(policy)


def test_rank_that_cannot_count_an_agreed_plan_goes_on_with_the_others(ranks: Ranks) -> None:
    ranks.fault("count")
    ranks.relays()
    ranks.relays("probe")
    ranks.fault("")
    ranks.evict()
    ranks.decode_two()
    ranks.relays()


def test_nothing_is_summed_for_the_first_time_while_requests_wait(ranks: Ranks) -> None:
    """SGLang builds a kernel for the first sum of a dtype; what the relay sums is float32, whatever the model's is."""
    for policy in ("relay", "probe", "cacheblend"):
        ranks.relays(policy)
    sums = ranks.sums()
    assert sums.count("starting torch.float32 1") == 2, "on both ranks"
    assert not [line for line in sums if line.startswith("ready")], sums


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("split", "layer_split_failed"), slow("rotary", "rotary_probe_failed"), slow("build", "rank_sums_failed")],
)
def test_rank_that_fails_at_start_up(tmp_path: Path, fault: str, reason: str) -> None:
    """All of them are served stock, by name."""
    with serve(tmp_path, at_start=fault) as ranks:
        ranks.fault("")
        report = ranks.ask(ranks.fresh(60))["meta_info"]["relay"]
        (internal,) = ranks.server.get("/server_info")["internal_states"]
    assert report["declined"] == f"unsupported:{reason}"
    assert internal["relay"]["unsupported"] == [reason]


def quoting_answer(ranks: Ranks) -> dict[str, Any]:
    """The report of an answer that is forced to quote what its prompt reuses."""
    prompt = ranks.prompt()
    piece = prompt.pieces[0]
    quote = prompt.tokens[piece.start + 20 : piece.start + 50]
    ask = {"relay_policy": "probe", "relay_budget": 0.2}
    return read(ranks.server, prompt.tokens, quote, ask).report


@pytest.mark.parametrize("fault", ["quotes", "other_quotes", "quote_attention"])
def test_one_broken_rank_makes_all_stop_repairing_quotes(quoting: Ranks, fault: str) -> None:
    assert quoting_answer(quoting)["quoted"] > 5
    quoting.fault(fault)
    report = quoting_answer(quoting)
    assert report["declined"] is None and report["relayed"] > 0, report
    assert report["quoted"] == 0
    quoting.fault("")
    assert quoting_answer(quoting)["quoted"] > 5


@pytest.mark.parametrize("fault", ["other_segments", slow("learn")])
def test_rank_whose_index_differs(ranks: Ranks, fault: str) -> None:
    """The ranks decline, empty their indices together, and go on with what they learn from then on."""
    ranks.fault(fault)
    ranks.decode_two()
    assert ranks.declines() == "ranks_disagree"
    assert ranks.declines() == "nothing_to_reuse"
    ranks.fault("")
    ranks.decode_two()
    ranks.relays()
    ranks.evict()
    ranks.decode_two()
    ranks.relays()
