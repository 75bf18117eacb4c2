"""Approximate KV never reaches a request that did not ask for it, and nothing crosses from one tenant to another.

Exactness is compared by bits: the same exact requests in the same order on a stock server must leave the same K and V
rows behind and give the same logprobs. Both servers run one request at a time, so that every matrix product has the
same shape.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plugins import Inspector
from tiny_model import make_tiny_llama

from sglang_relay.engine.namespaces import Namespaces, Tenant
from sglang_relay.measure.server import Server

POOL = 2400
"""KV slots: a prompt of nearly this length evicts everything else."""
FLAGS = ("--max-total-tokens", POOL, "--chunked-prefill-size", 256)
OFF, EXACT = {"relay": "off"}, {"relay": "exact"}


def tokens(n: int, seed: int) -> list[int]:
    return torch.randint(3, 1024, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


class Watched(NamedTuple):
    server: Server
    inspector: Inspector

    def ask(self, prompt: list[int], params: dict[str, Any] | None = None, new: int = 8, **fields: Any) -> Any:
        return self.server.generate(
            prompt,
            max_new_tokens=new,
            ignore_eos=True,
            custom_params=params,
            fields={"return_logprob": True, "top_logprobs_num": 5, **fields},
        )

    def rows(self, path: list[int], **where: Any) -> list[str]:
        return self.inspector.rows(self.server, path, **where)

    def flush(self) -> None:
        self.server.post("/flush_cache")

    def evict_everything(self, seed: int) -> None:
        self.ask(tokens(POOL - 100, seed), OFF, new=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("leaks"))


@pytest.fixture(scope="module")
def relay(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    inspector = Inspector(tmp_path_factory.mktemp("relay"))
    flags = ("--radix-cache-backend", "relay", "--enable-metrics", "--enable-streaming-session", "--log-level", "debug")
    with Server(model, *FLAGS, *flags, env=inspector.env) as server:
        yield Watched(server, inspector)


@pytest.fixture(scope="module")
def stock(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    inspector = Inspector(tmp_path_factory.mktemp("stock"))
    with Server(model, *FLAGS, env=inspector.env) as server:
        yield Watched(server, inspector)


def logprobs(answer: dict[str, Any]) -> Any:
    """Everything with digits: of the sampled tokens, and of the five likeliest at each place."""
    meta = answer["meta_info"]
    return [entry[:2] for entry in meta["output_token_logprobs"]], [
        [entry[:2] for entry in place] for place in meta["output_top_logprobs"]
    ]


def reused(answer: dict[str, Any]) -> int:
    report = answer["meta_info"]["relay"]
    return report["relayed"] + report["recomputed"]


def relayed_answer(relay: Watched, seed: int, policy: str, **fields: Any) -> tuple[list[int], dict[str, Any]]:
    """Prompt and answer of an agent that read another agent's output."""
    donor = relay.ask(tokens(50, seed), new=120, **fields)["output_ids"]
    prompt = [*tokens(30, seed + 1), *donor, *tokens(15, seed + 2)]
    answer = relay.ask(prompt, {"relay_policy": policy}, new=40, **fields)
    assert reused(answer) == len(donor) - 1, answer["meta_info"]["relay"]
    return prompt, answer


def same_bits(relay: Watched, stock: Watched, prompt: list[int], params: dict[str, Any] = OFF, **fields: Any) -> None:
    """One exact request on both servers: what it hits, what it answers and what it leaves behind."""
    ours, theirs = relay.ask(prompt, params, **fields), stock.ask(prompt, **fields)
    assert ours["meta_info"]["cached_tokens"] == theirs["meta_info"]["cached_tokens"]
    assert ours["output_ids"] == theirs["output_ids"]
    assert logprobs(ours) == logprobs(theirs)
    where = {"extra_key": fields.get("extra_key"), "salt": fields.get("cache_salt")}
    path = [*prompt, *ours["output_ids"]]
    rows = relay.rows(path, **where)
    assert len(rows) == len(path) - 1
    assert rows == stock.rows(path, **where)
    report = ours["meta_info"]["relay"]
    assert reused(ours) == 0 and report["depth"] == 0
    assert report["declined"] == {"off": "relay_off", "exact": "exact_requested"}[params["relay"]]


