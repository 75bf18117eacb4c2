"""A server in fp32 against the fp64 reference: the whole distribution of a relayed prompt's next token, to 1e-4.

The reference gets the same donor KV, computed in fp64 from the donors' own tokens. Compared first are the numbers of
tokens that the policy selected, then all log-probabilities. Each deliberate error of the reference moves them by far
more than the bound, so the comparison would notice a server that made it.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from prompts import Cut, Donor, Prompt, compose, random_tokens
from reference import (
    FULL,
    ROTATE,
    SPOILS,
    CacheBlend,
    LegoLink,
    Mutation,
    Policy,
    Probe,
    Reference,
    Relay,
    Result,
    Segment,
)
from tiny_model import make_tiny_llama

from sglang_relay.fetch_model import ensure_model
from sglang_relay.measure.server import Server

BOUND = 1e-4
CLEAR = 1e-2
"""A mutation moves the log-probabilities at least this far from the server's."""
ENOUGH = "on the larger model one of its kind is enough"
MARGIN = 2e-6
"""Closest that a deviation may come to the threshold: below, fp32 and fp64 may select different tokens."""
SCORE_MARGIN = 1e-4
"""The same for a probe's scores, relative to the threshold."""


class Case(NamedTuple):
    """cuts: the prompt's pieces; tail: fresh tokens at its end."""

    cuts: list[Cut]
    tail: int

    @property
    def reused(self) -> int:
        return sum(cut.length for cut in self.cuts)


CASES = {
    "one": Case([Cut(0, 0, 64, 9)], 7),
    "middle": Case([Cut(1, 37, 67, 21)], 1),
    "two": Case([Cut(1, 5, 70, 12), Cut(2, 40, 64, 3)], 12),
    "three": Case([Cut(2, 20, 48, 11), Cut(0, 31, 70, 2), Cut(1, 8, 60, 17)], 40),
    "continued": Case([Cut(0, 40, 33, 7), Cut(0, 75, 33, 4), Cut(0, 3, 34, 9)], 24),
    "adjacent": Case([Cut(0, 10, 80, 30), Cut(2, 50, 41, 1)], 2),
}


POLICIES = {
    "rotate": ROTATE,
    "full": FULL,
    "legolink": LegoLink(),
    "cacheblend": CacheBlend(),
    "probe": Probe(),
    "probe_only": Probe(interpolates=False),
}


NO_AUDIT = {"SGLANG_RELAY_AUDIT_EVERY": "0"}
"""An audited request is served exactly."""
EXPLICIT = {"probe": {"relay_budget": 0.2, "relay_quote_tokens": 0}, "probe_only": {"relay_budget": 0.2}}
"""What requests name, so that these comparisons do not hang on a server's default, nor donors on what they quote."""


