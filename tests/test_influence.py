"""Decode influence, collected by real servers, against the fp64 reference; what policy ``relay`` selects with it."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plugins import Inspector
from prompts import random_tokens
from reference import Reference, Relay, Segment
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from test_against_reference import (
    BOUND,
    CASES,
    MARGIN,
    NO_AUDIT,
    TINY,
    World,
    check_counts,
    far,
    log_probabilities,
)

from sglang_relay.attention import attention_mass
from sglang_relay.engine.influence import Influence
from sglang_relay.measure.server import Server

ARGS = ("--radix-cache-backend", "relay", "--dtype", "float32")
ON = {"SGLANG_RELAY_INFLUENCE": "auto", **NO_AUDIT}
CLOSE = 2e-5
"""Relative, or absolute for small scores: sums of fp32 weights against fp64."""


class Decoded:
    """A finished request. held: tokens whose KV was computed and kept; of one that reached its length all but the
    last."""

    def __init__(self, prompt: list[int], output: list[int], *, last: bool = False) -> None:
        self.prompt, self.output = prompt, output
        self.held = [*prompt, *output] if last else [*prompt, *output[:-1]]


def decode(server: Server, prompt: list[int], tokens: int = 60, **fields: Any) -> Decoded:
    answer = server.generate(
        prompt,
        max_new_tokens=tokens,
        ignore_eos=True,
        frequency_penalty=1.0,
        custom_params={"relay": "exact"},
        **fields,
    )
    return Decoded(prompt, answer["output_ids"])


def check(
    inspector: Inspector, server: Server, reference: Reference, done: Decoded, layers: range | None = None
) -> None:
    """What the tree holds of ``done``: nothing for the prompt, and what the reference says for the output."""
    got = inspector.influence(server, done.held)
    prompt = len(done.prompt)
    assert len(got) > prompt + 16, "the tree does not hold it"
    assert got[:prompt] == [None] * prompt
    alike(got[prompt:], reference.influence(done.held, prompt, layers or range(reference.layers)))


def alike(got: list[float | None], want: torch.Tensor) -> None:
    """Of the tokens that the tree holds, the first ones of ``want``."""
    assert None not in got, got
    have, want = torch.tensor(got, dtype=torch.float64), want[: len(got)]
    assert float(want.max()) > 1
    off = (have - want) / want.clamp_min(1)
    assert float(off.abs().max()) < CLOSE, off


def prompts(count: int, vocab: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [random_tokens(rng.randint(20, 90), rng, vocab) for _ in range(count)]


def at_once(server: Server, all_prompts: list[list[int]], tokens: int = 60) -> list[Decoded]:
    with ThreadPoolExecutor(len(all_prompts)) as pool:
        return list(pool.map(lambda p: decode(server, p, tokens), all_prompts))


@pytest.mark.parametrize(
    ("flags", "env"),
    [
        ((), {}),
        (("--disable-overlap-schedule", "--page-size", 16), {}),
        (("--enable-mixed-chunk", "--chunked-prefill-size", 48, "--page-size", 4), {}),
        ((), {"SGLANG_TEST_RETRACT": "true", "SGLANG_TEST_RETRACT_INTERVAL": "50"}),
    ],
    ids=["overlap", "pages", "mixed", "retracted"],
)
def test_what_decoding_collects(
    model: Path, reference: Reference, tmp_path: Path, flags: tuple, env: dict[str, str]
) -> None:
    inspector = Inspector(tmp_path)
    with Server(model, *ARGS, *flags, "--max-total-tokens", 4096, env={**ON, **env, **inspector.env}) as server:
        vocab = reference.config["vocab_size"]
        for done in at_once(server, prompts(5, vocab, 3)):
            check(inspector, server, reference, done)
        if "SGLANG_TEST_RETRACT" in env:
            assert "retract" in server.log().lower()
        # A request that stops early runs once more under overlap.
        prompt = prompts(1, vocab, 4)[0]
        whole = decode(server, prompt)
        early = whole.output[40]
        first = whole.output.index(early)
        server.post("/flush_cache")
        answer = server.generate(
            prompt, max_new_tokens=60, stop_token_ids=[early], frequency_penalty=1.0, custom_params={"relay": "exact"}
        )
        assert answer["output_ids"][: first + 1] == whole.output[: first + 1] and len(answer["output_ids"]) == first + 1
        last = "--disable-overlap-schedule" not in flags
        check(inspector, server, reference, Decoded(prompt, answer["output_ids"], last=last))
        # Each of n answers of one prompt has its own; of tokens that several begin with the tree holds one's.
        prompt = prompts(1, vocab, 5)[0]
        answers = server.generate(
            prompt,
            max_new_tokens=50,
            ignore_eos=True,
            temperature=20.0,
            n=3,
            custom_params={"relay": "exact"},
        )
        outputs = [answer["output_ids"] for answer in answers]
        alone = [output for output in outputs if sum(output[0] == other[0] for other in outputs) == 1]
        assert alone, [output[:4] for output in outputs]
        for output in alone:
            check(inspector, server, reference, Decoded(prompt, output))


def test_slots_that_are_used_again(model: Path, reference: Reference, tmp_path: Path) -> None:
    """The pool holds three of these texts: each is evicted and its slots go to others."""
    inspector = Inspector(tmp_path)
    env = {**ON, "SGLANG_RELAY_INFLUENCE": "1,3", **inspector.env}
    with Server(model, *ARGS, "--max-total-tokens", 400, env=env) as server:
        for prompt in prompts(9, reference.config["vocab_size"], 6):
            check(inspector, server, reference, decode(server, prompt), range(1, 4))
        # A text that was decoded, evicted and then prefilled has none, if it is not offered as a transcript.
        done = decode(server, prompts(1, reference.config["vocab_size"], 7)[0])
        server.post("/flush_cache")
        decode(server, [*done.held, 5], 20)
        got = inspector.influence(server, done.held)
        assert len(got) == len(done.held) and set(got) == {None}
        server.post("/flush_cache")
        transcript = {"relay": "exact", "relay_generated_from": len(done.prompt)}
        server.generate(done.held, max_new_tokens=1, custom_params=transcript)
        check(inspector, server, reference, done, range(1, 4))
        state = server.get("/server_info")["internal_states"][0]["relay"]["influence"]
        assert state["layers"] == "1,3" and state["bytes"] >= 4 * 400


def test_influence_and_hidden_states_are_off_by_default_and_nothing_is_hooked(model: Path, tmp_path: Path) -> None:
    inspector = Inspector(tmp_path)
    with Server(model, *ARGS, "--max-total-tokens", 2048, env={**NO_AUDIT, **inspector.env}) as server:
        assert inspector.ask(server, "module_hooks") == 0
        state = server.get("/server_info")["internal_states"][0]["relay"]
        assert state["influence"] == state["hidden"] == {"unavailable": "off"}
        answer = server.generate([7, 8, 9], max_new_tokens=2, custom_params={"relay_policy": "relay"})
        report = answer["meta_info"]["relay"]
        assert (report["influence"], report["entry"]) == ("unavailable:off", "embeddings:off")
        answer = server.generate([7, 8, 9, 10], max_new_tokens=2, custom_params={"relay_policy": "rotate"})
        assert "influence" not in answer["meta_info"]["relay"]


# ---------------------------------------------------------------------- selection

TAU_INF = 1.45


@pytest.fixture(scope="module")
def world(model: Path, reference: Reference, inspector: Inspector) -> Iterator[World]:
    r = TINY.relay
    env = {**ON, "SGLANG_RELAY_LAYER_RANGE": f"1,{r.det},{r.end}", "SGLANG_RELAY_COST_MODEL": "false"}
    args = (*ARGS, "--max-total-tokens", 8192, "--enable-mixed-chunk")
    with Server(model, *args, env=env | inspector.env) as server:
        yield World(TINY, server, reference)


def with_influence(world: World, segments: list[Segment]) -> list[Segment]:
    """With the influence that the reference gives each donor's tokens."""
    made = []
    for s in segments:
        donor = world.donors[s.donor]
        start = len(donor.prompt)
        whole = world.reference.influence(donor.path[:-1], start, range(world.reference.layers))
        made.append(s._replace(influence=whole[s.source - start :][: s.stop - s.start]))
    return made