@pytest.mark.parametrize("params", [OFF, EXACT], ids=["off", "exact"])
@pytest.mark.parametrize("policy", ["rotate", "relay", "full"])
def test_exact_request_after_a_relayed_one(relay: Watched, stock: Watched, policy: str, params: dict[str, Any]) -> None:
    relay.flush()
    stock.flush()
    prompt, answer = relayed_answer(relay, 10, policy)
    path = [*prompt, *answer["output_ids"]]
    approximate = relay.rows(path, namespace={"tier": policy})
    assert len(approximate) == len(path) - 1, "the relayed request's KV is in its own namespace"
    assert relay.rows(path) == [], "the relayed request left something in the exact namespace"
    same_bits(relay, stock, prompt, params)
    same_bits(relay, stock, path, params)
    # And back: what is exact now stays where it is, what was relayed too.
    assert relay.rows(path, namespace={"tier": policy}) == approximate
    exact = relay.rows(path)[: len(approximate)]
    if policy != "full":
        changed = sum(a != e for a, e in zip(approximate, exact, strict=True))
        assert changed > len(prompt) // 2, "without a difference this test could not see a leak"


def test_exact_turn_after_relayed_turns(relay: Watched, stock: Watched) -> None:
    """An exact request hits the exact part of its history only: here nothing, then what it left itself."""
    relay.flush()
    stock.flush()
    prompt, answer = relayed_answer(relay, 20, "rotate")
    history = [*prompt, *answer["output_ids"], *tokens(9, 25)]
    relay.ask(history, {"relay_policy": "rotate"})
    same_bits(relay, stock, history)
    same_bits(relay, stock, [*history, *tokens(9, 26)], EXACT)


def test_relayed_request_over_an_exact_prefix_leaves_it_as_it_was(relay: Watched, stock: Watched) -> None:
    """The exact prefix is copied into the relay namespace, bit for bit; the original is not touched."""
    relay.flush()
    stock.flush()
    donor = relay.ask(tokens(50, 30), EXACT, new=120)["output_ids"]
    stock.ask(tokens(50, 30), new=120)
    role = tokens(90, 31)
    same_bits(relay, stock, role)
    before = relay.rows(role)
    prompt = [*role, *donor, *tokens(15, 32)]
    answer = relay.ask(prompt, {"relay_policy": "rotate"}, new=30)
    report = answer["meta_info"]["relay"]
    assert reused(answer) == len(donor) - 1 and report["exact"] == len(role) and report["depth"] == 1
    assert relay.rows(role) == before
    assert relay.rows(role, namespace={"tier": "rotate"}) == before
    same_bits(relay, stock, [*prompt, *answer["output_ids"]])


def test_samples_of_one_relayed_prompt(relay: Watched, stock: Watched) -> None:
    relay.flush()
    stock.flush()
    donor = relay.ask(tokens(50, 40), new=120)["output_ids"]
    prompt = [*tokens(30, 41), *donor, *tokens(15, 42)]
    answers = relay.server.generate(
        prompt, n=3, temperature=1.0, max_new_tokens=20, ignore_eos=True, custom_params={"relay_policy": "rotate"}
    )
    assert all(a["meta_info"]["relay"]["depth"] == 1 for a in answers)
    for answer in answers:
        assert relay.rows([*prompt, *answer["output_ids"]]) == []
    # Exact samples: SGLang prefills the prompt once for all of them.
    exact = [
        w.server.generate(prompt, n=3, max_new_tokens=20, ignore_eos=True, custom_params=OFF) for w in (relay, stock)
    ]
    assert [a["output_ids"] for a in exact[0]] == [a["output_ids"] for a in exact[1]]
    assert [a["meta_info"]["cached_tokens"] for a in exact[0]] == [a["meta_info"]["cached_tokens"] for a in exact[1]]
    rows = relay.rows(prompt)
    assert len(rows) == len(prompt) and rows == stock.rows(prompt)


