"""Hidden states kept per KV slot, and segments that enter with them, on real servers against the fp64 reference."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from plugins import Inspector
from prompts import Cut, Prompt, random_tokens
from reference import Reference, Relay, Segment
from test_against_reference import (
    BOUND,
    CASES,
    NO_AUDIT,
    Case,
    Setting,
    World,
    check_counts,
    check_margin,
    far,
    log_probabilities,
)
from test_influence import ARGS, with_influence

from sglang_relay.engine.hidden import HiddenStates
from sglang_relay.measure.server import Server

POLICY = Relay(det=3, end=4, tau_dev=1.5, suffix=10, start=2)
ENV = {
    "SGLANG_RELAY_ENTRY": "hidden",
    "SGLANG_RELAY_LAYER_RANGE": "2,3,4",
    "SGLANG_RELAY_COST_MODEL": "false",
    **NO_AUDIT,
}


class Hidden(World):
    """A world whose segments carry their donors' hidden states."""

    def segments(self, prompt: Prompt) -> list[Segment]:
        cut = []
        for s in super().segments(prompt):
            entering = self._computed[s.donor].hidden
            if entering is None:
                entering = self.reference.hidden(self.donors[s.donor].path, 2)
            cut.append(s._replace(hidden=entering[s.source :][: s.stop - s.start]))
        return cut


@pytest.fixture(scope="module")
def world(model: Path, reference: Reference, inspector: Inspector) -> Iterator[Hidden]:
    with Server(model, *ARGS, "--max-total-tokens", 8192, env=ENV | inspector.env) as server:
        yield Hidden(Setting("hidden", POLICY, ()), server, reference)


def expected_cost(world: Hidden, reused: int, selected: int, first: int) -> float:
    layers = reused * (POLICY.det + 1 - first) + selected * (POLICY.end - POLICY.det)
    return layers / reused / world.reference.layers


def check(world: Hidden, prompt: Prompt) -> dict[str, Any]:
    segments = world.segments(prompt)
    got, report = world.serve(prompt, relay_policy="relay")
    want = world.reference.run(prompt.tokens, segments, POLICY)
    check_margin(POLICY, want, segments)
    selected = int(want.selected.sum())
    check_counts(report, prompt, selected)
    assert far(got, log_probabilities(want)) < BOUND
    assert report["entry"] == "hidden"
    assert report["cost"] == pytest.approx(expected_cost(world, prompt.matched, selected, 2), abs=1e-4)
    other = world.reference.run(prompt.tokens, segments, POLICY._replace(start=None))
    assert far(got, log_probabilities(other)) > 10 * BOUND, "the entry should matter"
    return report


@pytest.mark.parametrize("case", ["one", "three", "adjacent"])
def test_segments_enter_with_their_donors_hidden_states(world: Hidden, case: str) -> None:
    check(world, world.prompt(CASES[case]))


def test_a_donor_that_entered_with_hidden_states_itself(world: Hidden) -> None:
    second = world.prompt(CASES["two"])
    report = world.decode(second.tokens, world.segments(second), relay_policy="relay")
    assert report["depth"] == 1 and report["entry"] == "hidden", report
    third = world.prompt(Case([Cut(len(world.donors) - 1, 25, 72, 14), Cut(0, 3, 50, 5)], 6))
    assert check(world, third)["depth"] == 2


def test_without_a_state_the_batch_enters_at_the_embeddings(world: Hidden, inspector: Inspector) -> None:
    prompt = world.prompt(CASES["three"])
    piece = prompt.pieces[1]
    donor = world.donors[piece.donor]
    inspector.ask(world.server, "forget_hidden", tokens=donor.path[: piece.source + 7])
    segments = world.segments(prompt)
    got, report = world.serve(prompt, relay_policy="relay")
    policy = POLICY._replace(start=None)
    want = world.reference.run(prompt.tokens, segments, policy)
    check_margin(policy, want, segments)
    assert report["entry"] == "embeddings:not_held"
    assert report["cost"] == pytest.approx(expected_cost(world, prompt.matched, int(want.selected.sum()), 0), abs=1e-4)
    assert far(got, log_probabilities(want)) < BOUND


