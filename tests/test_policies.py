"""Policies: what they select, and what they say it costs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_relay.budget import Budget
from sglang_relay.config import POLICIES, LayerRange, RelayConfig
from sglang_relay.policies import Policy, PromptView, make_policies

LAYERS = 12
RANGE = LayerRange(1, 3, 8)


def policy(name: str = "relay", layers: LayerRange = RANGE, **settings: Any) -> Policy:
    config = RelayConfig(layer_range=layers, **{"suffix": 0, **settings})
    return make_policies(config, LAYERS)[name]


def view(*segments: list[float], beyond: int = 0) -> PromptView:
    """Each segment's signal; the last one goes on ``beyond`` its tokens."""
    offsets, index, left, signal = [0], [], [], []
    for number, segment in enumerate(segments):
        n, more = len(segment), beyond if number == len(segments) - 1 else 0
        offsets.append(offsets[-1] + n)
        index += range(n)
        left += range(n + more, more, -1)
        signal += segment
    return PromptView(tuple(offsets), torch.tensor(index), torch.tensor(left), torch.tensor(signal))


def chosen(selection: torch.Tensor) -> list[int]:
    assert selection.dtype == torch.bool
    return torch.nonzero(selection).flatten().tolist()


def share(amount: float) -> Budget:
    return Budget("share", amount)


@pytest.mark.parametrize("name", POLICIES)
def test_layers_of_every_policy_are_a_staircase(name: str) -> None:
    p = policy(name)
    assert p.name == name
    assert 0 <= p.whole <= p.until <= LAYERS
    assert 0.0 <= p.expected_share(p.default_budget) <= 1.0
    assert p.exact == (name == "full")
    if p.signal == "none":
        assert p.whole in (0, LAYERS)
    if p.signal == "deviation":
        assert p.whole > 0
    if p.default_budget is not None:
        assert p.default_budget.kind in p.budgets


def test_rotate_repairs_nothing_and_full_everything() -> None:
    v = view([0.1, 0.9, 0.3])
    assert chosen(policy("rotate").select(v, None)) == []
    assert chosen(policy("full").select(v, None)) == [0, 1, 2]
    assert policy("rotate").expected_share(None) == 0
    assert policy("full").expected_share(None) == 1


# ---------------------------------------------------------------------- relay


@pytest.mark.parametrize(
    ("layers", "whole", "until"),
    [(LayerRange(1, 3, 8), 4, 9), (LayerRange(0, 0, 0), 1, 1), (LayerRange(0, 11, 11), 12, 12)],
)
def test_relay_runs_whole_segments_up_to_and_including_the_detection_layer(
    layers: LayerRange, whole: int, until: int
) -> None:
    p = policy(layers=layers)
    assert (p.whole, p.until) == (whole, until)
    # All tokens through `whole` layers, some of them on to `until`.
    assert whole / LAYERS <= p.expected_share(None) <= until / LAYERS


def test_relay_at_the_last_layer_is_still_no_exact_policy() -> None:
    assert not policy(layers=LayerRange(0, 11, 11)).exact


def test_threshold_is_a_multiple_of_the_segments_mean() -> None:
    # Mean 0.25: the threshold is 0.375.
    assert chosen(policy(tau_dev=1.5).select(view([0.375, 0.25, 0.374, 0.001]), None)) == [0]


def test_each_segment_has_a_threshold_of_its_own() -> None:
    quiet, loud = [0.1, 0.01, 0.01, 0.01], [0.9, 0.8, 0.9, 0.8]
    assert chosen(policy(tau_dev=1.5).select(view(quiet, loud), None)) == [0]
    assert chosen(policy(tau_dev=1.5).select(view(quiet + loud), None)) == [4, 5, 6, 7]


def test_equal_deviations_are_all_below_a_threshold_above_one() -> None:
    assert chosen(policy(tau_dev=1.5).select(view([0.5] * 5), None)) == []
    assert chosen(policy(tau_dev=1.0).select(view([0.5] * 5), None)) == [0, 1, 2, 3, 4]


def test_suffix_is_counted_from_the_end_of_the_whole_segment() -> None:
    p = policy(suffix=2, tau_dev=100)
    assert chosen(p.select(view([0.1] * 4), None)) == [2, 3]
    assert chosen(p.select(view([0.1] * 4, beyond=1), None)) == [3]
    assert chosen(p.select(view([0.1] * 4, beyond=2), None)) == []
    assert chosen(p.select(view([0.1] * 3, [0.1] * 3), None)) == [1, 2, 4, 5]