def test_exact_turn_in_a_session_of_relayed_turns(relay: Watched, stock: Watched) -> None:
    relay.flush()
    stock.flush()
    donor = relay.ask(tokens(50, 50), new=120)["output_ids"]
    session = relay.server.post("/open_session", {"capacity_of_str_len": 10000})
    prompt = [*tokens(30, 51), *donor, *tokens(15, 52)]
    first = relay.ask(prompt, {"relay_policy": "rotate"}, new=30, session_params={"id": session})
    assert reused(first) == len(donor) - 1
    question = tokens(12, 53)
    turn: dict[str, Any] = {"session_params": {"id": session, "rid": first["meta_info"]["id"]}}
    ours = relay.ask(question, OFF, **turn)
    history = [*prompt, *first["output_ids"], *question]
    theirs = stock.ask(history)
    assert ours["meta_info"]["prompt_tokens"] == len(history)
    assert ours["meta_info"]["cached_tokens"] == 0
    assert logprobs(ours) == logprobs(theirs)
    path = [*history, *ours["output_ids"]]
    assert len(relay.rows(path)) == len(path) - 1
    assert relay.rows(path) == stock.rows(path)
    # A relayed turn of the same session hits the relayed turn's prefix.
    again = relay.ask(question, {"relay_policy": "rotate"}, **turn)
    assert again["meta_info"]["cached_tokens"] == len(prompt) + 30 - 1
    relay.server.post("/close_session", {"session_id": session})


def test_streaming_sessions_are_served_exactly(relay: Watched, stock: Watched) -> None:
    """They lend their KV to the next turn without the tree, so relayed KV would stay in use."""
    relay.flush()
    stock.flush()
    donor = relay.ask(tokens(50, 60), new=120)["output_ids"]
    prompt = [*tokens(30, 61), *donor, *tokens(15, 62)]
    session = relay.server.post("/open_session", {"capacity_of_str_len": 10000, "streaming": True})
    for prompt_of_turn in (prompt, tokens(20, 63)):
        answer = relay.ask(prompt_of_turn, {"relay_policy": "rotate"}, session_params={"id": session})
        assert answer["meta_info"]["relay"]["declined"] == "streaming_session"
        assert reused(answer) == 0
        if prompt_of_turn is prompt:
            assert logprobs(answer) == logprobs(stock.ask(prompt))
    relay.server.post("/close_session", {"session_id": session})


@pytest.mark.parametrize("params", [OFF, {"relay_policy": "rotate"}], ids=["off", "on"])
def test_guessed_extra_keys_reach_nothing(relay: Watched, params: dict[str, Any]) -> None:
    relay.flush()
    prompt, answer = relayed_answer(relay, 70, "rotate")
    path = [*prompt, *answer["output_ids"]]
    epoch = relay.server.get("/server_info")["internal_states"][0]["relay"]["weight_epoch"]
    guesses = [f"{s}/{epoch}/rotate//" for s in ("0" * 32, "f" * 32, "None", "", "*", "0123456789abcdef" * 2)]
    guesses += ["rotate", "/", "//", f"{epoch}/rotate", "relay", "None", "x" * 500]
    for guess in guesses:
        for salt in (None, "rotate"):
            found = relay.ask(path, params, extra_key=guess, cache_salt=salt, new=1)
            assert found["meta_info"]["cached_tokens"] == 0, guess
            assert reused(found) == 0, guess
            # What the guess was after is still there (and, used again, not the next to be evicted).
            there = relay.ask(prompt, {"relay_policy": "rotate"}, new=1)
            assert there["meta_info"]["cached_tokens"] == len(prompt) - 1


def test_the_right_key_would_reach_it(relay: Watched) -> None:
    """Otherwise the guesses above would prove nothing."""
    relay.flush()
    prompt, _ = relayed_answer(relay, 75, "rotate")
    secret = relay.inspector.ask(relay.server, "secret")
    epoch = relay.server.get("/server_info")["internal_states"][0]["relay"]["weight_epoch"]
    found = relay.ask(prompt, OFF, extra_key=f"{secret}/{epoch}/rotate//", new=1)
    assert found["meta_info"]["cached_tokens"] == len(prompt) - 1


def test_after_eviction_and_reinsertion(relay: Watched, stock: Watched) -> None:
    relay.flush()
    stock.flush()
    prompt, answer = relayed_answer(relay, 80, "rotate")
    path = [*prompt, *answer["output_ids"]]
    for w in (relay, stock):
        w.evict_everything(81)
    assert relay.rows(path, namespace={"tier": "rotate"}) == []
    # The slots that held approximate KV hold exact KV now.
    same_bits(relay, stock, path)
    # The donor's text is found in the index but not in the tree: nothing is relayed from it.
    gone = relay.ask([*tokens(30, 82), *path[40:150], *tokens(9, 83)], {"relay_policy": "rotate"})
    assert gone["meta_info"]["relay"]["declined"] == "nothing_to_reuse"
    for w in (relay, stock):
        w.evict_everything(84)
    # Inserted again, relayed again, and exact again.
    prompt, answer = relayed_answer(relay, 85, "rotate")
    same_bits(relay, stock, [*prompt, *answer["output_ids"]])


