"""The cost model on synthetic machines: what it learns, what it accepts, what it costs when it is wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import pytest

from sglang_relay.cost import (
    CALIBRATION_SECONDS,
    HALF_LIFE,
    KNEE,
    MARGIN,
    PRIOR,
    PUBLISH_EVERY,
    TRIAL_EVERY,
    WINDOW,
    Coefficients,
    CostModel,
    Features,
    Shape,
    calibrate,
    calibration_shapes,
    fit,
    pairs_of,
    relay_features,
    stock_features,
    together,
)

GPU = Coefficients(0.003, 26e-6, 8e-10, 0.013, 27e-6, 9e-10, 1e-7, 0.0)
"""An 8B model on an H100: 13 ms of host time for an eager pass."""
CPU = Coefficients(0.04, 2.6e-3, 5e-7, 0.09, 2.8e-3, 6e-7, 2e-5, 0.0)
"""A 135M model on one core."""
OVERLAP = Coefficients(0.0045, 26e-6, 8e-10, 0.005, 27e-6, 9e-10, 1e-7, 0.0)
"""As GPU, the host's time of a relay pass hidden behind the device's."""

Time = Callable[[list[Features]], float]


def linear(c: Coefficients, host: float = 0.0) -> Time:
    """Seconds of a forward, given pass by pass; a relay pass takes ``host`` seconds or more."""

    def seconds(passes: list[Features]) -> float:
        total = 0.0
        for f in passes:
            if f.path == "stock":
                total += f.passes * c.stock_pass + f.rows * c.stock_row + f.pairs * c.stock_pair
            else:
                device = f.passes * c.relay_pass + f.rows * c.relay_row + f.pairs * c.relay_pair
                total += max(device, f.passes * host) + f.placed * c.relay_place
        return total

    return seconds


class Noise:
    """Multiplies times by log-normal noise; a share ``outliers`` of them takes 3 to 10 times as long."""

    def __init__(self, seed: int, sigma: float = 0.08, outliers: float = 0.05) -> None:
        self.rng = np.random.default_rng(seed)
        self.sigma = sigma
        self.outliers = outliers

    def __call__(self, seconds: float) -> float:
        late = self.rng.uniform(3, 10) if self.rng.random() < self.outliers else 1.0
        return seconds * late * math.exp(self.sigma * self.rng.standard_normal())


class Prompt(NamedTuple):
    prefix: int
    stop: int
    segment: tuple[int, int]
    probe_rows: int

    def stock(self) -> Features:
        return stock_features(self.prefix, self.stop)

    def relay(self, repair: float) -> Features:
        return relay_features(self.prefix, self.stop, [self.segment], repair, probe_rows=self.probe_rows)

    def relay_passes(self, repair: float) -> list[Features]:
        """``relay(repair)`` pass by pass: the head and the probe rows first, then the rest."""
        whole = self.relay(repair)
        if not self.probe_rows:
            return [whole]
        rows = self.segment[0] - self.prefix + self.probe_rows
        pairs = pairs_of(self.prefix, self.segment[0]) + pairs_of(self.stop - self.probe_rows, self.stop)
        first = Features("relay", 1, rows, pairs, whole.placed)
        return [first, Features("relay", 1, whole.rows - rows, whole.pairs - pairs)]


def prompts(seed: int, low: int = 64, high: int = 8192) -> Iterator[Prompt]:
    """512 or so fresh tokens, a segment of ``low`` to ``high``, a question; behind a cached prefix or none."""
    rng = np.random.default_rng(seed)
    while True:
        head, reused = (int(math.exp(rng.uniform(*np.log(ends)))) for ends in ((16, 1024), (low, high)))
        prefix, tail = int(rng.choice([0, 0, 512, 4000])), int(rng.integers(24, 200))
        start = prefix + head
        yield Prompt(prefix, start + reused + tail, (start, start + reused), int(rng.choice([0, 24])))


def chain(reused: int, probe_rows: int = 24) -> Prompt:
    """The benchmark's prompt: 512 fresh tokens, ``reused`` ones, a question of 24."""
    return Prompt(0, 536 + reused, (512, 512 + reused), probe_rows)


def calibrated(machine: Time, seed: int, noise: Noise | None = None) -> CostModel:
    noise = noise or Noise(seed)
    return calibrate(lambda shape: noise(machine([shape.features()])))