def test_budget_keeps_the_suffix_first_then_the_largest() -> None:
    deviation = [0.9, 0.1, 0.8, 0.1, 0.7, 0.1, 0.1, 0.1, 0.1, 0.1]
    p = policy(tau_dev=1.0, suffix=2)
    assert chosen(p.select(view(deviation), None)) == [0, 2, 4, 8, 9]
    assert chosen(p.select(view(deviation), share(0.4))) == [0, 2, 8, 9]
    assert chosen(p.select(view(deviation), share(0.3))) == [0, 8, 9]
    assert chosen(p.select(view(deviation), share(0.2))) == [8, 9]
    assert chosen(p.select(view(deviation), share(0.1))) == [9]
    assert chosen(p.select(view(deviation), Budget("tokens", 3))) == [0, 8, 9]


NONE = float("nan")


def with_influence(v: PromptView, influence: list[float]) -> PromptView:
    return replace(v, influence=torch.tensor(influence))


def test_high_influence_selects_beside_high_deviation() -> None:
    p = policy(tau_dev=1.5, tau_inf=1.45)
    v = view([0.9, 0.1, 0.1, 0.1, 0.1])
    assert chosen(p.select(v, None)) == [0]
    # Mean 2: the threshold is 2.9.
    assert chosen(p.select(with_influence(v, [1.0, 2.9, 2.8, 3.3, 0.0]), None)) == [0, 1, 3]
    assert chosen(policy("cacheblend").select(with_influence(v, [1.0, 2.9, 2.8, 3.3, 0.0]), share(0.2))) == [0]


def test_tokens_without_influence_are_no_part_of_its_mean() -> None:
    p = policy(tau_dev=100, tau_inf=1.45)
    assert chosen(p.select(with_influence(view([0.1] * 4), [NONE, 1.0, 3.0, NONE]), None)) == [2]
    assert chosen(p.select(with_influence(view([0.1] * 3), [NONE] * 3), None)) == []
    assert chosen(p.select(with_influence(view([0.1] * 3), [0.0] * 3), None)) == []
    assert chosen(p.select(with_influence(view([0.1] * 3), [NONE] * 3), share(0.4))) == []


def test_influence_has_a_threshold_per_segment() -> None:
    p = policy(tau_dev=100, tau_inf=1.45)
    v = view([0.1] * 3, [0.1] * 3)
    assert chosen(p.select(with_influence(v, [1.0, 1.0, 4.0, 70.0, 10.0, 10.0]), None)) == [2, 3]


def test_budget_keeps_what_exceeds_either_threshold_by_the_largest_factor() -> None:
    p = policy(tau_dev=1.0, tau_inf=1.0, suffix=1)
    # Means .25 and 1: factors 2.4, .4, .4, 2, .4, .4 and .5, .5, 3, 1.1, .5, .4.
    v = with_influence(view([0.6, 0.1, 0.1, 0.5, 0.1, 0.1]), [0.5, 0.5, 3.0, 1.1, 0.5, 0.4])
    assert chosen(p.select(v, None)) == [0, 2, 3, 5]
    assert chosen(p.select(v, Budget("tokens", 3))) == [0, 2, 5]
    assert chosen(p.select(v, Budget("tokens", 2))) == [2, 5]


def test_budget_adds_nothing_below_the_threshold() -> None:
    assert chosen(policy(tau_dev=1.5).select(view([0.9, 0.1, 0.1, 0.1]), share(1.0))) == [0]


def test_ties_go_by_position() -> None:
    assert chosen(policy(tau_dev=1.0).select(view([0.5] * 8), share(0.375))) == [0, 1, 2]


def test_a_tiny_budget_still_repairs_one_token() -> None:
    assert chosen(policy(tau_dev=1.0).select(view([0.1, 0.1, 0.9, 0.1]), share(1e-6))) == [2]


@given(
    # Eighths: sums and means are exact, and ties are frequent.
    st.lists(st.integers(0, 16), min_size=1, max_size=40),
    st.integers(0, 8),
    st.integers(0, 50),
    st.integers(0, 20),
    st.one_of(st.none(), st.integers(1, 64)),
)
def test_selection_is_its_definition(
    eighths: list[int], tau_quarters: int, suffix: int, beyond: int, budget_64: int | None
) -> None:
    n, tau = len(eighths), tau_quarters / 4
    deviation = [e / 8 for e in eighths]
    budget = None if budget_64 is None else budget_64 / 64
    p = policy(tau_dev=tau, suffix=suffix)
    got = p.select(view(deviation, beyond=beyond), None if budget is None else share(budget))
    # The mean of up to 40 eighths is rounded: what lies within its last bit may fall on either side.
    mean = torch.tensor(deviation).mean().item()
    tail = [i for i in range(n) if i >= n + beyond - suffix]
    keep = [i for i in range(n) if i in tail or torch.tensor(deviation[i]) >= tau * torch.tensor(mean)]
    if budget is not None:
        ranked = sorted(keep, key=lambda i: (0, -i) if i in tail else (1, -eighths[i], i))
        keep = sorted(ranked[: max(1, int(budget * n))])
    assert chosen(got) == keep


