"""What SGLang's scheduler takes for granted (engine/invariants.py) holds at every step, whatever is relayed.

The servers mix chunks with decoding, have pages of 16 and chunks of 128 rows; some requests ask for log-probabilities,
which keeps their steps from being mixed. A plugin of the tests (scheduler_plugin.py) looks at every admitted batch.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from plugins import Inspector
from prompts import random_tokens

from sglang_relay.measure.server import Server

VOCAB = 1024
CHUNK, PAGE = 128, 16
FLAGS = ("--chunked-prefill-size", CHUNK, "--page-size", PAGE, "--enable-mixed-chunk", "--max-total-tokens", 24_000)
BOUND = 1e-4
"""Of log-probabilities in fp32, between batches of different shapes."""


class Pair(NamedTuple):
    """The same server with and without the relay."""

    relay: Server
    stock: Server
    inspector: Inspector

    def flush(self) -> None:
        for server in (self.relay, self.stock):
            server.post("/flush_cache")

    def broken(self) -> dict[str, int]:
        return self.inspector.ask(self.relay, "broken")

    def stats(self) -> dict[str, Any]:
        return self.relay.get("/server_info")["internal_states"][0]["relay"]["stats"]

    def donate(self, text: list[int]) -> None:
        ask(self.relay, text, 1, {"relay": "exact", "relay_donate": "all"})


@pytest.fixture(scope="module")
def pair(model: Path, inspector: Inspector) -> Iterator[Pair]:
    args = ("--radix-cache-backend", "relay", "--log-level", "debug")
    with (
        Server(model, *FLAGS, *args, env=inspector.env) as relay,
        Server(model, *FLAGS) as stock,
    ):
        yield Pair(relay, stock, inspector)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.node.name)


def tokens(n: int, rng: random.Random) -> list[int]:
    return random_tokens(n, rng, VOCAB)


def ask(server: Server, prompt: list[int], new: int, params: dict[str, Any] | None = None, **fields: Any) -> Any:
    return server.generate(prompt, max_new_tokens=new, ignore_eos=True, custom_params=params, fields=fields)


def report_of(answer: dict[str, Any]) -> dict[str, Any]:
    meta = answer["meta_info"]
    report = meta["relay"]
    counts = [report[kind] for kind in KINDS]
    assert min(counts) >= 0 and sum(counts) == meta["prompt_tokens"], report
    return report


def same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Log-probabilities agree as far as the same tokens were sampled."""
    pairs = zip(*(a["meta_info"]["output_token_logprobs"] for a in (ours, theirs)), strict=True)
    for (value, token, *_), (other, expected, *_) in pairs:
        assert token == expected and abs(value - other) < BOUND


def test_a_prompt_that_is_cut_beside_another_one(pair: Pair, rng: random.Random) -> None:
    """Five requests decode, so a chunk has 123 rows; the first prompt's last one leaves 11, fewer than a page."""
    pair.flush()
    lent, innocent = tokens(320, rng), tokens(614, rng)
    relayed = [*tokens(5, rng), *lent, *tokens(500, rng)]
    pair.donate(lent)
    with ThreadPoolExecutor(8) as pool:
        decoding = [pool.submit(ask, pair.relay, tokens(20, rng), 400, {"relay": "off"}) for _ in range(5)]
        ask(pair.relay, tokens(20, rng), 20, {"relay": "off"})
        pair.inspector.ask(pair.relay, "gather", count=2)
        one = pool.submit(ask, pair.relay, innocent, 12, {"relay": "off"})
        two = pool.submit(ask, pair.relay, relayed, 12, {"relay_policy": "rotate"})
        assert not any(d.done() for d in decoding)
        answers = [one.result(), two.result()]
    assert report_of(answers[0])["fresh"] == len(innocent)
    assert report_of(answers[1])["relayed"] >= 256
    assert answers[0]["output_ids"] == ask(pair.stock, innocent, 12)["output_ids"]
    longer = [*innocent, *answers[0]["output_ids"], *tokens(9, rng)]
    after = ask(pair.relay, longer, 12, {"relay": "off"}, return_logprob=True)
    assert after["meta_info"]["cached_tokens"] >= len(innocent) - PAGE
    same(after, ask(pair.stock, longer, 12, return_logprob=True))
    assert pair.broken() == {}