def serve(model: CostModel, machine: Time, seed: int, forwards: int, share: float = 0.2) -> None:
    """Half of the forwards stock, half relayed, one prompt each."""
    noise = Noise(seed)
    for number, prompt in zip(range(forwards), prompts(seed), strict=False):
        if number % 2:
            due = model.observe(prompt.relay(share), noise(machine(prompt.relay_passes(share))))
        else:
            due = model.observe(prompt.stock(), noise(machine([prompt.stock()])))
        if due:
            model.publish()


def worst_error(model: CostModel, machine: Time, lengths: tuple[int, ...] = (128, 512, 2048, 8192)) -> float:
    errors = []
    for length, probe in itertools.product(lengths, (0, 24)):
        prompt = chain(length, probe)
        for features, passes in ((prompt.stock(), [prompt.stock()]), (prompt.relay(0.2), prompt.relay_passes(0.2))):
            errors.append(abs(model.predict(features) / machine(passes) - 1))
    return max(errors)


def break_even(accepts: Callable[[int], bool]) -> int:
    """Least number of reused tokens that is accepted."""
    low, high = 1, 1 << 16
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if accepts(middle) else (middle + 1, high)
    return low


# ---------------------------------------------------------------- features


def brute_pairs(rows: list[int]) -> int:
    return sum(row + 1 for row in rows)


def test_stock_features_count_every_row_and_its_keys() -> None:
    assert stock_features(100, 150) == ("stock", 1, 50, brute_pairs(list(range(100, 150))), 0)
    # rows * prefix + rows * (rows + 1) / 2
    assert stock_features(100, 150).pairs == 50 * 100 + 50 * 51 / 2
    assert [stock_features(0, stop, 64).passes for stop in (1, 64, 65, 129)] == [1, 1, 2, 3]


def test_rotate_computes_the_fresh_rows_only() -> None:
    fresh = [*range(10, 30), *range(80, 90)]
    f = relay_features(10, 100, [(30, 80)], 0.0, exact=[(90, 95)])
    assert f == ("relay", 1, 35, brute_pairs([*fresh, *range(95, 100)]), 55)


def test_exact_copies_are_not_repaired() -> None:
    half = relay_features(0, 100, [(30, 80)], 0.5, exact=[(0, 30)])
    assert half.rows == 45 and half.placed == 80
    assert half.pairs == brute_pairs(list(range(80, 100))) + brute_pairs(list(range(30, 80))) / 2


def test_full_is_one_pass_over_everything() -> None:
    stock, full = stock_features(10, 100), relay_features(10, 100, [(30, 80)], 1.0)
    assert full == ("relay", *stock[1:4], 50)
    assert not CostModel().saves(stock, full), "recomputing everything saves nothing on any machine"


def test_a_staged_policy_pays_for_its_first_layers_and_its_selection() -> None:
    whole, layers, share = 4, 30, 0.2
    repair = (whole + share * (layers - whole)) / layers
    none, some = (relay_features(0, 100, [(30, 80)], r) for r in (0.0, repair))
    assert some.rows - none.rows == pytest.approx(50 * repair)
    assert some.pairs - none.pairs == pytest.approx(brute_pairs(list(range(30, 80))) * repair)
    assert some.passes == none.passes == 1


def test_a_probe_is_a_second_pass_of_the_last_rows() -> None:
    without, probed = (relay_features(0, 100, [(30, 80)], 0.2, probe_rows=rows) for rows in (0, 8))
    assert probed.passes == without.passes + 1 and probed.rows == without.rows + 8
    assert probed.pairs - without.pairs == pytest.approx(brute_pairs(list(range(92, 100))))


def test_a_relayed_prompt_takes_as_many_chunks_as_stock() -> None:
    """What is copied is part of its chunk."""
    f = relay_features(0, 1100, [(50, 1050)], 0.1, chunk=128)
    assert f.rows == pytest.approx(200)
    assert f.passes == stock_features(0, 1100, 128).passes == 9


def test_a_batch_adds_work_and_shares_passes() -> None:
    a, b, c = stock_features(0, 10), relay_features(0, 100, [(20, 60)], 0.5), stock_features(5, 30)
    both = together([a, b, c])
    assert both == ("relay", 1, a.rows + b.rows + c.rows, a.pairs + b.pairs + c.pairs, 40)
    assert together([a, c]).path == "stock"


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize(
    ("coefficients", "shapes"),
    [(GPU, len(calibration_shapes())), (CPU, 6), (Coefficients(*(10 * c for c in CPU)), 2), (PRIOR, 8)],
)
def test_a_calibration_stays_within_its_time(coefficients: Coefficients, shapes: int) -> None:
    machine, spent, timed = linear(coefficients), [0.0], set()

    def measure(shape: Shape) -> float:
        timed.add(shape)
        spent[0] += machine([shape.features()])
        return machine([shape.features()])

    calibrate(measure)
    assert spent[0] < CALIBRATION_SECONDS and len(timed) >= shapes