# ---------------------------------------------------------------------- cacheblend, legolink, probe


def test_cacheblend_ranks_all_segments_together() -> None:
    p = policy("cacheblend")
    assert (p.whole, p.detect, p.until) == (1, 1, LAYERS)
    assert chosen(p.select(view([0.1, 0.9, 0.1, 0.1], [0.8, 0.7, 0.2, 0.1]), share(0.375))) == [1, 4, 5]
    assert p.expected_share(share(0.3)) == pytest.approx((1.1 + 0.3 * 11) / 12)


def test_cacheblend_runs_the_one_dense_layer_that_was_published() -> None:
    """.1736 at a share of .15 in 36 layers; what K and V of layer 1 take is a tenth of a layer more."""
    published = (1 + 0.15 * 35) / 36
    assert published == pytest.approx(0.1736, abs=1e-4)
    in_36 = make_policies(RelayConfig(), 36)["cacheblend"]
    assert in_36.expected_share(None) == pytest.approx(published + 0.1 / 36)
    assert make_policies(RelayConfig(), 1)["cacheblend"].exact


def test_legolink_takes_the_first_tokens_of_each_text() -> None:
    p = policy("legolink")
    assert chosen(p.select(view([0.0] * 5, [0.0] * 3), Budget("tokens", 2))) == [0, 1, 5, 6]
    assert chosen(p.select(view([0.0] * 20), p.default_budget)) == list(range(16))
    # A run that goes on with the same text has no first tokens of its own.
    v = view([0.0] * 3)
    goes_on = PromptView(v.offsets, v.index + 40, v.left, None)
    assert chosen(p.select(goes_on, Budget("tokens", 16))) == []


@pytest.mark.parametrize(("name", "less", "more"), [("probe_only", 1.32, 1.34), ("probe", 1.74, 1.79)])
def test_probe_ranks_by_score_and_nearness_to_the_texts_start(name: str, less: float, more: float) -> None:
    p = policy(name)
    assert (p.whole, p.until) == (0, LAYERS)
    assert chosen(p.select(view([1.0] * 6, [1.0] * 6), share(0.34))) == [0, 1, 6, 7]
    # (0 + 4) ** -.35 = .616 and (5 + 4) ** -.35 = .463: the last token needs a third more, or its square where the
    # score's root counts.
    assert chosen(p.select(view([1.0, 0, 0, 0, 0, less]), Budget("tokens", 2)))[0] == 0
    assert chosen(p.select(view([1.0, 0, 0, 0, 0, less]), share(0.17))) == [0]
    assert chosen(p.select(view([1.0, 0, 0, 0, 0, more]), share(0.17))) == [5]


def test_probe_budgets() -> None:
    p = policy("probe")
    flat = view([1.0] * 10, [1.0] * 10)
    assert len(chosen(p.select(flat, Budget("tokens", 3)))) == 6, "per segment"
    assert len(chosen(p.select(flat, share(0.2)))) == 4
    assert p.expected_share(share(0.3)) == pytest.approx(0.3)


@given(st.lists(st.floats(0, 10, width=32), min_size=1, max_size=50), st.integers(1, 20))
def test_coverage_takes_tokens_by_rank_until_they_carry_the_mass(signal: list[float], twentieths: int) -> None:
    """Under ``probe_only`` the fewest tokens; ``probe`` ranks by the root of the score."""
    want = twentieths / 20
    v = view(signal)
    prior = (v.index + 4).float() ** -0.35
    mass = (torch.tensor(signal, dtype=torch.float32) * prior).double()
    total = float(mass.sum())
    for name, rank in (("probe_only", mass.float()), ("probe", torch.tensor(signal).sqrt() * prior)):
        kept = chosen(policy(name).select(v, Budget("coverage", want)))
        if total == 0:
            assert kept == []
            continue
        by_rank = sorted(kept, key=lambda i: -rank[i])
        assert float(mass[by_rank].sum()) >= want * total * (1 - 1e-9)
        assert float(mass[by_rank[:-1]].sum()) < want * total * (1 + 1e-9)
        smallest = min(rank[i] for i in kept)
        assert all(rank[i] <= smallest for i in range(len(signal)) if i not in kept)