@pytest.mark.parametrize("fault", ["select", "interpolate"])
def test_a_prompt_whose_last_chunk_runs_stock_is_answered_exactly(pair: Pair, rng: random.Random, fault: str) -> None:
    """A probe repairs in the last chunk; where that fails, what earlier chunks have placed is computed after all."""
    lent = [tokens(rng.randint(150, 300), rng) for _ in range(2)]
    for text in lent:
        pair.donate(text)
    prompt = [*tokens(20, rng), *lent[0], *tokens(50, rng), *lent[1], *tokens(40, rng)]
    params = {"relay_policy": "probe", "relay_donate": "none"}
    pair.inspector.break_(pair.relay, fault)
    try:
        answer = ask(pair.relay, prompt, 12, params, return_logprob=True)
    finally:
        pair.inspector.break_(pair.relay, None)
    report = report_of(answer)
    assert (report["fresh"], report["depth"], report["segments"], report["cost"]) == (len(prompt), 0, 0, 0.0)
    assert report["declined"] == f"internal_error:{'select' if fault == 'select' else 'attention'}"
    same(answer, ask(pair.stock, prompt, 12, return_logprob=True))
    again = ask(pair.relay, [7, *prompt], 12, params, return_logprob=True)
    assert report_of(again)["relayed"] > 64
    with pytest.raises(AssertionError):
        same(again, ask(pair.stock, [7, *prompt], 12, return_logprob=True))


@pytest.mark.parametrize(
    "params", [{"relay": "off"}, {"relay_policy": "rotate", "relay_donate": "all"}], ids=["off", "on"]
)
def test_an_answer_to_a_part_of_a_prompt_is_not_published(
    pair: Pair, rng: random.Random, params: dict[str, Any]
) -> None:
    """Neither in the tree nor to others: behind that part its KV is of other tokens."""
    prompt = tokens(100, rng)
    where: dict[str, Any] = {} if "relay" in params else {"namespace": {"tier": "rotate"}}
    pair.inspector.break_(pair.relay, "counted_short")
    try:
        answer = ask(pair.relay, prompt, 40, params)
    finally:
        pair.inspector.break_(pair.relay, None)
    held = pair.inspector.rows(pair.relay, [*prompt, *answer["output_ids"]], **where)
    assert len(held) <= 60
    whole = ask(pair.relay, [9, *prompt[1:]], 40, params)
    assert len(pair.inspector.rows(pair.relay, [9, *prompt[1:], *whole["output_ids"]], **where)) >= 128
    others = report_of(ask(pair.relay, [*tokens(20, rng), *answer["output_ids"], *tokens(5, rng)], 1))
    assert others["relayed"] + others["recomputed"] == 0


KINDS = ("exact", "approximate", "relayed", "recomputed", "fresh")
POLICIES = ("rotate", "legolink", "probe", "relay", "cacheblend", "full")


def test_random_work(pair: Pair, rng: random.Random) -> None:
    """Prompts of up to six chunks, some relayed and some not, some with the log-probabilities of their prompts."""
    pair.flush()
    before = pair.stats()
    lent = [tokens(rng.randint(150, 500), rng) for _ in range(6)]
    for text in lent:
        pair.donate(text)

    def work(number: int) -> tuple[list[int], dict[str, Any], dict[str, Any], int]:
        parts = [tokens(rng.randint(3, 60), rng)]
        for text in rng.sample(lent, rng.randint(0, 2)):
            cut = rng.randint(0, len(text) - 100)
            parts += [text[cut : cut + rng.randint(80, 400)], tokens(rng.randint(3, 150), rng)]
        params = {"relay_policy": rng.choice(POLICIES)} if number % 3 else {"relay": rng.choice(("off", "exact"))}
        fields: list[dict[str, Any]] = [
            {},
            {},
            {"return_logprob": True},
            {"return_logprob": True, "logprob_start_len": 0},
        ]
        return (
            [t for part in parts for t in part],
            {"relay_donate": "none", **params},
            rng.choice(fields),
            rng.randint(1, 40),
        )

    wanted = [work(number) for number in range(120)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda w: ask(pair.relay, w[0], w[3], w[1], **w[2]), wanted))
    reused, sums = 0, Counter[str]()
    for (prompt, params, fields, new), answer in zip(wanted, answers, strict=True):
        report = report_of(answer)
        assert answer["meta_info"]["prompt_tokens"] == len(prompt)
        assert not (report["declined"] or "").startswith(("internal_error", "host_invariant")), report
        reused += report["relayed"] + report["recomputed"]
        sums.update({kind: report[kind] for kind in (*KINDS, "quoted")})
        if fields and "relay" in params:
            same(answer, ask(pair.stock, prompt, new, **fields))
    assert reused > 5000
    assert pair.broken() == {}
    after = pair.stats()
    assert after["failures"] == before["failures"] and "other_policy_in_batch" not in after["declined"]
    donors = sum(map(len, lent))  # each computed once by a request of its own
    counted = {kind: after["tokens"][kind] - before["tokens"][kind] for kind in KINDS}
    assert counted == {kind: sums[kind] + (donors if kind == "fresh" else 0) for kind in KINDS}
    assert after["quoted"] - before["quoted"] == sums["quoted"]