@pytest.mark.parametrize("coefficients", [GPU, CPU])
def test_a_calibration_without_noise_predicts_within_10_percent(coefficients: Coefficients) -> None:
    model = calibrate(lambda shape: linear(coefficients)([shape.features()]))
    assert worst_error(model, linear(coefficients)) < (0.1 if coefficients is GPU else 0.25)
    assert all(c > 0 for c in model.state())


def test_the_shorter_of_two_times_counts() -> None:
    times: dict[Shape, int] = {}

    def measure(shape: Shape) -> float:
        late = times.get(shape, calibration_shapes().index(shape) % 2)
        times[shape] = 1 - late
        return linear(GPU)([shape.features()]) * (2.0 if late else 1.0)

    assert worst_error(calibrate(measure), linear(GPU), (512, 2048)) < 0.1


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0, -1.0])
def test_shapes_that_cannot_be_timed_are_left_out(bad: float) -> None:
    assert calibrate(lambda shape: bad).state() == PRIOR
    model = calibrate(lambda shape: bad if shape.context else linear(GPU)([shape.features()]))
    assert np.isfinite(model.state()).all() and worst_error(model, linear(GPU), (512, 2048)) < 0.3


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("coefficients", [GPU, CPU])
@pytest.mark.parametrize("start", ["prior", "calibration"])
def test_times_are_learnt_to_10_percent_from_one_window(coefficients: Coefficients, start: str, seed: int) -> None:
    machine = linear(coefficients)
    model = CostModel() if start == "prior" else calibrated(machine, seed)
    serve(model, machine, seed, 2 * WINDOW)
    assert worst_error(model, machine) < 0.1


def test_coefficients_are_learnt_from_exact_times() -> None:
    # Of the prior, a thousandth of a forward's weight remains.
    model = CostModel()
    for prompt in itertools.islice(prompts(4), WINDOW):
        model.observe(prompt.stock(), linear(GPU)([prompt.stock()]))
        model.observe(prompt.relay(0.2), linear(GPU)(prompt.relay_passes(0.2)))
    found = model.publish()
    assert found[:6] == pytest.approx(GPU[:6], rel=0.05)
    assert found.relay_idle * KNEE < 0.05 * GPU.relay_pass


def test_a_few_times_that_are_too_short_move_nothing() -> None:
    model = calibrated(linear(GPU), 5, Noise(5, 0, 0))
    for number, prompt in enumerate(itertools.islice(prompts(5), WINDOW)):
        factor = 0.2 if number % 16 == 0 else 1.0
        model.observe(prompt.stock(), factor * linear(GPU)([prompt.stock()]))
        model.observe(prompt.relay(0.2), factor * linear(GPU)(prompt.relay_passes(0.2)))
    model.publish()
    assert worst_error(model, linear(GPU)) < 0.1


@pytest.mark.parametrize("late", [2.0, 8.0])
def test_late_forwards_move_nothing_and_behaviour_that_lasts_does(late: float) -> None:
    slow = linear(Coefficients(*(late * c for c in GPU)))
    model = calibrated(linear(GPU), 5, Noise(5, 0, 0))
    rng = np.random.default_rng(5)
    for prompt in itertools.islice(prompts(5), WINDOW):
        for features, passes in ((prompt.stock(), [prompt.stock()]), (prompt.relay(0.2), prompt.relay_passes(0.2))):
            model.observe(features, (slow if rng.random() < 0.2 else linear(GPU))(passes))
    model.publish()
    assert worst_error(model, linear(GPU), (512, 2048)) < 0.1
    serve(model, slow, 6, 2 * WINDOW)
    assert worst_error(model, slow, (512, 2048)) < 0.1


def test_what_is_not_measured_is_as_much_slower_as_what_is() -> None:
    model = calibrated(linear(GPU), 7, Noise(7, 0, 0))
    for prompt in itertools.islice(prompts(7), WINDOW):
        model.observe(prompt.stock(), 3 * linear(GPU)([prompt.stock()]))
    model.publish()
    relay = chain(2048).relay(0.2)
    assert model.predict(relay) == pytest.approx(3 * linear(GPU)(chain(2048).relay_passes(0.2)), rel=0.15)


