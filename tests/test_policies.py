"""Policies: what they select, and what they say it costs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_relay.config import POLICIES, LayerRange
from sglang_relay.policies import Policy, SelectionView, make_policy

LAYERS = 12
RANGE = LayerRange(1, 3, 8)


def policy(name: str = "relay", layers: LayerRange = RANGE, tau_dev: float = 1.5, suffix: int = 0) -> Policy:
    return make_policy(name, num_layers=LAYERS, layers=layers, tau_dev=tau_dev, suffix=suffix)


def view(
    deviation: list[float], *, first: int = 100, end: int | None = None, budget: float | None = None
) -> SelectionView:
    n = len(deviation)
    positions = torch.arange(first, first + n)
    return SelectionView(torch.tensor(deviation), positions, first + n if end is None else end, budget)


def chosen(selection: torch.Tensor) -> list[int]:
    assert selection.dtype == torch.bool
    return torch.nonzero(selection).flatten().tolist()


@pytest.mark.parametrize("name", POLICIES)
def test_layers_of_every_policy_are_a_staircase(name: str) -> None:
    p = policy(name)
    assert p.name == name
    assert 0 <= p.whole <= p.until <= LAYERS
    assert 0.0 <= p.expected_share() <= 1.0
    assert p.exact == (name == "full")
    assert p.selects == (name == "relay")


def test_rotate_repairs_nothing_and_full_everything() -> None:
    v = view([0.1, 0.9, 0.3], budget=0.4)
    assert chosen(policy("rotate").select(v)) == []
    assert chosen(policy("full").select(v)) == [0, 1, 2]
    assert policy("rotate").expected_share() == 0
    assert policy("full").expected_share() == 1


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
    assert whole / LAYERS <= p.expected_share() <= until / LAYERS


def test_threshold_is_a_multiple_of_the_segments_own_mean() -> None:
    deviation = [0.1, 0.1, 0.1, 0.1, 0.6]  # mean 0.2
    assert chosen(policy(tau_dev=1.5).select(view(deviation))) == [4]
    assert chosen(policy(tau_dev=0.4).select(view(deviation))) == [0, 1, 2, 3, 4]
    assert chosen(policy(tau_dev=3.1).select(view(deviation))) == []
    assert chosen(policy(tau_dev=1.5).select(view([d * 1e-3 for d in deviation]))) == [4]


def test_a_token_at_the_threshold_is_selected() -> None:
    assert chosen(policy(tau_dev=1.0).select(view([0.25] * 4))) == [0, 1, 2, 3]
    assert chosen(policy(tau_dev=1.5).select(view([0.75, 0.25, 0.5, 0.5]))) == [0]


def test_suffix_is_always_selected() -> None:
    deviation = [0.5] + [0.1] * 9
    assert chosen(policy(suffix=3).select(view(deviation))) == [0, 7, 8, 9]
    assert chosen(policy(suffix=99).select(view(deviation))) == list(range(10))


def test_suffix_belongs_to_the_whole_segment_not_to_the_chunk() -> None:
    """A segment that ends at 110, cut by chunks at 104 and 108."""
    p = policy(tau_dev=1e6, suffix=4)
    first = view([0.1] * 4, first=100, end=110)
    second = view([0.1] * 4, first=104, end=110)
    third = view([0.1] * 2, first=108, end=110)
    assert chosen(p.select(first)) == []
    assert chosen(p.select(second)) == [2, 3]
    assert chosen(p.select(third)) == [0, 1]


def test_budget_keeps_the_suffix_first_then_the_largest() -> None:
    deviation = [0.9, 0.1, 0.8, 0.1, 0.7, 0.1, 0.1, 0.1, 0.1, 0.1]
    p = policy(tau_dev=1.0, suffix=2)
    assert chosen(p.select(view(deviation))) == [0, 2, 4, 8, 9]
    assert chosen(p.select(view(deviation, budget=0.4))) == [0, 2, 8, 9]
    assert chosen(p.select(view(deviation, budget=0.3))) == [0, 8, 9]
    assert chosen(p.select(view(deviation, budget=0.2))) == [8, 9]
    assert chosen(p.select(view(deviation, budget=0.1))) == [9]


def test_budget_adds_nothing_below_the_threshold() -> None:
    assert chosen(policy(tau_dev=1.5).select(view([0.9, 0.1, 0.1, 0.1], budget=1.0))) == [0]


def test_ties_go_to_the_earlier_position() -> None:
    assert chosen(policy(tau_dev=1.0).select(view([0.5] * 8, budget=0.375))) == [0, 1, 2]


def test_a_tiny_budget_still_repairs_one_token() -> None:
    assert chosen(policy(tau_dev=1.0).select(view([0.1, 0.1, 0.9, 0.1], budget=1e-6))) == [2]


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
    got = policy(tau_dev=tau, suffix=suffix).select(view(deviation, end=100 + n + beyond, budget=budget))
    # The mean of up to 40 eighths is rounded: what lies within its last bit may fall on either side.
    mean = torch.tensor(deviation).mean().item()
    tail = [i for i in range(n) if i >= n + beyond - suffix]
    keep = [i for i in range(n) if i in tail or torch.tensor(deviation[i]) >= tau * torch.tensor(mean)]
    if budget is not None:
        ranked = sorted(keep, key=lambda i: (0, -i) if i in tail else (1, -eighths[i], i))
        keep = sorted(ranked[: max(1, int(budget * n))])
    assert chosen(got) == keep
