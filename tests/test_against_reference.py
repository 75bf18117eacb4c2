"""A server in fp32 against the fp64 reference: the whole distribution of a relayed prompt's next token, to 1e-4.

The reference gets the same donor KV, computed in fp64 from the donors' own tokens. Compared first are the numbers of
tokens that the policy selected, then all log-probabilities. Each deliberate error of the reference moves them by far
more than the bound, so the comparison would notice a server that made it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import pytest
import torch
from prompts import Cut, Donor, Prompt, compose, random_tokens
from reference import Full, Mutation, Policy, Reference, Relay, Result, Rotate, Segment
from tiny_model import make_tiny_llama

from sglang_relay.fetch_model import ensure_model
from sglang_relay.measure.server import Server

BOUND = 1e-4
CLEAR = 1e-2
"""A mutation moves the log-probabilities at least this far from the server's."""
ENOUGH = "on the larger model one of its kind is enough"
MARGIN = 2e-6
"""Closest that a deviation may come to the threshold: below, fp32 and fp64 may select different tokens."""


class Case(NamedTuple):
    """cuts: the prompt's pieces; tail: fresh tokens at its end."""

    cuts: list[Cut]
    tail: int


CASES = {
    "one": Case([Cut(0, 0, 64, 9)], 7),
    "middle": Case([Cut(1, 37, 67, 21)], 1),
    "two": Case([Cut(1, 5, 70, 12), Cut(2, 40, 64, 3)], 12),
    "three": Case([Cut(2, 20, 48, 11), Cut(0, 31, 70, 2), Cut(1, 8, 60, 17)], 9),
    "adjacent": Case([Cut(0, 10, 80, 30), Cut(2, 50, 41, 1)], 2),
}


class Setting(NamedTuple):
    name: str
    relay: Relay
    cases: tuple[str, ...]


TINY = Setting("tiny", Relay(det=2, end=4, tau_dev=1.5, suffix=10), tuple(CASES))
SMOLLM2 = Setting("smollm2", Relay(det=3, end=20, tau_dev=1.5, suffix=10), ("three",))