@pytest.mark.parametrize("case", ["one", "three", "adjacent"])
def test_the_policy_selects_by_it(world: World, case: str) -> None:
    prompt = world.prompt(CASES[case])
    cut = with_influence(world, world.segments(prompt))
    got, report = world.serve(prompt, relay_policy="relay")
    policy: Relay = world.setting.relay._replace(tau_inf=TAU_INF)
    want = world.reference.run(prompt.tokens, cut, policy)
    for s in cut:
        assert s.influence is not None
        deviation = want.measured[s.start : s.stop]
        assert float((deviation - policy.tau_dev * deviation.mean()).abs().min()) > MARGIN, "choose another seed"
        near = (s.influence / (TAU_INF * s.influence.mean()) - 1).abs().min()
        assert float(near) > 10 * CLOSE, "choose another seed"
    without = world.reference.run(prompt.tokens, cut, world.setting.relay)
    assert int(want.selected.sum()) > int(without.selected.sum()), "it should select something of its own"
    check_counts(report, prompt, int(want.selected.sum()))
    assert report["influence"] == "used"
    assert far(got, log_probabilities(want)) < BOUND
    assert far(got, log_probabilities(without)) > 10 * BOUND


def test_decoding_goes_on_beside_relayed_prefills(world: World, inspector: Inspector) -> None:
    """Rows of running requests ride along in relayed batches, and in batches that fall back."""
    before = world.server.get("/server_info")["internal_states"][0]["relay"]["stats"]
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(decode, world.server, prompts(1, 1024, 8)[0], 700)
        for n, case in enumerate(["two", "middle", "three", "one", "adjacent", "continued"]):
            inspector.break_(world.server, "hand_over" if n % 3 == 2 else None)  # in the middle of the layers
            # No logprobs: SGLang mixes no batch that wants them.
            params = {"relay_policy": "relay" if n % 2 else "probe", "relay_donate": "none"}
            world.server.generate(world.prompt(CASES[case]).tokens, max_new_tokens=1, custom_params=params)
        inspector.break_(world.server, None)
        assert not running.done(), "make it longer"
        done = running.result()
    after = world.server.get("/server_info")["internal_states"][0]["relay"]["stats"]
    assert after["batches"] - before["batches"] == 4 and after["fallbacks"] - before["fallbacks"] == 2
    check(inspector, world.server, world.reference, done)


