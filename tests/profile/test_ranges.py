"""The layer-range profiler on deviation fields whose range is known, and the field on values whose angles are known."""

from __future__ import annotations

import numpy as np
import pytest

from sglang_relay.config import LayerRange
from sglang_relay.profile.deviation import deviation, rank_correlations
from sglang_relay.profile.ranges import find_ranges


def field(means: list[float], *, keep: list[float] | None = None, tokens: int = 4000, seed: int = 0) -> np.ndarray:
    """A field whose layers have the mean deviations ``means``. ``keep[l]``: how much of layer l-1's ranking of tokens
    layer l keeps (the correlation of the Gaussian scores behind the ranks); all of it by default."""
    rng = np.random.default_rng(seed)
    keep = keep or [1.0] * len(means)
    score = rng.standard_normal(tokens)
    layers = []
    for mean, kept in zip(means, keep, strict=True):
        score = kept * score + np.sqrt(1 - kept**2) * rng.standard_normal(tokens)
        spread = np.exp(score)
        layers.append(mean * spread / spread.mean())
    return np.stack(layers, axis=1)


# Shallow to layer 2, lowest at layer 6. The last five have mean .00868 and deviation .00043: settled are layers of at
# most .00911 that moved by less than .00086, so layers 10 and 11 are, and 9 (.0098) is not.
SHALLOW_THEN_DEEP = [0.001, 0.004, 0.009, 0.02, 0.03, 0.045, 0.055, 0.045, 0.03]
U = [*SHALLOW_THEN_DEEP, 0.0098, 0.0090, 0.0088, 0.0080, 0.0092, 0.0084, 0.0090]
# Correlations of adjacent rankings, 0 to 15: they climb with a knee: the slope is steepest from layer 4 to 5.
KNEE = [0.0, 0.3, 0.32, 0.36, 0.45, 0.8, 0.93, 0.95, *[0.96] * 8]


def test_a_u_has_its_shallow_run_its_knee_and_its_recovery() -> None:
    found = find_ranges(field(U, keep=KNEE))
    assert found.layers == LayerRange(2, 6, 9)
    assert found.start == "last of the first 3 layers with similarity 0.99 or more"
    assert found.detect.startswith("the rank correlation's curvature turns negative behind layer 5")
    assert "lowest is layer 6" in found.end
    assert found.similarity == pytest.approx([1 - d for d in U], abs=1e-9)


def test_curves_are_the_paper_s() -> None:
    found = find_ranges(field(U, keep=KNEE))
    assert np.isnan(found.rho[0]) and np.isnan(found.curvature[:3]).all()
    for layer in (3, 8, 15):
        expected = found.rho[layer] - 2 * found.rho[layer - 1] + found.rho[layer - 2]
        assert found.curvature[layer] == pytest.approx(expected, abs=1e-12)


def test_without_a_shallow_run_it_starts_at_the_first_layer() -> None:
    found = find_ranges(field([0.02, *U[1:]], keep=KNEE))
    assert found.layers.start == 0 and "no shallow run" in found.start


def test_a_single_shallow_layer_is_where_it_starts() -> None:
    assert find_ranges(field([0.001, *U[3:]], keep=KNEE[:14])).layers.start == 0
    assert find_ranges(field([0.001, 0.002, *U[3:]], keep=KNEE[:15])).layers.start == 1


def test_a_later_shallow_layer_does_not_count() -> None:
    assert find_ranges(field([0.001, 0.02, 0.001, *U[3:]], keep=KNEE)).layers.start == 0


@pytest.mark.parametrize(
    "deep",
    [
        [0.03, 0.04, 0.05, 0.06, 0.07, 0.08],  # falls to the last layer, as SmolLM2 does
        [0.05, 0.05, 0.0501, 0.05, 0.0501, 0.05],  # stays where it fell to
        [0.05, 0.045, 0.04, 0.038, 0.037, 0.036],  # comes back a little
    ],
)
def test_without_recovery_the_range_ends_with_the_last_layer(deep: list[float]) -> None:
    means = [*U[:5], *deep]
    found = find_ranges(field(means, keep=KNEE[: len(means)]))
    assert found.layers.end == len(means) - 1
    assert found.end.startswith("no recovery")


def test_a_recovery_that_never_settles_ends_with_the_last_layer() -> None:
    means = [0.001, 0.001, 0.03, 0.05, 0.06, 0.02, 0.05, 0.005, 0.05, 0.005]
    found = find_ranges(field(means))
    assert found.layers.end == 9