def test_what_was_learnt_long_ago_gives_way_to_the_start_values_at_the_present_speed() -> None:
    model = calibrated(linear(GPU), 21, Noise(21, 0, 0))
    serve(model, linear(GPU._replace(relay_pass=0.1)), 21, 2 * WINDOW)
    relay = chain(2048).relay(0.2)
    assert model.predict(relay) == pytest.approx(0.2 + linear(GPU._replace(relay_pass=0.0))([relay]), rel=0.1)
    for prompt in itertools.islice(prompts(22), 16 * HALF_LIFE):
        model.observe(prompt.stock(), 3 * linear(GPU)([prompt.stock()]))
    model.publish()
    assert model.predict(relay) == pytest.approx(3 * linear(GPU)([relay]), rel=0.15)


def test_traffic_of_one_length_leaves_the_others_sane() -> None:
    model, noise = calibrated(linear(GPU), 8), Noise(8)
    for _ in range(WINDOW):
        model.observe(chain(700).stock(), noise(linear(GPU)([chain(700).stock()])))
        model.observe(chain(700).relay(0.2), noise(linear(GPU)(chain(700).relay_passes(0.2))))
    model.publish()
    assert worst_error(model, linear(GPU)) < 0.25


def test_any_times_give_finite_coefficients_that_are_not_negative() -> None:
    rng = np.random.default_rng(9)
    for trial in range(30):
        model = CostModel()
        for prompt in itertools.islice(prompts(trial), 40):
            model.observe(prompt.stock(), 10.0 ** rng.uniform(-5, 3))
            model.observe(prompt.relay(rng.random()), float(rng.choice([math.nan, -1.0, 0.0, math.inf, 1e-3, 10.0])))
        assert all(math.isfinite(c) and c >= 0 for c in model.publish())
        assert np.isfinite(model.predict(chain(2048).stock()))


def test_what_is_no_measurement_is_counted_only() -> None:
    model = CostModel()
    for bad in (math.nan, math.inf, -math.inf, 0.0, -1.0, 1e9):
        model.observe(chain(512).stock(), bad)
    for features in (
        chain(512).stock()._replace(rows=math.nan),
        Features("stock", 0, 0, 0),
        Features("stock", 1, -9, 0),
    ):
        model.observe(features, 1.0)
        assert model.publish() == PRIOR
    due = CostModel()
    assert [due.observe(chain(512).stock(), math.nan) for _ in range(9)] == [False] * 7 + [True, False]


# ---------------------------------------------------------------- decisions


def test_the_prior_declines_only_the_hopeless() -> None:
    model = CostModel()
    for length, repair in ((256, 0.0), (256, 0.2), (512, 0.5), (2048, 0.8)):
        assert model.saves(chain(length).stock(), chain(length).relay(repair))
    assert model.saves(chain(64, 0).stock(), chain(64, 0).relay(0.0))
    assert not model.saves(chain(64).stock(), chain(64).relay(0.2)), "a second pass for 64 tokens"
    assert not model.saves(chain(4096).stock(), chain(4096).relay(0.97))


@pytest.mark.parametrize("seed", range(5))
def test_a_gpu_declines_300_tokens_and_accepts_2048_under_two_passes(seed: int) -> None:
    model = calibrated(linear(GPU), seed)
    for round in range(2):
        for length, wanted in ((300, False), (2048, True)):
            assert model.saves(chain(length).stock(), chain(length).relay(0.2)) is wanted, (round, length)
        serve(model, linear(GPU), seed, 2 * WINDOW)


@pytest.mark.parametrize("probe_rows", [0, 24])
@pytest.mark.parametrize(
    ("coefficients", "host"), [(GPU, 0.0), (CPU, 0.0), (OVERLAP, 0.013)], ids=["gpu", "cpu", "overlap"]
)
def test_break_even_is_found_at_the_right_length(coefficients: Coefficients, host: float, probe_rows: int) -> None:
    machine = linear(coefficients, host)
    model = calibrated(machine, 10)
    serve(model, machine, 10, 4 * WINDOW)

    def really(length: int, bound: float) -> bool:
        prompt = chain(length, probe_rows)
        return machine(prompt.relay_passes(0.2)) <= bound * machine([prompt.stock()])

    found = break_even(lambda n: model.saves(chain(n, probe_rows).stock(), chain(n, probe_rows).relay(0.2)))
    assert break_even(lambda n: really(n, 1.03)) <= found <= break_even(lambda n: really(n, 0.85))


