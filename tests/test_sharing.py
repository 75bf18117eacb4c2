"""Forks, n > 1 and further turns over a relayed prompt share its prefix, as they would on a stock server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from plugins import Inspector
from tiny_model import make_tiny_llama

from sglang_relay.measure.server import Server

MOST_TOKENS = 1.1
"""KV slots of the relay server over those of the stock server."""


def tokens(n: int, seed: int) -> list[int]:
    return torch.randint(3, 1024, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


class Pair(NamedTuple):
    """The same server with and without the relay."""

    relay: Server
    stock: Server
    inspect_relay: Inspector
    inspect_stock: Inspector

    def both(self) -> list[tuple[Server, Inspector]]:
        return [(self.relay, self.inspect_relay), (self.stock, self.inspect_stock)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("sharing")
    model = make_tiny_llama(folder / "model")
    relay, stock = Inspector(folder / "relay"), Inspector(folder / "stock")
    with (
        Server(model, "--radix-cache-backend", "relay", env=relay.env) as with_relay,
        Server(model, env=stock.env) as without,
    ):
        yield Pair(with_relay, without, relay, stock)


def ask(server: Server, prompt: list[int] | list[list[int]], policy: str, new: int, **sampling: Any) -> Any:
    return server.generate(
        prompt, max_new_tokens=new, ignore_eos=True, custom_params={"relay_policy": policy}, **sampling
    )


def relayed_prompt(pair: Pair, server: Server, policy: str, seed: int) -> list[int]:
    """A prompt in which another agent's output stands, after the server has answered it once."""
    donor = ask(server, tokens(60, seed), policy, 200)["output_ids"]
    prompt = [*tokens(40, seed + 1), *donor, *tokens(20, seed + 2)]
    report = ask(server, prompt, policy, 1)["meta_info"].get("relay")
    if server is pair.relay:
        # The donor's last token was sampled but never run, so it has no KV.
        assert report["relayed"] + report["recomputed"] == len(donor) - 1, report
        assert report["segments"] == 1 and report["declined"] is None
    return prompt


def check_report(meta: dict[str, Any]) -> None:
    report = meta["relay"]
    total = sum(report[kind] for kind in ("exact", "approximate", "relayed", "recomputed", "fresh"))
    assert total == meta["prompt_tokens"], report
    assert report["exact"] + report["approximate"] == meta["cached_tokens"], report


def slots(pair: Pair, what: str) -> tuple[int, int]:
    relay, stock = (inspector.ask(server, "pool")[what] for server, inspector in pair.both())
    return relay, stock


def flush(pair: Pair) -> None:
    for server, inspector in pair.both():
        server.post("/flush_cache")
        inspector.ask(server, "pool")  # forgets the peak


@pytest.mark.parametrize("policy", ["rotate", "relay", "full"])
def test_an_eight_way_fork_hits_the_relayed_prefix(pair: Pair, policy: str) -> None:
    flush(pair)
    cached = []
    for server, _ in pair.both():
        prompt = relayed_prompt(pair, server, policy, 100)
        branches = [[*prompt, *tokens(12, 200 + i)] for i in range(8)]
        answers = ask(server, branches, policy, 40)
        for answer in answers:
            meta = answer["meta_info"]
            assert meta["cached_tokens"] >= len(prompt) - 1
            if server is pair.relay:
                check_report(meta)
                assert meta["relay"]["depth"] == (policy != "full")
        cached.append([a["meta_info"]["cached_tokens"] for a in answers])
    assert cached[0] == cached[1], "the siblings share less than on a stock server"
    for what in ("peak", "held"):
        relay, stock = slots(pair, what)
        assert stock > 0 and relay <= MOST_TOKENS * stock, what


@pytest.mark.parametrize("policy", ["rotate", "relay"])
def test_four_samples_share_one_relayed_prompt(pair: Pair, policy: str) -> None:
    flush(pair)
    for server, _ in pair.both():
        donor = ask(server, tokens(60, 300), policy, 200)["output_ids"]
        prompt = [*tokens(40, 301), *donor, *tokens(20, 302)]
        answers = ask(server, prompt, policy, 40, n=4, temperature=1.0)
        assert len(answers) == 4
        for answer in answers:
            assert answer["meta_info"]["cached_tokens"] == len(prompt) - 1
            if server is pair.relay:
                check_report(answer["meta_info"])
                assert answer["meta_info"]["relay"]["depth"] == 1
    for what in ("peak", "held"):
        relay, stock = slots(pair, what)
        assert stock > 0 and relay <= MOST_TOKENS * stock, what


@pytest.mark.parametrize("policy", ["rotate", "relay"])
def test_every_turn_of_a_chat_hits_the_turns_before(pair: Pair, policy: str) -> None:
    flush(pair)
    for server, _ in pair.both():
        history = relayed_prompt(pair, server, policy, 400)
        known = len(history)
        for turn in range(4):
            history = [*history, *tokens(15, 410 + turn)] if turn else history
            answer = ask(server, history, policy, 40)
            # All that the turn before ran: its last sampled token did not.
            assert answer["meta_info"]["cached_tokens"] == known - 1
            if server is pair.relay:
                check_report(answer["meta_info"])
                assert answer["meta_info"]["relay"]["depth"] == 1
            history = [*history, *answer["output_ids"]]
            known = len(history)
    for what in ("peak", "held"):
        relay, stock = slots(pair, what)
        assert stock > 0 and relay <= MOST_TOKENS * stock, what


def test_a_sibling_under_another_policy_does_not_hit_but_relays(pair: Pair) -> None:
    """Tiers do not share KV: what one policy left unrepaired is not another's prefix."""
    flush(pair)
    prompt = relayed_prompt(pair, pair.relay, "rotate", 500)
    meta = ask(pair.relay, prompt, "relay", 1)["meta_info"]
    check_report(meta)
    assert meta["cached_tokens"] == 0
    assert meta["relay"]["relayed"] + meta["relay"]["recomputed"] == 199
