"""Live audits on a real server: who is served the exact answer, and when relay is switched off."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import torch
from plugins import Inspector
from test_certificate import candidate, made
from transformers import AutoTokenizer

from sglang_relay.engine.audit import divergence
from sglang_relay.fetch_model import ensure_model
from sglang_relay.identity import identify
from sglang_relay.measure.server import Server

EDGE = 0.011
"""Nats; of the next token under `probe` at .2, as a certificate would have it: an upper bound of the 90th percentile is
.005, .008 and .011 on the three held-out sets of docs/fidelity.md."""
SOUND = 24
"""Audits of a sound tier before a fault is injected."""
ROLES = ("a council member", "an engineer", "a teacher", "a reporter", "a treasurer", "a shopkeeper", "a nurse")
RULES = ("Be brief.", "Prefer figures.", "Name the gaps first.", "Quote the text.", "Think of the cost.", "Be kind.")


class World:
    """A server on which every request that can be audited is, and a text that another agent wrote."""

    def __init__(self, server: Server, encode: Any) -> None:
        self.server = server
        self._encode = encode
        task = "<|im_start|>user\nHow can a town protect its harbour from floods?<|im_end|>\n<|im_start|>assistant\n"
        self.text: list[int] = self.ask(encode(task), 192, relay="exact", relay_donate="output")["output_ids"]

    def ask(self, prompt: list[int], new: int = 1, fields: dict[str, Any] | None = None, **custom: Any) -> Any:
        return self.server.generate(prompt, max_new_tokens=new, ignore_eos=True, custom_params=custom, fields=fields)

    def prompt(self, rng: random.Random) -> list[int]:
        """A new head each time, from its first token on; the text; a short question."""
        rules = " ".join(rng.sample(RULES, 4))
        head = f"<|im_start|>system\n[{rng.randrange(10**6)}] You are {rng.choice(ROLES)}. {rules}<|im_end|>\n"
        question = "\nWhat comes first?<|im_end|>\n<|im_start|>assistant\n"
        return [
            rng.randrange(1000, 40_000),
            *self._encode(head + "<|im_start|>user\n"),
            *self.text,
            *self._encode(question),
        ]

    def report(self, prompt: list[int], **custom: Any) -> dict[str, Any]:
        return self.ask(prompt, **custom)["meta_info"]["relay"]

    def breaker(self, tier: str) -> dict[str, Any]:
        (internal,) = self.server.get("/server_info")["internal_states"]
        return internal["relay"]["audit"][tier]


@pytest.fixture(scope="module")
def world(inspector: Inspector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """`probe` is certified from a share of .2 on, nothing else is."""
    model = ensure_model("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(model)
    measured = candidate("probe", "0.2", 4e-3, 0.25)
    measured = msgspec.structs.replace(measured, figures=msgspec.structs.replace(measured.figures, next_kl_edge=EDGE))
    certificate = made(measured, identity=identify(model, dtype="bfloat16")).save(tmp_path_factory.mktemp("certified"))
    env = {**inspector.env, "SGLANG_RELAY_AUDIT_EVERY": "1", "SGLANG_RELAY_DONATE": "none"}
    env["SGLANG_RELAY_CERTIFICATE"] = str(certificate)
    args = ("--radix-cache-backend", "relay", "--chunked-prefill-size", 320, "--max-total-tokens", 65_536)
    with Server(model, *args, env=env) as server:
        yield World(server, lambda text: tokenizer.encode(text, add_special_tokens=False))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.node.name)


def test_an_audited_request_is_served_exactly(world: World, rng: random.Random) -> None:
    """To the bit, as the stock forward of the same prompt."""
    prompt, fields = world.prompt(rng), {"return_logprob": True, "top_logprobs_num": 5}
    audited = world.ask(prompt, 4, fields, relay_policy="rotate")["meta_info"]
    exact = world.ask(prompt, 4, fields, relay="off")["meta_info"]
    report = audited["relay"]
    assert report["declined"] == "audited" and report["depth"] == 0, report
    assert (report["relayed"], report["recomputed"], report["segments"]) == (0, 0, 0), report
    assert report["exact"] + report["fresh"] == len(prompt)
    for field in ("output_token_logprobs", "output_top_logprobs"):
        assert audited[field] == exact[field]


@pytest.mark.parametrize(("policy", "budget"), [("probe", 0.3), ("legolink", 40)])
def test_every_chunk_of_a_long_prompt_is_audited(world: World, rng: random.Random, policy: str, budget: float) -> None:
    """A probe's repair in the last one, where what earlier ones placed is computed again; others' in each."""
    middle = [rng.randrange(1000, 40_000) for _ in range(400)]
    prompt, fields = [*world.prompt(rng), *middle, *world.prompt(rng)], {"return_logprob": True}
    tier, params = f"{policy}@{budget:g}", {"relay_policy": policy, "relay_budget": budget}
    audited = world.ask(prompt, 4, fields, **params)["meta_info"]
    exact = world.ask(prompt, 4, fields, relay="off")["meta_info"]
    report, state = audited["relay"], world.breaker(tier)
    assert report["declined"] == "audited" and report["depth"] == 0, report
    assert report["exact"] + report["fresh"] == len(prompt)
    assert state["audits"] == (1 if policy == "probe" else 2) and state["unreachable"] == 0, state
    pairs = zip(audited["output_token_logprobs"], exact["output_token_logprobs"], strict=True)
    assert all(abs(one[0] - other[0]) < 0.05 for one, other in pairs), "bf16, in chunks of other sizes"


def test_a_half_open_breaker_is_left_by_prompts_of_several_chunks(
    world: World, inspector: Inspector, rng: random.Random
) -> None:
    """And what was relayed before the trip is behind: a prompt that goes on from it can be audited, too."""
    params, tier = {"relay_policy": "legolink", "relay_budget": 4095}, "legolink@4095"
    middle = [rng.randrange(1000, 40_000) for _ in range(400)]
    inspector.ask(world.server, "audit_every", every=0)
    before = [*world.prompt(rng), *middle, *world.prompt(rng)]
    assert world.report(before, **params)["declined"] is None
    assert world.report([*before, 77, 78], **params)["approximate"] > 300
    inspector.ask(world.server, "half_open", tier=tier)
    prompt, trials = [*before, 77, 79], 0
    while world.breaker(tier)["half-open"] and trials < 8:
        report = world.report(prompt, **params)
        assert report["declined"] == "audited" and report["approximate"] == 0, report
        prompt, trials = [*world.prompt(rng), *middle, *world.prompt(rng)], trials + 1
    inspector.ask(world.server, "audit_every", every=1)
    assert world.breaker(tier)["closed"] == 1, world.breaker(tier)


@pytest.mark.parametrize(
    ("fault", "policy", "budget"),
    [
        ("rotation", "probe", 0.2),
        ("stale", "probe", 0.21),
        ("corrupt", "probe", 0.22),
        ("rotation", "probe_only", 0.1),
    ],
)
def test_a_fault_is_caught_and_the_server_goes_on(
    world: World, inspector: Inspector, rng: random.Random, fault: str, policy: str, budget: float
) -> None:
    """Each one under `probe` at about .2 and a certificate. Without one the band is wide: a rotation is found where
    little is recomputed, slots of other tokens of the same text may not be."""
    params, tier = {"relay_policy": policy, "relay_budget": budget}, f"{policy}@{budget:g}"
    for _ in range(SOUND):
        assert world.report(world.prompt(rng), **params)["declined"] == "audited"
    before = world.breaker(tier)
    assert (before["closed"], before["trips"], before["audits"]) == (1, 0, SOUND), before
    inspector.break_(world.server, fault)
    try:
        declined: list[str] = []
        while len(declined) <= 64 and "breaker_open" not in declined:
            declined.append(world.report(world.prompt(rng), **params)["declined"])
    finally:
        inspector.break_(world.server, None)
    state = world.breaker(tier)
    assert declined[-1] == "breaker_open" and set(declined) == {"audited", "breaker_open"}
    assert state["open"] == 1 and state["trips"] == 1, state
    print(f"{fault}: caught after {len(declined) - 1} audits")
    band = f"{EDGE} (certificate of 2026-11-24)" if policy == "probe" else "0.1 (default, no certificate)"
    assert f"band {band}" in state["reason"], state
    assert f"relay: {tier} is open" in world.server.log()
    prompt = world.prompt(rng)
    stock = world.ask(prompt, 4, **params)
    assert stock["meta_info"]["relay"]["declined"] == "breaker_open"
    assert stock["output_ids"] == world.ask(prompt, 4, relay="off")["output_ids"]
    assert world.report(world.prompt(rng), relay_policy="cacheblend")["declined"] == "audited", "other tiers go on"


def test_divergence() -> None:
    exact = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    relayed = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    p = 1 / (1 + torch.exp(torch.tensor(-2.0)))
    want = float(p * torch.log(2 * p) + (1 - p) * torch.log(2 * (1 - p)))
    assert divergence(relayed, exact) == pytest.approx([0.0, want], abs=1e-6)
    assert divergence(torch.tensor([[float("nan"), 0.0]]), exact[:1]) == pytest.approx([float("nan")], nan_ok=True)