def test_text_whose_donor_was_evicted_is_offered_again(relay: Watched) -> None:
    relay.flush()
    text, everything = tokens(120, 86), {"relay": "exact", "relay_donate": "all"}
    relay.ask([*tokens(30, 87), *text], everything)
    relay.evict_everything(88)
    relay.ask(text, OFF)  # in the cache again, of nobody who donates
    relay.ask(text, everything)
    assert reused(relay.ask([*tokens(40, 89), *text, *tokens(9, 83)], {"relay_policy": "rotate"})) == len(text)


def test_the_secret_is_shown_nowhere(relay: Watched) -> None:
    answer = relayed_answer(relay, 90, "rotate")[1]
    secret = relay.inspector.ask(relay.server, "secret")
    assert len(secret) == 32 and set(secret) <= set(string.hexdigits)
    pages = [str(relay.server.get(page)) for page in ("/server_info", "/metrics", "/model_info", "/v1/loads")]
    for shown in (*pages, str(answer), relay.server.log()):
        assert secret not in shown
    assert "relay" in pages[0] and "sglang_relay:" in pages[1]
    environment = Path(f"/proc/{relay.server.pid}/environ")
    if environment.exists():
        assert secret.encode() not in environment.read_bytes()


# ---------------------------------------------------------------------- tenants


@pytest.mark.parametrize(
    ("donor", "reader", "shared"),
    [
        ({}, {}, True),
        ({"extra_key": "a"}, {"extra_key": "a"}, True),
        ({"extra_key": "a"}, {"extra_key": "b"}, False),
        ({"extra_key": "a"}, {}, False),
        ({}, {"extra_key": "a"}, False),
        ({"cache_salt": "a"}, {"cache_salt": "a"}, True),
        ({"cache_salt": "a"}, {"cache_salt": "b"}, False),
        ({"cache_salt": "a"}, {}, False),
        ({}, {"cache_salt": "a"}, False),
        ({"cache_salt": "a"}, {"extra_key": "a"}, False),
        ({"relay_scope": "a"}, {"relay_scope": "a"}, True),
        ({"relay_scope": "a"}, {"relay_scope": "b"}, False),
        ({"relay_scope": "a"}, {}, False),
        ({}, {"relay_scope": "a"}, False),
        ({"relay_scope": "a", "cache_salt": "s"}, {"relay_scope": "a", "cache_salt": "t"}, False),
        ({"relay_scope": "a", "cache_salt": "s"}, {"relay_scope": "a", "cache_salt": "s"}, True),
    ],
    ids=str,
)
def test_donors_stay_with_their_tenant(
    relay: Watched, donor: dict[str, str], reader: dict[str, str], shared: bool
) -> None:
    relay.flush()
    output = as_tenant(relay, tokens(50, 100), donor, new=120)["output_ids"]
    prompt = [*tokens(30, 101), *output, *tokens(15, 102)]
    assert reused(as_tenant(relay, prompt, reader)) == (len(output) - 1 if shared else 0)


def test_prefixes_stay_with_their_tenant(relay: Watched) -> None:
    """A relayed request's KV is found by its own tenant only, although all of them live under one secret."""
    relay.flush()
    tenants = [
        {},
        {"extra_key": "a"},
        {"cache_salt": "a"},
        {"relay_scope": "a"},
        {"relay_scope": "a", "extra_key": "a"},
    ]
    prompt = tokens(100, 110)
    for tenant in tenants:
        assert as_tenant(relay, prompt, tenant)["meta_info"]["cached_tokens"] == 0
    for tenant in tenants:
        assert as_tenant(relay, prompt, tenant)["meta_info"]["cached_tokens"] == len(prompt) - 1