def test_the_margin_is_a_share_of_the_stock_time() -> None:
    model = CostModel(Coefficients(1.0, 0, 0, 1.0, 0, 0, 0, 0))
    stock = Features("stock", 1, 0, 0)
    assert model.saves(stock, Features("relay", 1 - MARGIN - 0.001, KNEE, 0))
    assert not model.saves(stock, Features("relay", 1 - MARGIN + 0.001, KNEE, 0))
    assert model.saves(stock, Features("relay", 1.0, KNEE, 0), margin=0.0)
    assert not model.saves(stock, Features("relay", 0.8, KNEE, 0), margin=0.3)


def test_one_declined_prompt_in_many_is_tried() -> None:
    model = CostModel(GPU, firm=True)
    stock, relay = chain(64).stock(), chain(64).relay(0.2)
    assert not model.saves(stock, relay)
    tickets = np.random.default_rng(11).integers(1 << 62, size=20 * TRIAL_EVERY).tolist()
    tried = sum(model.saves(stock, relay, ticket=t) for t in tickets)
    assert 5 <= tried <= 40 and tried == sum(t % TRIAL_EVERY == 0 for t in tickets)
    assert all(model.saves(chain(4096).stock(), chain(4096).relay(0.2), ticket=t) for t in tickets[:300])


class Outcome(NamedTuple):
    slower: float
    accepted: float
    gaining: int


def run_mix(model: CostModel, machine: Time, seed: int, requests: int, noise: Noise) -> Outcome:
    """Serve a mix by the model's own decisions, in batches of one to three requests, and learn from it. A quarter of
    the prompts has nothing to reuse.

    slower: share of the requests above 1.05 times the stock time; accepted: share relayed of those that gain 20 % or
    more; by times without noise. What a policy really recomputes varies around what it expects.
    """
    rng = np.random.default_rng(seed + 1000)
    slower = gaining = accepted = 0
    batch: list[tuple[Features, list[Features]]] = []
    for prompt in itertools.islice(prompts(seed), requests):
        share = float(rng.choice([0.1, 0.2, 0.3]))
        actual = min(1.0, share * math.exp(0.2 * rng.standard_normal()))
        stock, relayed = machine([prompt.stock()]), machine(prompt.relay_passes(actual))
        reuses = rng.random() < 0.75
        relay = reuses and model.saves(prompt.stock(), prompt.relay(share), ticket=int(rng.integers(1 << 62)))
        slower += relay and relayed > 1.05 * stock
        if reuses and relayed <= 0.8 * stock:
            gaining, accepted = gaining + 1, accepted + relay
        stocked = (prompt.stock(), [prompt.stock()])
        batch.append((prompt.relay(actual), prompt.relay_passes(actual)) if relay else stocked)
        if len(batch) == 3 or rng.random() < 0.5:
            whole = together([features for features, _ in batch])
            passes = [list(p) for p in itertools.zip_longest(*(passes for _, passes in batch))]
            # The batch takes the relay path, its stock requests too.
            merged = [together([f._replace(path=whole.path) for f in p if f is not None]) for p in passes]
            if model.observe(whole, noise(machine(merged))):
                model.publish()
            batch = []
    return Outcome(slower / requests, accepted / max(1, gaining), gaining)


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize(("start", "most"), [("calibration", 0.01), ("prior", 0.02)])
@pytest.mark.parametrize(
    ("coefficients", "host"), [(GPU, 0.0), (CPU, 0.0), (OVERLAP, 0.013)], ids=["gpu", "cpu", "overlap"]
)
def test_few_requests_are_slower_and_most_gains_are_taken(
    coefficients: Coefficients, host: float, start: str, most: float, seed: int
) -> None:
    machine = linear(coefficients, host)
    model = CostModel() if start == "prior" else calibrated(machine, seed)
    outcome = run_mix(model, machine, seed, 3000, Noise(seed))
    assert outcome.gaining > 500
    assert outcome.slower <= most and outcome.accepted >= 0.9