class World:
    """A server, the reference of its model, and three donors that the server has decoded."""

    def __init__(self, setting: Setting, server: Server, reference: Reference) -> None:
        self.setting, self.server, self.reference = setting, server, reference
        self.vocab: int = reference.config["vocab_size"]
        self._rng = random.Random(7)
        self._seed = 0
        self.donors: list[Donor] = []
        self._computed: list[Result] = []
        for length in (23, 40, 31):
            self.decode(random_tokens(length, self._rng, self.vocab), relay="exact")

    def policy(self, name: str) -> Policy:
        return {"rotate": Rotate(), "full": Full(), "relay": self.setting.relay}[name]

    def decode(self, prompt: list[int], segments: list[Segment] | None = None, **params: Any) -> dict[str, Any]:
        """Make a donor of 110 varied tokens; its KV is what the reference computes with the same `segments`."""
        answer = self.server.generate(
            prompt, max_new_tokens=110, ignore_eos=True, frequency_penalty=1.0, custom_params=params
        )
        donor = Donor(prompt, answer["output_ids"])
        policy = self.policy(params["relay_policy"]) if segments else Full()
        self.donors.append(donor)
        self._computed.append(self.reference.run([*donor.path[:-1], 3], segments or [], policy))
        return answer["meta_info"]["relay"]

    def prompt(self, case: Case) -> Prompt:
        """Fresh tokens differ with every call, so that no prompt finds another one's prefix."""
        self._seed += 1
        return compose(self.donors, case.cuts, case.tail, random.Random(self._seed), self.vocab)

    def segments(self, prompt: Prompt) -> list[Segment]:
        cut = []
        for p in prompt.pieces:
            span, donor = slice(p.source, p.source + p.length), self._computed[p.donor]
            cut.append(Segment(p.start, p.stop, p.source, donor.k[:, span], donor.v[:, span]))
        return cut

    def serve(self, prompt: Prompt, **params: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """Log-probabilities [vocab] of the first generated token, and the request's report."""
        answer = self.server.generate(
            prompt.tokens,
            max_new_tokens=1,
            custom_params={"relay_donate": "none", **params},
            fields={"return_logprob": True, "token_ids_logprob": list(range(self.vocab))},
        )["meta_info"]
        values = answer["output_token_ids_logprobs"][0]
        assert [token for _, token, _ in values] == list(range(self.vocab))
        return torch.tensor([value for value, _, _ in values], dtype=torch.float64), answer["relay"]


@pytest.fixture(scope="module", params=[TINY, SMOLLM2], ids=lambda s: s.name)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    setting: Setting = request.param
    tiny = setting is TINY
    model = make_tiny_llama(tmp_path_factory.mktemp("tiny")) if tiny else ensure_model("smollm2-135m")
    # The first number only tells where the entry from hidden states would begin.
    layers = f"1,{setting.relay.det},{setting.relay.end}"
    env = {"SGLANG_RELAY_LAYER_RANGE": layers, "SGLANG_RELAY_TAU_DEV": str(setting.relay.tau_dev)}
    args = ("--radix-cache-backend", "relay", "--dtype", "float32", "--max-total-tokens", 8192)
    with Server(model, *args, env=env) as server:
        yield World(setting, server, Reference(model))


def log_probabilities(result: Result) -> torch.Tensor:
    return result.logits.log_softmax(-1)


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def check_counts(report: dict[str, Any], prompt: Prompt, recomputed: int) -> None:
    fresh = len(prompt.tokens) - prompt.matched
    assert report["declined"] is None, report
    assert (report["exact"], report["fresh"], report["segments"]) == (0, fresh, len(prompt.pieces)), report
    assert (report["relayed"], report["recomputed"]) == (prompt.matched - recomputed, recomputed), report


def check_margin(result: Result, segments: list[Segment], tau_dev: float) -> None:
    """The selection hangs on no rounding; if it does, the test needs other prompts."""
    for s in segments:
        deviation = result.deviation[s.start : s.stop]
        assert float((deviation - tau_dev * deviation.mean()).abs().min()) > MARGIN, "choose another seed"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", ["rotate", "relay", "full"])
def test_next_token_distribution(world: World, policy: str, case: str) -> None:
    if case not in world.setting.cases:
        pytest.skip(ENOUGH)
    prompt = world.prompt(CASES[case])
    segments = world.segments(prompt)
    got, report = world.serve(prompt, relay_policy=policy)
    want = world.reference.run(prompt.tokens, segments, world.policy(policy))
    if policy == "relay":
        check_margin(want, segments, world.setting.relay.tau_dev)
        assert len(segments) * world.setting.relay.suffix < int(want.selected.sum()) < prompt.matched
    check_counts(report, prompt, prompt.matched if policy == "full" else int(want.selected.sum()))
    assert far(got, log_probabilities(want)) < BOUND
    assert far(got, got.new_zeros(())) > 1, "a distribution, not a constant"


@pytest.mark.parametrize("budget", [0.2, 0.25])
def test_budget_keeps_the_suffix_and_the_largest_deviations(world: World, budget: float) -> None:
    if world.setting is not TINY:
        pytest.skip("the selection does not depend on the model")
    prompt = world.prompt(CASES["middle"])
    segments = world.segments(prompt)
    got, report = world.serve(prompt, relay_policy="relay", relay_budget=budget)
    relay = world.setting.relay
    measured = world.reference.run(prompt.tokens, segments, relay)
    check_margin(measured, segments, relay.tau_dev)
    deviation = measured.deviation[segments[0].start : segments[0].stop]
    inner = deviation[: -relay.suffix].sort(descending=True).values
    kept = int(budget * prompt.matched) - relay.suffix
    assert 0 < kept < int((inner >= relay.tau_dev * deviation.mean()).sum()), "the budget should be what limits"
    # The threshold that lets exactly as many tokens pass as the budget leaves beside the suffix.
    assert float(inner[kept - 1] - inner[kept]) > MARGIN, "choose another seed"
    between = float((inner[kept - 1] + inner[kept]) / 2 / deviation.mean())
    want = world.reference.run(prompt.tokens, segments, relay._replace(tau_dev=between))
    check_counts(report, prompt, relay.suffix + kept)
    assert far(got, log_probabilities(want)) < BOUND


@pytest.mark.parametrize("policy", ["rotate", "relay"])
def test_donor_that_was_relayed_itself(world: World, policy: str) -> None:
    """The third agent reuses what the second decoded over relayed KV: approximation of depth 2."""
    if world.setting is SMOLLM2:
        pytest.skip(ENOUGH)
    second = world.prompt(CASES["two"])
    before = world.segments(second)
    report = world.decode(second.tokens, before, relay_policy=policy)
    assert report["depth"] == 1 and report["segments"] == 2, report
    number = len(world.donors) - 1
    third = world.prompt(Case([Cut(number, 25, 72, 14), Cut(0, 3, 50, 5)], 6))
    segments = world.segments(third)
    got, report = world.serve(third, relay_policy=policy)
    assert report["depth"] == 2, report
    want = world.reference.run(third.tokens, segments, world.policy(policy))
    if policy == "relay":
        check_margin(want, segments, world.setting.relay.tau_dev)
    check_counts(report, third, int(want.selected.sum()))
    assert far(got, log_probabilities(want)) < BOUND


@pytest.mark.parametrize("policy", ["rotate", "relay"])
def test_mutations_would_be_caught(world: World, policy: str) -> None:
    if world.setting is SMOLLM2 and policy == "rotate":
        pytest.skip(ENOUGH)
    prompt = world.prompt(CASES["three"])
    segments = world.segments(prompt)
    got, _ = world.serve(prompt, relay_policy=policy)
    assert far(got, log_probabilities(world.reference.run(prompt.tokens, segments, world.policy(policy)))) < BOUND
    for mutation in get_args(Mutation):
        if policy == "rotate" and mutation == "stale_stage":
            continue  # it has no stages
        wrong = world.reference.run(prompt.tokens, segments, world.policy(policy), mutation)
        assert far(got, log_probabilities(wrong)) > CLEAR, mutation