@pytest.mark.parametrize(
    ("custom", "declined"),
    [
        ({"relay": "exact"}, "exact_requested"),
        ({"relay": "off"}, "relay_off"),
        ({"relay": "perhaps"}, "bad_custom_params"),
        ({"relay_typo": 1}, "bad_custom_params"),
    ],
    ids=str,
)
@pytest.mark.parametrize("scopes", [("a", "b"), ("a", None), (None, "a"), (5, "5"), ("", None)], ids=str)
def test_exact_prefixes_stay_in_their_scope(
    relay: Watched, custom: dict[str, Any], declined: str, scopes: tuple[Any, Any]
) -> None:
    """A request that names a scope is confined to it, however it is served, and even by a name that is not allowed."""
    relay.flush()
    prompt = tokens(100, 115)

    def hits(scope: Any) -> int:
        answer = relay.ask(prompt, {**custom, **({} if scope is None else {"relay_scope": scope})}, new=1)
        assert answer["meta_info"]["relay"]["declined"] in (declined, "bad_custom_params")
        return answer["meta_info"]["cached_tokens"]

    assert [hits(scope) for scope in scopes] == [0, 0]
    assert [hits(scope) for scope in scopes] == [len(prompt) - 1] * 2


def test_a_scope_confines_on_a_server_that_cannot_relay(model: Path) -> None:
    with Server(model, *FLAGS, "--radix-cache-backend", "relay", "--enable-session-radix-cache") as server:
        asked = Watched(server, None)  # type: ignore[arg-type]
        prompt = tokens(100, 116)
        hits = [asked.ask(prompt, {"relay_scope": s}, new=1)["meta_info"]["cached_tokens"] for s in ("a", "b", "a")]
        assert asked.ask(prompt, {}, new=1)["meta_info"]["relay"]["declined"].startswith("unsupported:")
    assert hits == [0, 0, len(prompt) - 1]


def as_tenant(relay: Watched, prompt: list[int], tenant: dict[str, str], new: int = 1) -> Any:
    fields = {k: v for k, v in tenant.items() if k != "relay_scope"}
    scope = {"relay_scope": tenant["relay_scope"]} if "relay_scope" in tenant else {}
    return relay.ask(prompt, {"relay_policy": "rotate", **scope}, new=new, **fields)


text = st.text(alphabet="a/:1", max_size=4)
tenant = st.tuples(st.one_of(st.none(), text.filter(bool)), st.one_of(st.none(), text.filter(bool)))


@given(st.lists(st.tuples(tenant, st.sampled_from(["rotate", "relay@0.2", "full"])), min_size=2, max_size=6))
def test_namespaces_of_different_tenants_or_tiers_differ(asked: list[tuple[tuple[Any, Any], str]]) -> None:
    """For any client-chosen key and scope. (Salts are no part of it: they are a part of SGLang's own tree key.)"""
    namespaces = Namespaces("5ec4e7")
    keys = {(key, scope, tier): namespaces.key(Tenant(key, None, scope), tier) for (key, scope), tier in asked}
    exact = {(key, scope): namespaces.exact_key(Tenant(key, None, scope)) for (key, scope), _ in asked}
    assert len({*keys.values(), *exact.values()}) == len(keys) + len(exact)
    old = set(keys.values())
    namespaces.epoch += 1
    assert not old & {namespaces.key(Tenant(key, None, scope), tier) for key, scope, tier in keys}


def test_isolated_backend_serves_only_the_salted(model: Path) -> None:
    with Server(model, *FLAGS, "--radix-cache-backend", "relay-isolated", "--relay-report", "full") as server:
        isolated = Watched(server, None)  # type: ignore[arg-type]
        assert server.get("/server_info")["internal_states"][0]["relay"]["isolated"] is True
        assert "isolated" in server.log()
        for tenant, allowed in (
            ({}, False),
            ({"extra_key": "a"}, False),
            ({"cache_salt": "a"}, True),
            ({"relay_scope": "a"}, True),
        ):
            donor = as_tenant(isolated, tokens(50, 120), tenant, new=120)
            prompt = [*tokens(30, 121), *donor["output_ids"], *tokens(15, 122)]
            answer = as_tenant(isolated, prompt, tenant)
            assert reused(answer) == (119 if allowed else 0), tenant
            assert answer["meta_info"]["relay"]["declined"] == (None if allowed else "no_cache_salt")
        # The two that were served with a salt or scope; what the others computed is not even kept.
        assert server.get("/server_info")["internal_states"][0]["relay"]["index"]["donors"] == 2