def test_without_the_model_many_requests_are_slower() -> None:
    # What the test above would show if everything were relayed.
    machine = linear(GPU)
    passes = [(p, machine(p.relay_passes(0.2)), machine([p.stock()])) for p in itertools.islice(prompts(1), 1000)]
    assert np.mean([relayed > 1.05 * stock for _, relayed, stock in passes]) > 0.3


def test_a_relay_path_that_became_slower_is_noticed() -> None:
    slow = linear(GPU._replace(relay_pass=0.04))
    model = calibrated(linear(GPU), 12)
    run_mix(model, linear(GPU), 12, 1500, Noise(12))
    assert model.saves(chain(2048).stock(), chain(2048).relay(0.2))
    run_mix(model, slow, 13, 600, Noise(13))
    assert not model.saves(chain(2048).stock(), chain(2048).relay(0.2))
    assert model.saves(chain(8192).stock(), chain(8192).relay(0.2))


def test_a_relay_path_that_became_faster_is_noticed_although_it_was_declined() -> None:
    model = calibrated(linear(GPU), 14)
    slow = linear(GPU._replace(relay_pass=0.5))
    run_mix(model, slow, 14, 3000, Noise(14))
    assert not model.saves(chain(8192).stock(), chain(8192).relay(0.2))
    outcome = run_mix(model, linear(GPU), 15, 6000, Noise(15))
    assert model.saves(chain(2048).stock(), chain(2048).relay(0.2)) and outcome.slower <= 0.01


# ---------------------------------------------------------------- ranks


def test_unpublished_learning_changes_no_decision() -> None:
    model = calibrated(linear(GPU), 16)
    before = model.state()
    for prompt in itertools.islice(prompts(16), 50):
        model.observe(prompt.stock(), 1e-3)
        model.observe(prompt.relay(0.2), 10.0)
    assert model.state() == before and model.saves(chain(2048).stock(), chain(2048).relay(0.2))
    published = model.publish()
    assert published == model.state() != before
    assert not model.saves(chain(2048).stock(), chain(2048).relay(0.2))


def test_ranks_decide_by_what_rank_0_published() -> None:
    ranks = [calibrated(linear(GPU), seed) for seed in (17, 18)]
    ranks[1].load(ranks[0].state())
    noise = [Noise(17), Noise(18, 0.3, 0.3)]
    due_at = []
    for number, prompt in enumerate(itertools.islice(prompts(17), 3 * PUBLISH_EVERY), 1):
        stock, relay = prompt.stock(), prompt.relay(0.2)
        chosen = [rank.saves(stock, relay) for rank in ranks]
        assert chosen[0] == chosen[1]
        passes = prompt.relay_passes(0.2) if chosen[0] else [stock]
        taken = relay if chosen[0] else stock
        due = [rank.observe(taken, n(linear(GPU)(passes))) for rank, n in zip(ranks, noise, strict=True)]
        assert due[0] == due[1]
        if due[0]:
            due_at.append(number)
            ranks[1].load(ranks[0].publish())
            assert ranks[0].state() == ranks[1].state()
    assert due_at == [8, 16, 32, 64, 128, 192]


def test_a_state_is_plain_floats_and_comes_back() -> None:
    model = calibrated(linear(CPU), 19)
    serve(model, linear(CPU), 19, WINDOW)
    state = tuple(model.state())
    assert all(type(value) is float for value in state)
    other = CostModel()
    other.load(list(state))
    assert other.state() == model.state()
    assert other.predict(chain(999).relay(0.1)) == model.predict(chain(999).relay(0.1))


@pytest.mark.parametrize(
    "state", [(1.0,) * 7, (1.0,) * 9, (*PRIOR[:7], -1e-9), (math.nan, *PRIOR[1:]), (*PRIOR[:7], math.inf)]
)
def test_a_state_that_is_none_is_refused(state: tuple[float, ...]) -> None:
    model = CostModel()
    with pytest.raises(ValueError, match="coefficients"):
        model.load(state)
    assert model.state() == PRIOR


def test_equal_calls_give_equal_states() -> None:
    states = []
    for _ in range(2):
        model = calibrated(linear(OVERLAP, 0.013), 20)
        serve(model, linear(OVERLAP, 0.013), 20, 200)
        states.append(model.state())
    assert states[0] == states[1]


def test_start_values_are_positive_whatever_was_timed() -> None:
    assert fit([]) == PRIOR
    assert all(c > 0 for c in fit(50 * [(stock_features(0, 16), 2e-3), (stock_features(0, 4096), 1e-3)]))