def test_a_transcript_beside_a_relayed_prefill_has_none(world: World, inspector: Inspector) -> None:
    """Its rows are scattered over the stages of the relayed batch."""
    text, first = prompts(1, 1024, 9)[0], 5
    prompt = world.prompt(CASES["one"])
    inspector.ask(world.server, "gather", count=2)
    with ThreadPoolExecutor(2) as pool:
        params = {"relay": "exact", "relay_generated_from": first}
        other = pool.submit(world.server.generate, text, max_new_tokens=1, custom_params=params)
        _, report = world.serve(prompt, relay_policy="relay")
        other.result()
    assert report["declined"] is None, report
    assert re.search(rf"Prefill batch.*#new-token: {len(text) + len(prompt.tokens)}\b", world.server.log())
    assert set(inspector.influence(world.server, text)) == {None}
    # Alone it has some.
    world.server.generate([9, *text], max_new_tokens=1, custom_params={**params, "relay_generated_from": first + 1})
    assert None not in inspector.influence(world.server, [9, *text])[first + 1 :]


@pytest.mark.parametrize("more", [0, 30])
def test_a_twin_adds_nothing_to_slots_that_are_not_its_own(world: World, inspector: Inspector, more: int) -> None:
    """Two transcripts in one batch that begin alike: of what both have computed the tree keeps the first one's slots,
    and the second goes on with these. What only the second has stays its own."""
    text, first = prompts(1, 1024, 10 + more)[0], 5
    other = [*text, *random_tokens(more, random.Random(more), 1024)]
    inspector.ask(world.server, "gather", count=2)
    params = {"relay": "exact", "relay_generated_from": first}
    answers = world.server.generate(
        [text, other], max_new_tokens=40, ignore_eos=True, frequency_penalty=1.0, custom_params=params
    )
    assert re.search(rf"Prefill batch.*#new-token: {len(text) + len(other)}\b", world.server.log())
    one, two = (
        Decoded(prompt[:first], [*prompt[first:], *answer["output_ids"]])
        for prompt, answer in zip((text, other), answers, strict=True)
    )
    check(inspector, world.server, world.reference, one)
    if more:
        shared, got = len(text), inspector.influence(world.server, two.held)
        assert got[:shared] == inspector.influence(world.server, one.held)[:shared]
        want = world.reference.influence(two.held, first, range(world.reference.layers))
        alike(got[shared:], want[shared - first :])


# ---------------------------------------------------------------------- arithmetic


def test_several_queries_are_the_sum_of_single_ones() -> None:
    generator = torch.Generator().manual_seed(1)
    n, begin, rows = 150, 20, 100
    query, keys = (torch.randn(n, heads, 16, generator=generator) for heads in (6, 2))
    want = torch.zeros(n - 1 - begin)
    for i in range(n - rows, n):
        one = attention_mass(query[i : i + 1], keys[: i + 1], begin, 0.3)
        want[: len(one)] += one
    got = attention_mass(query[n - rows :], keys, begin, 0.3)
    assert got.shape == want.shape and torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    assert attention_mass(query[:1], keys[:1], 0, 0.3).numel() == 0


def test_slots_that_cannot_be_marked_have_no_influence() -> None:
    """It happens before a forward: what is raised there would end the scheduler."""
    pool = SimpleNamespace(k_buffer=[torch.zeros(8, 1, 4)])
    table = SimpleNamespace(req_to_token=torch.zeros(1, 8, dtype=torch.int32))
    runner = SimpleNamespace(token_to_kv_pool=pool, req_to_token_pool=table, model=torch.nn.Identity())
    failures: list[str] = []
    collected = Influence(runner, range(1), lambda where, error: failures.append(where) or where)
    collected.scores.fill_(1.0)
    batch = SimpleNamespace(
        out_cache_loc=torch.tensor([99]), seq_lens=torch.tensor([3]), forward_mode=ForwardMode.DECODE
    )
    collected.begin([], batch, relayed=False)  # type: ignore[arg-type]
    assert failures == ["influence"]
    assert collected.scores.isnan().all()