SPREAD = Case([Cut(2, 20, 80, 11), Cut(0, 5, 100, 90), Cut(1, 8, 95, 70)], 66)
"""Many fresh tokens that a probe must not see."""


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
        self._begun: set[int] = set()
        self.donors: list[Donor] = []
        self._computed: list[Result] = []
        for length in (23, 40, 31):
            self.decode(random_tokens(length, self._rng, self.vocab), relay="exact")

    def policy(self, name: str) -> Policy:
        return {"relay": self.setting.relay, **POLICIES}[name]

    def decode(self, prompt: list[int], segments: list[Segment] | None = None, **params: Any) -> dict[str, Any]:
        """Make a donor of 110 varied tokens; its KV is what the reference computes with the same `segments`."""
        answer = self.server.generate(
            prompt,
            max_new_tokens=110,
            ignore_eos=True,
            frequency_penalty=1.0,
            custom_params={**EXPLICIT.get(params.get("relay_policy", ""), {}), **params},
        )
        donor = Donor(prompt, answer["output_ids"])
        policy = self.policy(params["relay_policy"]) if segments else FULL
        if isinstance(policy, Probe) and segments:
            # Its prompt's last tokens asked, not what it decoded then.
            segments = cached(segments, self.reference.run(prompt, segments, policy))
            policy = ROTATE
        self.donors.append(donor)
        self._computed.append(self.reference.run([*donor.path[:-1], 3], segments or [], policy))
        return answer["meta_info"]["relay"]

    def prompt(self, case: Case) -> Prompt:
        """No two prompts begin with the same token, so that none finds another one's prefix."""
        while True:
            self._seed += 1
            prompt = compose(self.donors, case.cuts, case.tail, random.Random(self._seed), self.vocab)
            if prompt.tokens[0] not in self._begun:
                self._begun.add(prompt.tokens[0])
                return prompt

    def segments(self, prompt: Prompt) -> list[Segment]:
        cut = []
        for p in prompt.pieces:
            span, donor = slice(p.source, p.source + p.length), self._computed[p.donor]
            cut.append(Segment(p.start, p.stop, p.donor, p.source, donor.k[:, span], donor.v[:, span]))
        return cut

    def serve(self, prompt: Prompt, **params: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """Log-probabilities [vocab] of the first generated token, and the request's report."""
        answer = self.server.generate(
            prompt.tokens,
            max_new_tokens=1,
            custom_params={"relay_donate": "none", **EXPLICIT.get(params.get("relay_policy", ""), {}), **params},
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
    env = {"SGLANG_RELAY_LAYER_RANGE": layers, "SGLANG_RELAY_TAU_DEV": str(setting.relay.tau_dev), **NO_AUDIT}
    args = ("--radix-cache-backend", "relay", "--dtype", "float32", "--max-total-tokens", 8192)
    with Server(model, *args, env=env) as server:
        yield World(setting, server, Reference(model))


def log_probabilities(result: Result) -> torch.Tensor:
    return result.logits.log_softmax(-1)


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def cached(segments: list[Segment], result: Result) -> list[Segment]:
    """The reused tokens as `result` leaves them: at their own positions already."""
    return [
        s._replace(source=s.start, k=result.k[:, s.start : s.stop], v=result.v[:, s.start : s.stop]) for s in segments
    ]


def cost(policy: Policy, layers: int, reused: int, selected: int, tail: int) -> float:
    """Rows beyond one per fresh token, in all layers, as a share of what computing the reused tokens would take. Of the
    last layer they need K and V, which count a tenth."""
    if isinstance(policy, Probe):
        return (selected + min(policy.queries, tail)) * (layers - 0.9) / reused / layers
    if isinstance(policy, LegoLink):
        return selected * (layers - 0.9) / reused / layers
    end = policy.end if isinstance(policy, Relay) else layers - 1
    spared = 0.9 * selected if end == layers - 1 else 0.0
    if isinstance(policy, CacheBlend):  # of layer `det` the others need K and V, too, and nothing else
        return (reused * (policy.det + 0.1) + selected * (layers - policy.det) - spared) / reused / layers
    return (reused * (policy.det + 1) + selected * (end - policy.det) - spared) / reused / layers


def check_counts(report: dict[str, Any], prompt: Prompt, recomputed: int) -> None:
    fresh = len(prompt.tokens) - prompt.matched
    assert report["declined"] is None, report
    assert (report["exact"], report["fresh"], report["segments"]) == (0, fresh, len(prompt.pieces)), report
    assert (report["relayed"], report["recomputed"]) == (prompt.matched - recomputed, recomputed), report


def check_margin(policy: Policy, result: Result, segments: list[Segment]) -> None:
    """The selection hangs on no rounding; if it does, the test needs other prompts."""
    if isinstance(policy, Relay):
        for s in segments:
            deviation = result.measured[s.start : s.stop]
            assert float((deviation - policy.tau_dev * deviation.mean()).abs().min()) > MARGIN, "choose another seed"
    elif not isinstance(policy, LegoLink):
        least, most = result.measured[result.selected].min(), result.measured[~result.selected].nan_to_num(0).max()
        assert float(least - most) > (MARGIN if isinstance(policy, CacheBlend) else SCORE_MARGIN * float(least)), (
            "choose another seed"
        )
    if isinstance(policy, Probe) and policy.coverage is not None:
        assert result.mass is not None
        held, total = result.mass[result.selected].sum(), result.mass.nansum()
        lowest = result.measured.where(result.selected, torch.inf).argmin()
        before = held - result.mass[lowest]
        assert before / total < policy.coverage - SCORE_MARGIN and held / total > policy.coverage + SCORE_MARGIN


def check(world: World, prompt: Prompt, policy: Policy, **params: Any) -> Result:
    """Serve the prompt and compare with the reference; returns what the reference says."""
    segments = world.segments(prompt)
    got, report = world.serve(prompt, **params)
    want = world.reference.run(prompt.tokens, segments, policy)
    check_margin(policy, want, segments)
    selected, tail = int(want.selected.sum()), len(prompt.tokens) - prompt.pieces[-1].stop
    check_counts(report, prompt, selected)
    assert report["cost"] == pytest.approx(
        cost(policy, world.reference.layers, prompt.matched, selected, tail), abs=1e-4
    )
    assert far(got, log_probabilities(want)) < BOUND
    assert far(got, got.new_zeros(())) > 1, "a distribution, not a constant"
    return want


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", ["relay", *POLICIES])
def test_next_token_distribution(world: World, policy: str, case: str) -> None:
    if case not in world.setting.cases:
        pytest.skip(ENOUGH)
    prompt = world.prompt(CASES[case])
    selected = int(check(world, prompt, world.policy(policy), relay_policy=policy).selected.sum())
    if policy == "relay":
        assert len(prompt.pieces) * world.setting.relay.suffix < selected < prompt.matched


@pytest.mark.parametrize(
    ("name", "budget", "policy"),
    [
        ("legolink", 5, LegoLink(5)),
        ("legolink", 64, LegoLink(64)),
        ("cacheblend", 0.4, CacheBlend(0.4)),
        ("cacheblend", 0.001, CacheBlend(0.001)),
        ("probe", 0.05, Probe(0.05)),
        ("probe", 0.45, Probe(0.45)),
        ("probe", "fast", Probe(0.1)),
        ("probe", "coverage:0.6", Probe(coverage=0.6)),
        ("probe", "coverage:0.95", Probe(coverage=0.95)),
    ],
)
def test_budget(world: World, name: str, budget: int | float | str, policy: Policy) -> None:
    if world.setting is not TINY:
        pytest.skip("the selection does not depend on the model")
    want = check(world, world.prompt(CASES["three"]), policy, relay_policy=name, relay_budget=budget)
    assert 0 < int(want.selected.sum()) < CASES["three"].reused


def test_probe_is_the_default_and_leaves_long_suffixes_to_full_prefill(world: World) -> None:
    """At .3 for a model without a certificate. It declines 64 fresh tokens behind 64 reused ones, and takes 63."""
    if world.setting is not TINY:
        pytest.skip("the decision does not depend on the model")
    cuts = [Cut(1, 20, 64, 8)]
    check(world, world.prompt(Case(cuts, 63)), Probe(0.3))
    prompt = world.prompt(Case(cuts, 64))
    got, report = world.serve(prompt)
    assert report["declined"] == "long_suffix", report
    assert (report["relayed"], report["recomputed"], report["segments"]) == (0, 0, 0), report
    assert far(got, log_probabilities(world.reference.prefill(prompt.tokens))) < BOUND


@pytest.mark.parametrize("budget", [0.2, 0.25])
def test_budget_keeps_the_suffix_and_the_largest_deviations(world: World, budget: float) -> None:
    if world.setting is not TINY:
        pytest.skip("the selection does not depend on the model")
    prompt = world.prompt(CASES["middle"])
    segments = world.segments(prompt)
    got, report = world.serve(prompt, relay_policy="relay", relay_budget=budget)
    relay = world.setting.relay
    measured = world.reference.run(prompt.tokens, segments, relay)
    check_margin(relay, measured, segments)
    deviation = measured.measured[segments[0].start : segments[0].stop]
    inner = deviation[: -relay.suffix].sort(descending=True).values
    kept = int(budget * prompt.matched) - relay.suffix
    assert 0 < kept < int((inner >= relay.tau_dev * deviation.mean()).sum()), "the budget should be what limits"
    # The threshold that lets exactly as many tokens pass as the budget leaves beside the suffix.
    assert float(inner[kept - 1] - inner[kept]) > MARGIN, "choose another seed"
    between = float((inner[kept - 1] + inner[kept]) / 2 / deviation.mean())
    want = world.reference.run(prompt.tokens, segments, relay._replace(tau_dev=between))
    check_counts(report, prompt, relay.suffix + kept)
    assert far(got, log_probabilities(want)) < BOUND


@pytest.mark.parametrize("policy", ["rotate", "relay", "cacheblend", "probe", "probe_only"])
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
    check_margin(world.policy(policy), want, segments)
    check_counts(report, third, int(want.selected.sum()))
    assert far(got, log_probabilities(want)) < BOUND


@pytest.mark.parametrize("policy", ["rotate", "relay", "legolink", "cacheblend", "probe"])
def test_mutations_would_be_caught(world: World, policy: str) -> None:
    if world.setting is SMOLLM2 and policy != "relay":
        pytest.skip(ENOUGH)
    prompt = world.prompt(CASES["three"] if policy != "probe" else SPREAD)
    segments = world.segments(prompt)
    got, _ = world.serve(prompt, relay_policy=policy)
    right = world.policy(policy)
    assert far(got, log_probabilities(world.reference.run(prompt.tokens, segments, right))) < BOUND
    for mutation in get_args(Mutation):
        if isinstance(right, SPOILS.get(mutation, Policy)):
            wrong = world.reference.run(prompt.tokens, segments, right, mutation)
            assert far(got, log_probabilities(wrong)) > CLEAR, mutation


def logged_chunks(server: Server, begin: int) -> list[int]:
    """New tokens of the two chunks, as the log from ``begin`` on has them; the last one may come after its answer."""
    for _ in range(100):
        chunks = re.findall(r"Prefill batch.*#new-token: (\d+)", server.log()[begin:])
        if len(chunks) > 1:
            break
        time.sleep(0.1)
    return [int(chunk) for chunk in chunks]


def test_probe_in_chunks(tmp_path: Path) -> None:
    """The first chunk ends within the third segment."""
    model = make_tiny_llama(tmp_path)
    env = {"SGLANG_RELAY_PROBE_QUERIES": "12", **NO_AUDIT}
    args = ("--radix-cache-backend", "relay", "--dtype", "float32", "--chunked-prefill-size", 160)
    with Server(model, *args, "--max-total-tokens", 8192, env=env) as server:
        world = World(TINY, server, Reference(model))
        prompt = world.prompt(CASES["three"]._replace(tail=50))
        segments, begin = world.segments(prompt), len(server.log())
        got, report = world.serve(prompt, relay_policy="probe")
        first, last = logged_chunks(server, begin)
    assert first + last == len(prompt.tokens) and segments[2].start < first - 1 < segments[2].stop - 1
    policy = Probe(queries=12, chunks=(first,))
    want = world.reference.run(prompt.tokens, segments, policy)
    check_margin(policy, want, segments)
    selected, reused = int(want.selected.sum()), prompt.matched - 1
    assert report["declined"] is None, report
    assert (report["relayed"], report["recomputed"]) == (reused - selected, selected), report
    assert (report["exact"], report["fresh"]) == (0, len(prompt.tokens) - reused), report
    again = first - segments[0].start - sum(min(s.stop, first - 1) - s.start for s in segments)
    rows, layers = selected + 12 + again, world.reference.layers
    assert again > 0 and report["cost"] == pytest.approx(rows * (layers - 0.9) / reused / layers, abs=1e-4)
    assert far(got, log_probabilities(want)) < BOUND
    at_once = world.reference.run(prompt.tokens, segments, Probe(queries=12))
    assert far(got, log_probabilities(at_once)) > CLEAR, "the border should matter"