def test_a_flat_tail_without_any_spread_is_settled() -> None:
    found = find_ranges(field([*SHALLOW_THEN_DEEP, *[0.008] * 7], keep=KNEE))
    assert found.layers.end == 9, "layer 9 has just moved, 10 and 11 have not"


def test_what_is_settled_before_the_lowest_layer_does_not_end_the_range() -> None:
    means = [0.001, 0.001, 0.011, 0.009, 0.0089, 0.0088, *U[5:]]
    found = find_ranges(field(means)).layers
    assert (found.start, found.end) == (1, 10)


def test_curvature_that_stays_positive_has_not_turned() -> None:
    found = find_ranges(field(U, keep=KNEE, tokens=40_000))
    assert found.curvature[4] > 0.03 and found.curvature[5] > 0 and found.layers.detect == 6


def test_noise_has_no_knee() -> None:
    # Rankings that keep nothing: every correlation is sampling noise around 0, and so is every turn of its curvature.
    within = 0
    for seed in range(100):
        found = find_ranges(field(U, keep=[0.0] * 16, tokens=200, seed=seed))
        if found.detect.startswith("curvature is within its noise and no ranking is stable"):
            assert found.layers.detect == found.layers.start + 2
            within += 1
        assert found.layers.start <= found.layers.detect <= found.layers.end
    assert within > 75


def test_a_stable_ranking_is_taken_where_curvature_says_nothing() -> None:
    found = find_ranges(field(U, keep=[0.0, *[0.99] * 15], tokens=300, seed=3))
    assert "curvature is within its noise; first layer" in found.detect
    assert found.layers.detect == 2, "the first layer of the range"


def test_a_model_that_does_not_deviate_has_an_early_detection() -> None:
    found = find_ranges(field([0.001] * 12))
    assert found.layers.start == 0 and found.layers.detect <= 2 and found.layers.end == 11
    assert "no layer deviates" in found.start and "no layer deviates" in found.end


def test_monotone_loss_with_no_shallow_run() -> None:
    found = find_ranges(field([0.02 + 0.005 * layer for layer in range(20)]))
    assert (found.layers.start, found.layers.end) == (0, 19)


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
def test_small_models_have_a_range(layers: int) -> None:
    for means in ([0.001] * layers, [0.05] * layers, [0.001, 0.05, 0.05, 0.02, 0.001][:layers]):
        r = find_ranges(field(means, tokens=50)).layers
        assert 0 <= r.start <= r.detect <= r.end < layers


@pytest.mark.parametrize("bad", [np.zeros((2, 4)), np.zeros((5, 0)), np.zeros(5), np.full((5, 4), np.nan)])
def test_what_is_no_field_is_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="a field of shape"):
        find_ranges(bad)


def test_the_first_layer_may_rank_nothing() -> None:
    d = field(U, keep=KNEE)
    d[:, 0] = 0.0
    found = find_ranges(d)
    assert found.rho[1] == 0.0 and found.layers == LayerRange(2, 6, 9)


def test_deviation_is_one_minus_the_mean_cosine() -> None:
    rng = np.random.default_rng(0)
    full = rng.standard_normal((2, 5, 3, 8)).astype(np.float16)
    other = full.copy()
    other[1, 2] *= 3  # length does not count
    other[0, 1, 0] *= -1  # one head of three turned around
    orthogonal = full[1, 4, 1].copy()
    other[1, 4, 1, 0::2], other[1, 4, 1, 1::2] = -orthogonal[1::2], orthogonal[0::2]
    d = deviation(other, full)
    expected = np.zeros((5, 2))
    expected[1, 0], expected[4, 1] = 2 / 3, 1 / 3
    assert d.shape == (5, 2) and d.dtype == np.float32
    assert d == pytest.approx(expected, abs=1e-6)


def test_vectors_without_length() -> None:
    full = np.ones((1, 2, 1, 4))
    full[0, 0] = 0
    reused = np.ones((1, 2, 1, 4))
    assert deviation(reused, full).tolist() == [[1.0], [0.0]]
    reused[0, 0] = 0
    assert deviation(reused, full).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 5, 12)])
def test_values_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="values of shapes"):
        deviation(np.ones(shape), np.ones((2, 5, 3, 8)) if len(shape) == 4 else np.ones(shape))


def test_rank_correlations_are_spearman_s() -> None:
    from scipy.stats import spearmanr

    d = np.round(field(U[:5], keep=[0, 0.2, 0.8, 0.5, 0.9], tokens=100), 3)  # rounded: ties
    for layer in range(1, 5):
        assert rank_correlations(d)[layer] == pytest.approx(spearmanr(d[:, layer], d[:, layer - 1])[0])
