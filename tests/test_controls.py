"""What a user can ask for and what the answer says about it: /generate and the OpenAI API, streaming and not."""

from __future__ import annotations

import itertools
import json
import math
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
import requests
import torch
from plugins import Inspector
from sglang.srt.entrypoints.openai.protocol import CompletionResponse, UsageInfo
from tiny_model import make_tiny_llama, random_text

from sglang_relay.config import POLICIES
from sglang_relay.engine import doctor, front_end
from sglang_relay.identity import identify
from sglang_relay.measure.server import Server
from sglang_relay.profile.file import make_profile

CHUNK = 256
SEEDS = itertools.count(1000)
"""Every prompt has a head of its own, so that no test finds another's prefix."""
COUNTS = {"exact", "approximate", "relayed", "recomputed", "fresh", "segments", "quoted"}
KEYS = {*COUNTS, "policy", "depth", "declined", "why", "match_ms", "cost"}


def tokens(n: int, seed: int) -> list[int]:
    return torch.randint(3, 1024, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def inspector(tmp_path_factory: pytest.TempPathFactory) -> Inspector:
    return Inspector(tmp_path_factory.mktemp("inspector"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, inspector: Inspector) -> Iterator[Server]:
    model = make_tiny_llama(tmp_path_factory.mktemp("controls"))
    profile = make_profile(identify(model, dtype="float32"), [np.zeros((3, 6), np.float32)], data="a test", made="")
    file = tmp_path_factory.mktemp("profile") / "profile.json"
    msgspec.structs.replace(profile, start=0, detect=3, end=5).save(file)
    flags = ("--radix-cache-backend", "relay", "--chunked-prefill-size", CHUNK, "--enable-metrics")
    flags += ("--dtype", "float32", "--relay-profile", file)
    with Server(model, *flags, "--constrained-json-disable-any-whitespace", env=inspector.env) as started:
        yield started


@pytest.fixture(scope="module")
def donor(server: Server) -> list[int]:
    """Another agent's output of 120 tokens."""
    return ask(server, tokens(50, 1))["output_ids"]


@pytest.fixture(scope="module")
def second(server: Server) -> list[int]:
    return ask(server, tokens(40, 2), 150)["output_ids"]


@pytest.fixture(scope="module")
def document(server: Server) -> str:
    """A text that a chat donated."""
    text = random_text(120, 50)
    body = {"model": "tiny", "max_tokens": 1, "custom_params": {"relay": "exact", "relay_donate": "all"}}
    server.post("/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]})
    return text


def fresh(n: int) -> list[int]:
    """Its first token is no other prompt's, so not even that is found in the tree."""
    seed = next(SEEDS)
    return [3 + seed % 1021, *tokens(n - 1, seed)]


def ask(server: Server, prompt: list[int], new: int = 120, params: dict[str, Any] | None = None, **fields: Any) -> Any:
    return server.generate(prompt, max_new_tokens=new, ignore_eos=True, custom_params=params, fields=fields)


def prompt_with(donor: list[int], head: int = 30, tail: int = 15) -> list[int]:
    return [*fresh(head), *donor, *tokens(tail, 3)]


def reused(report: dict[str, Any]) -> int:
    return report["relayed"] + report["recomputed"]


def check(report: dict[str, Any], prompt: int, cached: int | None = None) -> dict[str, Any]:
    """Every report, whatever happened."""
    assert report.keys() == KEYS | ({"influence", "entry"} if report["policy"] == "relay" else set())
    counts = [report[kind] for kind in ("exact", "approximate", "relayed", "recomputed", "fresh")]
    assert min(counts) >= 0 and sum(counts) == prompt, report
    # What an answer quotes of a cached prefix is recomputed without a segment.
    assert (report["segments"] > 0) == (reused(report) > report["quoted"])
    if cached is not None:
        assert report["exact"] + report["approximate"] + report["quoted"] >= cached
    assert (report["why"] is not None) == (report["declined"] == "bad_custom_params")
    if reused(report) or report["approximate"]:
        assert report["declined"] is None and report["policy"] in POLICIES
    return report


def report_of(answer: dict[str, Any]) -> dict[str, Any]:
    meta = answer["meta_info"]
    return check(meta["relay"], meta["prompt_tokens"], meta["cached_tokens"])


def events(server: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The chunks of a streamed answer."""
    with requests.post(server.url + path, json={**body, "stream": True}, stream=True, timeout=300) as response:
        response.raise_for_status()
        lines = [line[len(b"data: ") :] for line in response.iter_lines() if line.startswith(b"data: ")]
    assert lines[-1] == b"[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def stats(server: Server) -> dict[str, Any]:
    return state(server)["stats"]


def state(server: Server) -> dict[str, Any]:
    (internal,) = server.get("/server_info")["internal_states"]
    return internal["relay"]


# ---------------------------------------------------------------------- /generate


@pytest.mark.parametrize("policy", ["rotate", "relay", "full"])
def test_policy(server: Server, donor: list[int], policy: str) -> None:
    report = report_of(ask(server, prompt_with(donor), 8, {"relay_policy": policy}))
    assert (report["policy"], reused(report), report["segments"]) == (policy, len(donor) - 1, 1)
    if policy == "relay":
        # At least the suffix; most tokens deviate less than 1.5 means.
        assert 10 <= report["recomputed"] < report["relayed"]
    else:
        assert report["recomputed"] == (reused(report) if policy == "full" else 0)
    assert report["depth"] == (policy != "full")
    assert report["match_ms"] > 0


def test_the_servers_default_serves_who_asks_for_nothing(server: Server, donor: list[int]) -> None:
    report = report_of(ask(server, prompt_with(donor), 8))
    assert report["policy"] == "probe" and reused(report) == len(donor) - 1


@pytest.mark.parametrize("params", [{"relay": "on"}, {}, {"other": 3}, {"relay": None, "relay_policy": None}], ids=str)
def test_on(server: Server, donor: list[int], params: dict[str, Any]) -> None:
    assert reused(report_of(ask(server, prompt_with(donor), 8, params))) == len(donor) - 1


@pytest.mark.parametrize(("mode", "reason"), [("off", "relay_off"), ("exact", "exact_requested")])
def test_off_and_exact_are_prefilled(server: Server, donor: list[int], mode: str, reason: str) -> None:
    report = report_of(ask(server, prompt_with(donor), 8, {"relay": mode}))
    assert report["declined"] == reason and report["policy"] is None
    assert report["fresh"] == len(donor) + 45


@pytest.mark.parametrize(
    ("params", "output", "prompt"),
    [
        ({"relay": "on"}, True, False),
        ({"relay": "exact"}, True, False),
        ({"relay": "off"}, False, False),
        ({"relay_donate": "output"}, True, False),
        ({"relay_donate": "none"}, False, False),
        ({"relay_donate": "all"}, True, True),
        ({"relay": "exact", "relay_donate": "all"}, True, True),
        ({"relay": "off", "relay_donate": "all"}, False, False),
    ],
    ids=str,
)
def test_donate(server: Server, params: dict[str, Any], output: bool, prompt: bool) -> None:
    document = fresh(100)
    answer = ask(server, document, 100, params)["output_ids"]
    for text, donated in ((answer, output), (document, prompt)):
        report = report_of(ask(server, prompt_with(text), 1, {"relay_donate": "none"}))
        assert (reused(report) > 90) == donated and (reused(report) == 0) != donated


def test_donating_all_does_not_donate_what_was_copied(server: Server, donor: list[int]) -> None:
    """Relayed text is its donor's to offer; donated again it would only grow deeper."""
    before = state(server)["index"]["donors"]
    params = {"relay_policy": "rotate", "relay_donate": "all"}
    report = report_of(ask(server, prompt_with(donor, head=60, tail=60), 60, params))
    assert reused(report) == len(donor) - 1
    # The head, the tail with the donor's last token, and the output.
    assert state(server)["index"]["donors"] - before == 3


@pytest.mark.parametrize(
    ("before", "wish"),
    [
        ({"relay": "off"}, {"relay": "exact"}),
        ({"relay": "off"}, {"relay": "on"}),
        ({"relay_donate": "none"}, {"relay": "on"}),
        ({"relay_donate": "none", "relay_policy": "rotate"}, {"relay": "on"}),
    ],
    ids=str,
)
def test_donating_all_donates_what_the_cache_had(server: Server, before: dict[str, Any], wish: dict[str, Any]) -> None:
    """A prefix hit, or an exact copy from another namespace: nobody has offered it, though it was computed before."""
    prompt = fresh(40)
    text = ask(server, prompt, 200, before)["output_ids"][:-1]
    assert report_of(ask(server, prompt_with(text), 1, {"relay_donate": "none"}))["declined"] == "nothing_to_reuse"
    known = report_of(ask(server, [*prompt, *text, 198], 1, {**wish, "relay_donate": "all"}))
    # Where a chunk ends in a copy, its last token is computed.
    assert reused(known) == 0 and known["fresh"] <= 1 + (len(prompt) + len(text)) // CHUNK
    assert reused(report_of(ask(server, prompt_with(text), 1, {"relay_donate": "none"}))) == len(text)


def test_donating_all_offers_nothing_twice(server: Server) -> None:
    """Every turn of a conversation donates what it adds: its own words and the answer."""
    history, before = fresh(100), []
    for _ in range(3):
        before.append(state(server)["index"])
        history = [*history, *ask(server, history, 50, {"relay_donate": "all"})["output_ids"], *fresh(60)]
    turns = list(itertools.pairwise([*before, state(server)["index"]]))
    assert [after["learnt"] - index["learnt"] for index, after in turns] == [2, 2, 2]
    # The first turn brings 100 + 50 tokens, the others 60 + 50, and none of what they repeat.
    first, second, third = (after["windows"] - index["windows"] for index, after in turns)
    assert 0 < second < first and 0 < third < first
    # Together that is all: 100 + 50, 60 + 50, 60 + 50 tokens, but for the last one, which has no KV.
    report = report_of(ask(server, prompt_with(history[:370]), 1, {"relay_donate": "none"}))
    assert 369 - report["segments"] <= reused(report) <= 369


def test_a_transcript_is_donated_as_if_it_had_been_decoded(server: Server) -> None:
    text = fresh(200)
    ask(server, text, 1, {"relay": "exact", "relay_donate": "none", "relay_generated_from": 80})
    assert reused(report_of(ask(server, prompt_with(text), 1, {"relay_donate": "none"}))) == 0
    # By now the cache has it; it is offered all the same.
    ask(server, text, 1, {"relay": "exact", "relay_generated_from": 80})
    report = report_of(ask(server, prompt_with(text), 1, {"relay_donate": "none"}))
    assert 120 - report["segments"] < reused(report) <= 120  # a chunk's last token is computed


def test_budget(server: Server, donor: list[int]) -> None:
    counts = {}
    prompt = prompt_with(donor)
    for budget in (None, 0.1, 0.02):
        params = {"relay_policy": "relay", **({} if budget is None else {"relay_budget": budget})}
        report = report_of(ask(server, prompt, 1, params))
        assert reused(report) == len(donor) - 1
        counts[budget] = report["recomputed"]
    assert counts[0.1] == int(0.1 * 119) < counts[None]
    assert counts[0.02] == int(0.02 * 119)
    # A budget of one is no cap, but a tier of its own.
    report = report_of(ask(server, prompt, 1, {"relay_policy": "relay", "relay_budget": 1}))
    assert report["recomputed"] == counts[None] and report["exact"] == 0


BAD = [
    ({"relay": "maybe"}, "relay='maybe'"),
    ({"relay": True}, "relay=True"),
    ({"relay": ["on"]}, "relay="),
    ({"relay_policy": "best"}, "relay_policy='best'"),
    ({"relay_policy": {"a": 1}}, "relay_policy="),
    ({"relay_budget": 0}, "relay_budget=0"),
    ({"relay_budget": 1.5}, "relay_budget=1.5"),
    ({"relay_budget": -0.1}, "relay_budget=-0.1"),
    ({"relay_budget": "much"}, "relay_budget='much'"),
    ({"relay_policy": "rotate", "relay_budget": 0.2}, "rotate takes no budget"),
    ({"relay_policy": "relay", "relay_budget": "coverage:0.5"}, "relay takes share or tokens"),
    ({"relay_budget": True}, "relay_budget=True"),
    ({"relay_donate": "some"}, "relay_donate='some'"),
    ({"relay_generated_from": -1}, "relay_generated_from=-1"),
    ({"relay_generated_from": True}, "relay_generated_from=True"),
    ({"relay_generated_from": "5"}, "relay_generated_from="),
    ({"relay_quote_tokens": -1}, "relay_quote_tokens=-1"),
    ({"relay_quote_tokens": 2.5}, "relay_quote_tokens=2.5"),
    ({"relay_primes": "yes"}, "relay_primes='yes'"),
    ({"relay_scope": ""}, "relay_scope"),
    ({"relay_scope": 7}, "relay_scope"),
    ({"relay_scope": "x" * 257}, "relay_scope"),
    ({"relay_budjet": 0.2}, "relay_budjet"),
]


@pytest.mark.parametrize(("params", "said"), BAD, ids=str)
def test_wrong_values_are_declined_by_name_and_served_exactly(
    server: Server, donor: list[int], params: dict[str, Any], said: str
) -> None:
    prompt = prompt_with(donor)
    answer = ask(server, prompt, 8, params, return_logprob=True)
    report = report_of(answer)
    assert report["declined"] == "bad_custom_params" and report["fresh"] == len(prompt)
    assert said in report["why"]
    # Another salt, so that it computes the prompt as well.
    exact = ask(server, prompt, 8, {"relay": "off"}, return_logprob=True, cache_salt="another")
    assert exact["meta_info"]["cached_tokens"] == 0
    assert answer["output_ids"] == exact["output_ids"]
    assert answer["meta_info"]["output_token_logprobs"] == exact["meta_info"]["output_token_logprobs"]


def test_every_wrong_value_is_explained_in_the_log(server: Server) -> None:
    for key in ("relay_policy", "relay_donate"):
        for _ in range(2):
            ask(server, tokens(5, 30), 1, {key: "no-such\nvalue"})
    explained = [line for line in server.log().splitlines() if "bad_custom_params" in line]
    for key in ("relay_policy", "relay_donate"):
        (line,) = [line for line in explained if f"{key}='no-such\\nvalue'" in line]
        assert "allowed are" in line


@pytest.mark.parametrize("params", ["relay", ["relay"], [], "", 5, 0, False], ids=repr)
def test_custom_params_that_are_no_object_are_declined_by_name(server: Server, donor: list[int], params: Any) -> None:
    failures, prompt = stats(server)["failures"], prompt_with(donor)
    report = report_of(ask(server, prompt, 1, params))
    assert report["declined"] == "bad_custom_params" and report["fresh"] == len(prompt)
    assert report["why"] == f"custom_params={params!r}: allowed is an object"
    assert stats(server)["failures"] == failures


def test_health_checks_are_not_counted(server: Server) -> None:
    before, _ = stats(server), server.get("/health_generate")
    after = stats(server)
    assert (after["declined"], after["tokens"]) == (before["declined"], before["tokens"])


def test_streamed_generate_reports_with_every_chunk(server: Server, donor: list[int]) -> None:
    prompt = prompt_with(donor)
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True, "custom_params": {"relay_policy": "rotate"}}
    chunks = events(server, "/generate", {"input_ids": prompt, "sampling_params": sampling})
    assert len(chunks) > 3
    reports = [report_of(chunk) for chunk in chunks]
    assert reused(reports[0]) == len(donor) - 1
    assert all(report == reports[0] for report in reports)


@pytest.mark.parametrize("policy", ["rotate", "relay", "full"])
@pytest.mark.parametrize("prefix", [0, 100])
@pytest.mark.parametrize("tail", [1, 15, 3 * CHUNK])
def test_counts_add_up_over_chunks_and_prefix_hits(
    server: Server, donor: list[int], second: list[int], policy: str, prefix: int, tail: int
) -> None:
    params = {"relay_policy": policy}
    prompt = [*fresh(prefix + 2), *donor, *tokens(70, 42), *second, *tokens(tail, 43)]
    if prefix:
        ask(server, prompt[:prefix], 1, params)
    answer = ask(server, prompt, 4, params)
    report = report_of(answer)
    assert answer["meta_info"]["cached_tokens"] == prefix == report["exact"]
    assert report["segments"] >= 2
    # Every chunk's last row is fresh, whatever donor holds it; so is each donor's last token.
    whole = len(donor) + len(second) - 2
    assert whole - len(prompt) // CHUNK - 1 <= reused(report) <= whole
    again = report_of(ask(server, prompt, 4, params))
    # What a relayed request left is a prefix hit, and approximate from its first reused token on.
    assert again["exact"] + again["approximate"] == len(prompt) - 1 and again["fresh"] == 1 and again["segments"] == 0


def test_short_reuse_is_not_worth_it(server: Server, donor: list[int]) -> None:
    report = report_of(ask(server, prompt_with(donor[:50]), 1))
    assert report["declined"] == "below_min_relayed" and report["fresh"] == 95


def test_declines_for_want_of_a_donor_are_counted(server: Server) -> None:
    before = stats(server)["declined"].get("nothing_to_reuse", 0)
    assert report_of(ask(server, fresh(90), 1))["declined"] == "nothing_to_reuse"
    assert stats(server)["declined"]["nothing_to_reuse"] == before + 1


# ---------------------------------------------------------------------- requests that generate nothing


def score(server: Server, query: list[int], items: list[list[int]]) -> list[list[float]]:
    body = {"model": "tiny", "query": query, "items": items, "label_token_ids": [7, 8, 9]}
    return server.post("/v1/score", body)["scores"]


def test_scores_are_those_of_full_prefill(server: Server, donor: list[int]) -> None:
    query, items = prompt_with(donor), [tokens(9, seed) for seed in (61, 62)]
    before = stats(server)
    scores = score(server, query, items)
    after = stats(server)
    assert after["declined"].get("scoring", 0) == before["declined"].get("scoring", 0) + 2
    assert after["tokens"].get("reused", 0) == before["tokens"].get("reused", 0)
    for item, got in zip(items, scores, strict=True):
        exact = ask(
            server,
            [*query, *item],
            0,
            {"relay": "off"},
            return_logprob=True,
            token_ids_logprob=[7, 8, 9],
            cache_salt="another",
        )
        want = [math.exp(value) for value, *_ in exact["meta_info"]["output_token_ids_logprobs"][0]]
        assert got == pytest.approx(want, rel=1e-4)


def test_what_generates_nothing_is_exact_and_donates(server: Server) -> None:
    """The way to offer a document before anybody asks for it."""
    document = fresh(110)
    report = report_of(ask(server, document, 0, {"relay_donate": "all"}))
    assert report["declined"] == "prefill_only" and report["fresh"] == len(document)
    assert reused(report_of(ask(server, prompt_with(document), 1))) == len(document)
    # It is in the exact namespace, where requests that refuse relay find it.
    assert ask(server, [*document, 5], 1, {"relay": "off"})["meta_info"]["cached_tokens"] == len(document)


def test_what_generates_nothing_is_never_relayed(server: Server, donor: list[int]) -> None:
    prompt = prompt_with(donor)
    report = report_of(ask(server, prompt, 0, return_logprob=True))
    assert report["declined"] == "prefill_only" and report["fresh"] == len(prompt)


SAMPLED = ({"relay_policy": "rotate"}, {"relay_policy": "probe", "relay_quote_tokens": 5})


@pytest.mark.parametrize("params", SAMPLED, ids=lambda params: params["relay_policy"])
@pytest.mark.parametrize("fields", [{}, {"return_logprob": True}, {"return_logprob": True, "token_ids_logprob": [7]}])
def test_samples_of_one_prompt_share_what_was_relayed(
    server: Server, donor: list[int], fields: dict[str, Any], params: dict[str, Any]
) -> None:
    """SGLang computes the prompt by a request that generates nothing, whose KV the samples then find."""
    prompt, before = prompt_with(donor), stats(server)
    sampling = {"temperature": 1, "max_new_tokens": 4, "n": 2, "custom_params": params}
    answers = server.post("/generate", {"input_ids": prompt, "sampling_params": sampling, **fields})
    for answer in answers:
        assert_found(report_of(answer), prompt)
    after = stats(server)
    assert after["batches"] > before["batches"]
    assert all(after[what] == before[what] for what in ("failures", "fallbacks"))


def test_a_client_may_prime_its_next_request(server: Server, donor: list[int]) -> None:
    prompt = prompt_with(donor)
    primed = report_of(ask(server, prompt, 0, {"relay_policy": "rotate", "relay_primes": True}))
    assert primed["declined"] is None and reused(primed) == len(donor) - 1
    assert_found(report_of(ask(server, prompt, 4, {"relay_policy": "rotate"})), prompt)


def assert_found(report: dict[str, Any], prompt: list[int]) -> None:
    """All but the prompt's last token was there, the relayed text and what follows it as what they are."""
    found = report["exact"] + report["approximate"] + report["quoted"]
    assert found == len(prompt) - 1 and report["depth"] == 1, report
    assert report["exact"] > 0 and report["approximate"] > 0 and report["declined"] is None, report


# ---------------------------------------------------------------------- OpenAI API


def completion(donor: list[int], params: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Path and body of a request over ``donor``."""
    body = {"model": "tiny", "temperature": 0, "max_tokens": 8, "custom_params": params}
    return "/v1/completions", {**body, "prompt": prompt_with(donor)}


def chat(document: str, params: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    body = {"model": "tiny", "temperature": 0, "max_tokens": 8, "custom_params": params}
    role = {"role": "system", "content": random_text(12, next(SEEDS))}
    return "/v1/chat/completions", {**body, "messages": [role, {"role": "user", "content": document}]}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("kind", ["chat", "completions"])
@pytest.mark.parametrize(
    ("params", "declined"),
    [
        ({"relay_policy": "rotate"}, None),
        ({"relay_policy": "relay", "relay_budget": 0.1}, None),
        ({"relay": "off"}, "relay_off"),
        ({"relay": "perhaps"}, "bad_custom_params"),
    ],
    ids=str,
)
def test_openai(
    server: Server,
    donor: list[int],
    document: str,
    kind: str,
    params: dict[str, Any],
    declined: str | None,
    stream: bool,
) -> None:
    path, body = chat(document, params) if kind == "chat" else completion(donor, params)
    if stream:
        chunks = events(server, path, {**body, "stream_options": {"include_usage": True}})
        carrying = [c for c in chunks if "relay" in (c.get("sglext") or {})]
        assert carrying == chunks[:1], "the first chunk carries the report, and no other"
        report, usage = carrying[0]["sglext"]["relay"], chunks[-1]["usage"]
    else:
        answer = server.post(path, body)
        report, usage = answer["sglext"]["relay"], answer["usage"]
    check(report, usage["prompt_tokens"])
    assert report["declined"] == declined
    assert (reused(report) >= 100) == (declined is None)
    if declined is None:
        assert report["policy"] == params["relay_policy"]
        if "relay_budget" in params:
            assert 0 < report["recomputed"] <= 0.1 * reused(report)


def test_chat_meta_info(server: Server, document: str) -> None:
    path, body = chat(document, {"relay_policy": "rotate"})
    answer = server.post(path, {**body, "return_meta_info": True})
    (choice,) = answer["choices"]
    assert choice["meta_info"]["relay"] == answer["sglext"]["relay"]
    assert reused(choice["meta_info"]["relay"]) >= 100


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_several_choices_have_a_report_each(server: Server, document: str, stream: bool) -> None:
    path, body = chat(document, {"relay_policy": "rotate"})
    body |= {"n": 2, "temperature": 1.0}
    if stream:
        reports = [c["sglext"]["relay"] for c in events(server, path, body) if "relay" in (c.get("sglext") or {})]
    else:
        reports = server.post(path, body)["sglext"]["relay"]
    assert len(reports) == 2
    for report in reports:
        # SGLang prefills the prompt once and then samples it twice.
        assert report["approximate"] > 100 and report["depth"] == 1


def several(donor: list[int], n: int, new: int = 8) -> dict[str, Any]:
    """Body of a completion of three prompts; the second holds no donor."""
    prompts = [prompt_with(donor), fresh(70), prompt_with(donor, head=50)]
    sampling = {"temperature": 1, "max_tokens": new, "n": n, "ignore_eos": True}
    return {"model": "tiny", "prompt": prompts, **sampling, "custom_params": {"relay_policy": "rotate"}}


@pytest.mark.parametrize("n", [1, 2])
def test_several_prompts_have_a_report_per_choice(server: Server, donor: list[int], n: int) -> None:
    first: dict[int, dict[str, Any]] = {}
    for chunk in events(server, "/v1/completions", body := several(donor, n)):
        for choice in chunk["choices"]:
            report = (chunk.get("sglext") or {}).get("relay")
            assert (report is not None) == (choice["index"] not in first), "in each choice's first chunk, in no other"
            if report is not None:
                first[choice["index"]] = check(report, len(body["prompt"][choice["index"] // n]))
    assert sorted(first) == list(range(3 * n))
    assert [first[index]["depth"] for index in sorted(first)] == [1] * n + [0] * n + [1] * n


def test_nothing_is_kept_of_streams_that_have_ended(server: Server, inspector: Inspector, donor: list[int]) -> None:
    ask(server, fresh(40), 1)
    before = inspector.ask(server, "kept_reports")  # the HTTP server may hold on to its last answer
    events(server, "/v1/completions", several(donor, 1))
    body = {**several(donor, 2, 3000), "stream": True}
    with requests.post(server.url + "/v1/completions", json=body, stream=True, timeout=300) as response:
        next(response.iter_lines())  # one chunk of six choices, then the client is gone
    wait_until(lambda: inspector.ask(server, "pool")["running"] == 0)
    ask(server, fresh(40), 1)
    wait_until(lambda: inspector.ask(server, "kept_reports") <= before, tries=5)


def test_a_response_is_extended_by_the_same_models_every_time() -> None:
    """To make one takes a millisecond of the event loop that serves everybody."""
    made = []
    for _ in range(2):
        plain = CompletionResponse(id="1", model="tiny", choices=[], usage=UsageInfo())
        ret = [{"meta_info": {"relay": {"declined": None}}}]
        made.append(front_end.response(plain, None, None, ret))
    assert type(made[0]) is type(made[1]) is not CompletionResponse
    assert made[1].model_dump()["sglext"]["relay"] == {"declined": None}


def test_streamed_chunks_stay_what_openai_clients_expect(server: Server, document: str) -> None:
    path, body = chat(document, {"relay_policy": "rotate"})
    chunks = events(server, path, body)
    streamed = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"])
    assert streamed == server.post(path, body)["choices"][0]["message"]["content"]
    assert len({c["id"] for c in chunks}) == 1 and {c["object"] for c in chunks} == {"chat.completion.chunk"}


# ---------------------------------------------------------------------- structured output

SCHEMA = {
    "type": "object",
    "properties": {
        "verdict": {"enum": ["accept", "reject", "revise"]},
        "score": {"type": "integer", "minimum": 0, "maximum": 9},
        "final": {"type": "boolean"},
    },
    "required": ["verdict", "score", "final"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("policy", ["rotate", "relay", "full"])
def test_structured_output_over_a_relayed_prompt(server: Server, donor: list[int], policy: str) -> None:
    answer = server.generate(
        prompt_with(donor), max_new_tokens=80, json_schema=json.dumps(SCHEMA), custom_params={"relay_policy": policy}
    )
    assert reused(report_of(answer)) >= len(donor) - 2
    check_verdict(answer["text"])


def test_structured_chat_over_a_relayed_prompt(server: Server, document: str) -> None:
    path, body = chat(document, {"relay_policy": "rotate"})
    form = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA, "strict": True}}
    answer = server.post(path, {**body, "max_tokens": 80, "response_format": form})
    assert reused(answer["sglext"]["relay"]) >= 100
    check_verdict(answer["choices"][0]["message"]["content"])


def check_verdict(text: str) -> None:
    verdict = json.loads(text)
    assert verdict.keys() == {"verdict", "score", "final"}
    assert verdict["verdict"] in SCHEMA["properties"]["verdict"]["enum"]
    assert isinstance(verdict["score"], int) and isinstance(verdict["final"], bool)


# ---------------------------------------------------------------------- server state


def test_server_info(server: Server, donor: list[int]) -> None:
    ask(server, prompt_with(donor), 1, {"relay_policy": "rotate"})
    shown = state(server)
    assert shown["active"] is True and shown["unsupported"] == [] and shown["isolated"] is False
    assert len(shown["hooks"]) >= 8 and all(shown["hooks"].values())
    assert (
        shown["config"]["policy"] == "probe"
        and shown["default_tier"] == "probe@0.3"
        and shown["config"]["min_segment"] == 32
    )
    assert shown["layer_range"] == "0,3,5", "that of the profile"
    assert shown["index"]["donors"] > 0 and 0 < shown["index"]["bytes"] <= shown["config"]["index_bytes"]
    assert shown["stats"]["failures"] == shown["stats"]["fallbacks"] == 0
    assert "hooks in force" in server.log()
    assert len(shown["front_end"]) == 7 and all(shown["front_end"].values())
    assert all(finding.ok for finding in doctor.server(server.get("/server_info")))


def test_a_front_end_without_the_plugin_is_found(server: Server) -> None:
    info = server.get("/server_info")
    for shown in info["internal_states"]:
        del shown["relay"]["front_end"]
    assert [finding.what for finding in doctor.server(info) if not finding.ok] == ["front end"]


@pytest.mark.parametrize("policy", ["rotate", "probe", "full"])
def test_a_prefix_that_a_relayed_request_left_is_called_what_it_is(
    server: Server, donor: list[int], policy: str
) -> None:
    """Repeated, continued, and continued by another text: approximate from the first reused token on."""
    params = {"relay_policy": policy, "relay_donate": "none"}
    prompt = prompt_with(donor, head=40)
    first = report_of(ask(server, prompt, 4, params))
    assert first["approximate"] == first["exact"] == 0 and reused(first) > 100
    for tail in ([], tokens(20, 7)):
        again = report_of(ask(server, [*prompt, *tail], 4, params))
        cached = len(prompt) - (not tail)
        if policy == "full":  # recomputed, and so exact
            assert (again["exact"], again["approximate"], again["declined"]) == (cached, 0, "nothing_to_reuse")
        else:
            assert (again["exact"], again["approximate"], again["declined"]) == (40, cached - 40, None)
        assert 0 <= again["cost"] <= 1


@pytest.mark.parametrize("policy", ["rotate", "relay", "full"])
def test_counters_move_with_the_requests(server: Server, donor: list[int], policy: str) -> None:
    before = stats(server)
    # One chunk under every policy.
    report = report_of(ask(server, prompt_with(donor[:90], head=20), 1, {"relay_policy": policy}))
    ask(server, fresh(20), 1, {"relay": "off"})
    after = stats(server)

    def moved(*path: str) -> int:
        a, b = before, after
        for key in path:
            a, b = a.get(key, 0), b.get(key, 0)  # type: ignore[union-attr]
        return b - a  # type: ignore[operator]

    assert moved("tokens", "relayed") == report["relayed"]
    assert moved("tokens", "recomputed") == moved("recomputed") == report["recomputed"]
    assert moved("tokens", "fresh") == report["fresh"] + 20
    assert moved("batches") == 1
    assert moved("declined", "relay_off") == 1


def test_metrics_say_what_server_info_says(server: Server, donor: list[int]) -> None:
    ask(server, prompt_with(donor), 1, {"relay_policy": "relay"})
    counted = stats(server)
    metrics = server.get("/metrics")

    def metric(name: str, **labels: str) -> float:
        found = [
            float(line.rsplit(" ", 1)[1])
            for line in metrics.splitlines()
            if re.match(rf"sglang_relay:{name}\{{", line) and all(f'{k}="{v}"' in line for k, v in labels.items())
        ]
        assert len(found) == 1, (name, labels)
        return found[0]

    assert counted["tokens"].keys() == {"exact", "approximate", "relayed", "recomputed", "fresh"}
    for kind, count in counted["tokens"].items():
        assert metric("tokens_total", kind=kind) == count > 0 or kind == "approximate"
    assert metric("recomputed_tokens_total") == counted["recomputed"] > 0
    assert metric("batches_total") == counted["batches"] > 0
    for reason, count in counted["declined"].items():
        assert metric("declined_total", reason=reason) == count


# ---------------------------------------------------------------------- abort


@pytest.mark.parametrize("how", ["abort_request", "disconnect"])
def test_abort_of_a_relayed_request(server: Server, inspector: Inspector, donor: list[int], how: str) -> None:
    donors = state(server)["index"]["donors"]
    rid = f"to-be-aborted-{how}"
    sampling = {
        "temperature": 0,
        "max_new_tokens": 6000,
        "ignore_eos": True,
        "custom_params": {"relay_policy": "rotate"},
    }
    body = {"input_ids": prompt_with(donor), "sampling_params": sampling, "rid": rid, "stream": True}
    with requests.post(server.url + "/generate", json=body, stream=True, timeout=300) as response:
        lines = (line for line in response.iter_lines() if line.startswith(b"data: {"))
        first = json.loads(next(lines)[len(b"data: ") :])
        assert reused(report_of(first)) == len(donor) - 1
        for _ in range(40):
            next(lines)
        if how == "abort_request":
            server.post("/abort_request", {"rid": rid})
            *_, last = lines
            meta = json.loads(last[len(b"data: ") :])["meta_info"]
            assert meta["finish_reason"]["type"] == "abort"
            assert report_of({"meta_info": meta}) == first["meta_info"]["relay"]
    wait_until(lambda: inspector.ask(server, "pool")["running"] == 0)
    assert state(server)["index"]["donors"] == donors, "an aborted output became a donor"
    # The donor is unharmed and unlocked.
    assert reused(report_of(ask(server, prompt_with(donor), 1))) == len(donor) - 1


def test_abort_while_waiting(server: Server, inspector: Inspector, donor: list[int]) -> None:
    """Aborted between admission to the queue and prefill, or just after: no answer is lost and nothing stays locked."""
    prompts = [prompt_with(donor) for _ in range(12)]
    answers: list[Any] = []
    clients = [threading.Thread(target=lambda p=p: answers.append(ask(server, p, 100))) for p in prompts]
    for client in clients:
        client.start()
    server.post("/abort_request", {"rid": "", "abort_all": True})
    for client in clients:
        client.join()
    assert len(answers) == len(prompts)
    for answer in answers:
        reason = answer["meta_info"]["finish_reason"]["type"]
        assert reason in ("abort", "length")
        if reason == "length":
            report_of(answer)
    wait_until(lambda: inspector.ask(server, "pool")["running"] == 0)


def wait_until(holds: Any, tries: int = 300) -> None:
    for _ in range(tries):
        if holds():
            return
        time.sleep(0.1)
    pytest.fail("it did not come to rest")
