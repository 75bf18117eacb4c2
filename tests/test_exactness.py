"""A policy that recomputes every token it reuses must give a stock server's answers: `full`, and the others when their
budget is everything.

One stock server answers random prompts once. Relay servers of several kinds (mixed chunks, pages of 16, the Python tree
without overlap, two tensor-parallel ranks under SGLang's rank-consensus checker) decode the same donors, take pieces of
their outputs out of the same prompts, and must give the same tokens with the same log-probabilities up to the rounding
of fp32. A request that does not relay must be served to the bit as without the extension.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prompts import Donor, Prompt, random_prompt, random_tokens
from tiny_model import make_tiny_llama

from sglang_relay.measure.server import Server

VOCAB = 1024
LAYERS = 3
"""With 6, two stock servers that differ in nothing but the chunk size already differ by 9.5e-6 over these prompts."""
COUNT = 200
FEWER = 40
EVERYTHING: list[dict[str, Any]] = [
    {"relay_policy": "probe", "relay_budget": 1.0},
    {"relay_policy": "cacheblend", "relay_budget": 1.0},
    {"relay_policy": "legolink", "relay_budget": 4096},
]
AT_ONCE = 8
DONORS = 12
SHORTEST = 32
"""Tokens; the shortest run that is reused."""
SPARE = 17
"""Last tokens of a donor that no prompt uses: a tree of page 16 holds whole pages only."""
BOUND = 1e-5
CHUNK = 200
POOL = ("--max-total-tokens", 65_536)
CHUNKED = ("--enable-mixed-chunk", "--chunked-prefill-size", CHUNK)
WHOLE = ("--chunked-prefill-size", 8192)


class Kind(NamedTuple):
    """A kind of relay server. cuts: whether chunk ends fall into pieces; a chunk's last token is always fresh. bound:
    of log-probabilities, in nats."""

    args: tuple[object, ...]
    env: dict[str, str]
    cuts: bool = False
    bound: float = BOUND


KINDS = {
    "mixed-chunk": Kind(CHUNKED, {}, cuts=True),
    "page-16": Kind((*WHOLE, "--page-size", 16), {}),
    "python-core-no-overlap": Kind(
        (*WHOLE, "--disable-overlap-schedule"), {"SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python"}
    ),
    # Its ranks add their parts of a sum, which the stock server adds up in one go.
    "tp-2": Kind((*WHOLE, "--tp-size", 2), {"SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1"}, bound=2 * BOUND),
}


class Stock(NamedTuple):
    """What the stock server answered. plain: long random prompts, answered one after the other."""

    model: Path
    donors: list[Donor]
    prompts: list[Prompt]
    answers: list[dict[str, Any]]
    plain: list[list[int]]
    plain_answers: list[dict[str, Any]]


def own_first_tokens(prompts: Sequence[list[int]], first: int) -> None:
    """Let no prompt share a prefix with another, on whatever server and in whatever order."""
    for number, prompt in enumerate(prompts):
        prompt[0] = first + number


def ask(server: Server, prompt: list[int], length: int, fields: dict[str, Any] | None = None, **custom: Any) -> Any:
    return server.generate(
        prompt,
        max_new_tokens=length,
        ignore_eos=True,
        fields={"return_logprob": True, **(fields or {})},
        **({"custom_params": custom} if custom else {}),
    )


def decode_donors(server: Server, prompts: Sequence[list[int]], **custom: Any) -> list[Donor]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = pool.map(lambda p: ask(server, p, 120, **custom)["output_ids"], prompts)
        return [Donor(prompt, output) for prompt, output in zip(prompts, answers, strict=True)]


def ask_all(server: Server, prompts: Sequence[Prompt], **custom: Any) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda p: ask(server, p.tokens, 12, **custom), prompts))


def ask_plain(server: Server, plain: Sequence[list[int]], **custom: Any) -> list[dict[str, Any]]:
    """One at a time; every second one with the log-probabilities of its prompt."""
    starts: list[dict[str, Any]] = [{"logprob_start_len": 0}, {}]
    return [ask(server, prompt, 8, starts[i % 2], **custom) for i, prompt in enumerate(plain)]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Stock:
    model = make_tiny_llama(tmp_path_factory.mktemp("tiny"), vocab=VOCAB, layers=LAYERS)
    rng = random.Random(11)
    with Server(model, *CHUNKED, *POOL) as server:
        heads = [random_tokens(rng.randint(16, 48), rng, VOCAB) for _ in range(DONORS)]
        plain = [random_tokens(rng.randint(20, 3 * CHUNK), rng, VOCAB) for _ in range(12)]
        own_first_tokens([*heads, *plain], 3 + COUNT)
        donors = decode_donors(server, heads)
        prompts = [random_prompt(donors, rng, VOCAB, spare=SPARE) for _ in range(COUNT)]
        own_first_tokens([p.tokens for p in prompts], 3)
        answers = ask_all(server, prompts)
        return Stock(model, donors, prompts, answers, plain, ask_plain(server, plain))


class Relay(NamedTuple):
    server: Server
    kind: Kind
    donors: list[Donor]


@pytest.fixture(scope="module")
def relay(stock: Stock, request: pytest.FixtureRequest) -> Iterator[Relay]:
    kind = KINDS[request.param]
    # By default a prompt must hold more than its shortest segment before it is worth relaying.
    env = {"SGLANG_RELAY_MIN_SEGMENT": str(SHORTEST), "SGLANG_RELAY_MIN_RELAYED": str(SHORTEST), **kind.env}
    env["SGLANG_RELAY_ROUTE_ABOVE"] = "1000"  # however long the question
    with Server(stock.model, "--radix-cache-backend", "relay", *POOL, *kind.args, env=env) as server:
        yield Relay(server, kind, decode_donors(server, [d.prompt for d in stock.donors], relay="exact"))


def logprobs(answer: dict[str, Any], which: str = "output") -> list[float | None]:
    return [value for value, *_ in answer["meta_info"][f"{which}_token_logprobs"]]


@pytest.mark.parametrize("everything", EVERYTHING, ids=lambda p: p["relay_policy"])
@pytest.mark.parametrize("relay", KINDS, indirect=True)
def test_a_budget_of_everything_answers_like_stock(stock: Stock, relay: Relay, everything: dict[str, Any]) -> None:
    """In chunks too: `probe` then repairs in the last chunk what earlier ones have placed, as far back as the rows of a
    chunk reach. These run before `full`, whose KV is exact and would be found as a prefix."""
    assert relay.donors == stock.donors, "the donors themselves are exact requests"
    reach = CHUNK if relay.kind.cuts and everything["relay_policy"] == "probe" else None
    compare(stock, relay, FEWER, depth=1, reach=reach, **everything)


@pytest.mark.parametrize("relay", KINDS, indirect=True)
def test_full_policy_answers_like_stock(stock: Stock, relay: Relay) -> None:
    lost = compare(stock, relay, COUNT, depth=0, relay_policy="full")
    assert any(lost) == relay.kind.cuts, lost


def compare(
    stock: Stock, relay: Relay, count: int, *, depth: int, reach: int | None = None, **params: Any
) -> list[int]:
    """The first ``count`` prompts on both servers; returns what ``check_report`` does."""
    wanted, prompts = stock.answers[:count], stock.prompts[:count]
    answers = ask_all(relay.server, prompts, **params)
    lost = [check_report(a["meta_info"]["relay"], p, depth, reach) for a, p in zip(answers, prompts, strict=True)]
    differing = [i for i, (a, b) in enumerate(zip(answers, wanted, strict=True)) if a["output_ids"] != b["output_ids"]]
    assert not differing
    worst = max(
        abs(x - y)
        for a, b in zip(answers, wanted, strict=True)
        for x, y in zip(logprobs(a), logprobs(b), strict=True)
        if x is not None and y is not None
    )
    print(f"largest difference of an output log-probability: {worst:.2g}")
    assert worst <= relay.kind.bound
    stats = relay.server.get("/server_info")["internal_states"][0]["relay"]["stats"]
    assert (stats["fallbacks"], stats["failures"]) == (0, 0), stats
    return lost


def check_report(report: dict[str, Any], prompt: Prompt, depth: int, reach: int | None) -> int:
    """All that was matched is recomputed; returns how many matched tokens were fresh because a chunk ended there.
    reach: how far from the prompt's end text is reused, None for all of it."""
    recomputed = report["recomputed"]
    assert report["declined"] is None and report["depth"] == depth, report
    assert report["relayed"] == report["exact"] == 0 and recomputed + report["fresh"] == len(prompt.tokens), report
    begin = 0 if reach is None else len(prompt.tokens) - reach
    behind = [p.stop - max(p.start, begin) for p in prompt.pieces]
    lost = sum(n for n in behind if n >= SHORTEST) - recomputed
    assert recomputed > 0 and 0 <= lost <= len(prompt.tokens) // 20, (report, prompt)
    return lost


@pytest.mark.parametrize("relay", ["mixed-chunk"], indirect=True)
def test_requests_that_do_not_relay_are_served_to_the_bit(stock: Stock, relay: Relay) -> None:
    """First with relay on and nothing to reuse, then off: in this order neither finds the other's prefix."""
    for params, declined in (({"relay_donate": "none"}, "nothing_to_reuse"), ({"relay": "off"}, "relay_off")):
        answers = ask_plain(relay.server, stock.plain, **params)
        for number, (got, want) in enumerate(zip(answers, stock.plain_answers, strict=True)):
            report = got["meta_info"]["relay"]
            assert (report["declined"], report["fresh"]) == (declined, len(stock.plain[number])), report
            assert got["meta_info"]["cached_tokens"] == want["meta_info"]["cached_tokens"] == 0
            assert got["output_ids"] == want["output_ids"]
            assert logprobs(got) == logprobs(want)
            if number % 2 == 0:
                assert len(logprobs(got, "input")) == len(stock.plain[number])
                assert logprobs(got, "input") == logprobs(want, "input")