# ---------------------------------------------------------------------- bounds


@pytest.fixture(scope="module")
def audited(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Inspector]]:
    """Where a test audits, all that can be: its batch runs on the stock path, too."""
    inspector = Inspector(tmp_path_factory.mktemp("audited"))
    flags = ("--radix-cache-backend", "relay", "--chunked-prefill-size", 256)
    with Server(model, *flags, env=inspector.env) as server:
        yield server, inspector


@pytest.mark.parametrize("policy", ["rotate", "probe", "cacheblend"])
def test_nothing_runs_wider_than_a_chunk(audited: tuple[Server, Inspector], rng: random.Random, policy: str) -> None:
    """3,000 reusable tokens in a prompt of 3,042: on the stock path, for an audit or after a failure, no forward is
    wider than a chunk; a repair, which a probe leaves to the last chunk, is not wider than two."""
    server, inspector = audited
    lent = [tokens(1000, rng) for _ in range(3)]
    for text in lent:
        ask(server, text, 1, {"relay": "exact", "relay_donate": "all"})
    prompt = [*tokens(20, rng), *(t for text in lent for t in text), *tokens(22, rng)]
    short = [*tokens(20, rng), *lent[0][:150], *tokens(22, rng)]
    inspector.ask(server, "widest")
    whole = report_of(ask(server, prompt, 4, {"relay_policy": policy, "relay_donate": "none"}))
    inspector.ask(server, "audit_every", every=1)
    try:
        audits = [
            report_of(ask(server, asked, 4, {"relay_policy": policy, "relay_donate": "none"}))
            for asked in (short, [9, *prompt])
        ]
    finally:
        inspector.ask(server, "audit_every", every=0)
    inspector.break_(server, "forward")
    try:
        failed = report_of(ask(server, [7, *prompt], 4, {"relay_policy": policy, "relay_donate": "none"}))
    finally:
        inspector.break_(server, None)
    widest = inspector.ask(server, "widest")
    assert whole["relayed"] + whole["recomputed"] > (700 if policy == "probe" else 2900), whole
    assert [audit["declined"] for audit in audits] == ["audited", "audited"]
    assert failed["fresh"] > 200, failed
    assert 0 < widest["stock"] <= 256
    assert 0 < widest["stage"] <= 2 * 256
    assert inspector.ask(server, "broken") == {}


def test_a_request_that_is_left_waiting_is_not_overtaken_for_ever(
    audited: tuple[Server, Inspector], rng: random.Random
) -> None:
    """While prompts of one policy keep coming, each of several chunks, one of another policy gets its turn."""
    server, _ = audited
    lent = tokens(600, rng)
    ask(server, lent, 1, {"relay": "exact", "relay_donate": "all"})
    order: list[str] = []

    def relayed(policy: str) -> None:
        prompt = [*tokens(8, rng), *lent, *tokens(8, rng)]
        report = report_of(ask(server, prompt, 1, {"relay_policy": policy, "relay_donate": "none"}))
        assert report["segments"] > 0, report
        order.append(policy)

    with ThreadPoolExecutor(16) as pool:
        first = [pool.submit(relayed, "rotate") for _ in range(12)]
        waiting = pool.submit(relayed, "legolink")
        later = [pool.submit(relayed, "rotate") for _ in range(24)]
        for work in (*first, waiting, *later):
            work.result()
    assert order.index("legolink") < 24, order