@pytest.mark.parametrize(
    "flags",
    [
        ("--max-total-tokens", 400),
        ("--enable-mixed-chunk", "--chunked-prefill-size", 48, "--page-size", 4, "--max-total-tokens", 4096),
    ],
    ids=["evicted", "mixed"],
)
def test_every_slot_holds_the_state_of_its_own_token(
    model: Path, reference: Reference, tmp_path: Path, flags: tuple
) -> None:
    inspector, rng = Inspector(tmp_path), random.Random(3)
    prompts = [random_tokens(rng.randint(20, 90), rng, reference.config["vocab_size"]) for _ in range(8)]
    with Server(model, *ARGS, *flags, env=ENV | inspector.env) as server:

        def decode(prompt: list[int]) -> list[int]:
            answer = server.generate(prompt, max_new_tokens=50, ignore_eos=True, custom_params={"relay": "exact"})
            return [*prompt, *answer["output_ids"]]

        def compare(path: list[int]) -> None:
            got = inspector.hidden(server, path)
            assert len(path) - 4 <= len(got) and None not in got
            want = reference.hidden(path, 2)[: len(got)]
            assert far(torch.tensor(got, dtype=torch.float64), want) < 1e-4 < float(want.abs().max())

        if "--enable-mixed-chunk" in flags:
            with ThreadPoolExecutor(8) as pool:
                for path in list(pool.map(decode, prompts)):
                    compare(path)
        else:
            for prompt in prompts:
                compare(decode(prompt))
        state = server.get("/server_info")["internal_states"][0]["relay"]["hidden"]
        assert state["layer"] == 2 and state["bytes"] >= flags[-1] * 4 * reference.config["hidden_size"]


def test_copied_tokens_hold_none(model: Path, tmp_path: Path) -> None:
    """Their slots held the states of other tokens before."""
    inspector, rng = Inspector(tmp_path), random.Random(4)
    with Server(model, *ARGS, "--max-total-tokens", 1024, env=ENV | inspector.env) as server:
        server.generate(random_tokens(900, rng, 1024), max_new_tokens=100, ignore_eos=True)
        server.post("/flush_cache")
        text = server.generate(random_tokens(30, rng, 1024), max_new_tokens=101, ignore_eos=True)["output_ids"][:100]
        prompt = [*random_tokens(20, rng, 1024), *text, *random_tokens(9, rng, 1024)]
        report = server.generate(prompt, max_new_tokens=1, custom_params={"relay_policy": "rotate"})["meta_info"][
            "relay"
        ]
        assert report["relayed"] == 100, report
        got = inspector.hidden(server, prompt, namespace={"tier": "rotate"})
        assert [state is None for state in got] == [False] * 20 + [True] * 100 + [False] * 9


@pytest.mark.slow
def test_two_ranks_with_influence_too(model: Path, reference: Reference) -> None:
    """Each rank has some heads: their influence is added up, the hidden states are the same."""
    env = {**ENV, "SGLANG_RELAY_INFLUENCE": "auto", "SGLANG_ENABLE_RANK_CONSENSUS_CHECKER": "1"}
    with Server(model, *ARGS, "--tp-size", 2, "--max-total-tokens", 4096, env=env) as server:
        world = Hidden(Setting("ranks", POLICY, ()), server, reference)
        prompt = world.prompt(CASES["three"])
        segments = with_influence(world, world.segments(prompt))
        got, report = world.serve(prompt, relay_policy="relay")
    policy = POLICY._replace(tau_inf=1.45)
    want = reference.run(prompt.tokens, segments, policy)
    check_margin(policy, want, segments)
    assert int(want.selected.sum()) > int(reference.run(prompt.tokens, segments, POLICY).selected.sum())
    check_counts(report, prompt, int(want.selected.sum()))
    assert (report["entry"], report["influence"]) == ("hidden", "used")
    assert far(got, log_probabilities(want)) < BOUND


def test_slots_that_cannot_be_marked_hold_nothing() -> None:
    """It happens before a forward: what is raised there would end the scheduler."""
    layer, keys = torch.nn.Identity(), torch.zeros(8, 1, 4)
    runner = SimpleNamespace(
        token_to_kv_pool=SimpleNamespace(k_buffer=[keys]),
        model_config=SimpleNamespace(hidden_size=4),
        model=SimpleNamespace(model=SimpleNamespace(layers=[layer])),
    )
    failures: list[str] = []
    kept = HiddenStates(runner, 0, lambda where, error: failures.append(where) or where)
    kept.held.fill_(True)
    kept.begin(SimpleNamespace(out_cache_loc=torch.tensor([2, 99])))  # type: ignore[arg-type]
    assert failures == ["hidden_states"]
    assert not kept.held.any()
