"""Certificates: what a file says survives it, what it was not made for is refused, and the cheapest policy is found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pytest

from sglang_relay import certificate as module
from sglang_relay.breaker import UNCERTIFIED
from sglang_relay.certificate import (
    Candidate,
    Certificate,
    CertificateError,
    figures_of,
    load_certificate,
    parse_bound,
    read_certificate,
)
from sglang_relay.identity import Identity, IdentityError

IDENTITY = Identity("org/name", "abc", "sha256:" + "0123456789abcdef" * 4, "bfloat16", "0.5.23", "0.1.0")


class Row(NamedTuple):
    kl: Sequence[float]
    top1: float = 1.0
    first: bool = True
    exact_length: int = 32
    cost: float = 0.2


def rows(kl: float, cost: float, n: int = 30, tail: float = 1.0, seed: int = 0) -> list[Row]:
    """``n`` cases around ``kl``; the worst five are ``tail`` times worse."""
    values = kl * np.random.default_rng(seed).uniform(0.9, 1.1, (n, 8))
    values[:5] *= tail
    return [Row(v.tolist(), cost=cost) for v in values]


def candidate(policy: str, budget: str | None, kl: float, cost: float, tail: float = 1.0) -> Candidate:
    return Candidate(policy, budget, figures_of(rows(kl, cost, tail=tail)))


def made(*candidates: Candidate, identity: Identity = IDENTITY) -> Certificate:
    floor = figures_of(rows(8e-4, 1.0, seed=1))
    return Certificate(identity, {"page_size": 1}, "30 chains", "2026-11-24", floor, candidates)


CERTIFICATE = made(
    candidate("rotate", None, 3e-2, 0.0),
    candidate("legolink", "16", 1.2e-2, 0.05),
    candidate("probe", "0.1", 4.8e-3, 0.12),
    candidate("probe", "0.3", 1.8e-3, 0.32),
    candidate("probe", "0.7", 7e-4, 0.75),
    candidate("full", None, 0.0, 1.0),
)


def test_a_file_holds_everything(tmp_path: Path) -> None:
    file = CERTIFICATE.save(tmp_path)
    assert read_certificate(file) == CERTIFICATE
    assert load_certificate(IDENTITY, tmp_path) == load_certificate(IDENTITY, file) == CERTIFICATE
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("by_file", [True, False])
@pytest.mark.parametrize("name", Identity.__struct_fields__)
def test_any_other_identity_is_refused_by_the_field_s_name(tmp_path: Path, name: str, by_file: bool) -> None:
    file = CERTIFICATE.save(tmp_path)
    other = msgspec.structs.replace(IDENTITY, **{name: "sha256:other"})
    if name == "weights" and not by_file:
        assert load_certificate(other, tmp_path) is None
        return
    with pytest.raises(IdentityError, match=rf"certificate .* was made for another {name}: "):
        load_certificate(other, file if by_file else tmp_path)


def test_weights_whose_digests_begin_alike_are_told_apart(tmp_path: Path) -> None:
    CERTIFICATE.save(tmp_path)
    other = msgspec.structs.replace(IDENTITY, weights=IDENTITY.weights[:-1] + "0")
    with pytest.raises(IdentityError, match="another weights"):
        load_certificate(other, tmp_path)


def test_certificates_of_one_model_in_two_dtypes_stand_side_by_side(tmp_path: Path) -> None:
    half = msgspec.structs.replace(IDENTITY, dtype="float16")
    CERTIFICATE.save(tmp_path)
    made(identity=half).save(tmp_path)
    assert load_certificate(half, tmp_path) == made(identity=half)
    assert load_certificate(IDENTITY, tmp_path) == CERTIFICATE


def test_without_a_certificate_there_is_none_but_a_named_file_must_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert load_certificate(IDENTITY) is None
    with pytest.raises(CertificateError, match="gone"):
        load_certificate(IDENTITY, tmp_path / "gone.json")
    CERTIFICATE.save()
    assert load_certificate(IDENTITY) == CERTIFICATE


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"sglang-relay certificate 1"', '"sglang-relay certificate 2"'),
        ('"dtype":', '"dtyp":'),
        ('"page_size"', '"page_size": [], "more"'),
        ('"n":', '"m":'),
        ("{", "", ),
    ],
)  # fmt: skip
def test_a_file_that_is_no_certificate_is_refused_by_name(tmp_path: Path, old: str, new: str) -> None:
    file = CERTIFICATE.save(tmp_path)
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(CertificateError, match=file.name):
        load_certificate(IDENTITY, tmp_path)


@pytest.mark.parametrize(
    ("bound", "label"),
    [
        (0.05, "rotate"),
        (0.02, "legolink@16"),
        (0.005, "probe@0.1"),
        (0.002, "probe@0.3"),
        ("floor", "probe@0.7"),
        (1e-9, "full"),
    ],
)
def test_the_cheapest_within_the_bound(bound: module.Bound, label: str) -> None:
    found = CERTIFICATE.cheapest(bound)
    assert found is not None and found.label == label


def test_the_upper_end_of_the_interval_counts_not_the_mean() -> None:
    doubtful = candidate("probe", "0.2", 3e-3, 0.2, tail=4.0)
    mean = doubtful.figures.kl.mean
    assert mean.value < 5e-3 < mean.high
    assert made(doubtful).cheapest(5e-3) is None
    assert made(doubtful).cheapest(mean.high) is doubtful


def test_the_floor_bounds_the_tail_too() -> None:
    tailed = candidate("probe", "0.2", 2e-4, 0.2, tail=8.0)
    certificate = made(tailed)
    assert tailed.figures.kl.mean.high < certificate.floor.kl.mean.high
    assert tailed.figures.kl.p90.value > certificate.floor.kl.p90.high
    assert certificate.cheapest("floor") is None


def test_the_floor_bounds_the_mean_too() -> None:
    spiked = [*rows(2e-4, 0.2, n=29), Row([1.0], cost=0.2)]
    certificate = made(Candidate("probe", "0.2", figures_of(spiked)))
    assert certificate.candidates[0].figures.kl.p90.value < certificate.floor.kl.p90.value
    assert certificate.cheapest("floor") is None


def test_of_equal_cost_the_closer_one() -> None:
    first, second = candidate("a", None, 2e-3, 0.2), candidate("b", None, 1e-3, 0.2)
    assert made(first, second).cheapest(0.02) is second


def test_figures_are_those_of_the_cases() -> None:
    cases = [Row([0.1 * i, 0.0], i / 40, i % 4 > 0, i, i / 100) for i in range(40)]
    f = figures_of(cases)
    assert f.n == 40
    assert f.kl.mean.value == pytest.approx(0.05 * 19.5) and f.kl.max == pytest.approx(0.05 * 39)
    assert f.next_kl.median.value == pytest.approx(1.95) and f.next_kl.p90.value == pytest.approx(0.1 * 35.1)
    assert f.kl.mean.low < f.kl.mean.value < f.kl.mean.high
    assert (f.top1.value, f.first.value, f.exact.value) == (pytest.approx(19.5 / 40), 0.75, 19.5)
    assert f.cost.value == pytest.approx(0.195)
    assert 0.55 < f.first.low < 0.62 and 0.86 < f.first.high < 0.9


def test_all_hits_leave_a_doubt() -> None:
    assert figures_of(rows(1e-3, 0.2)).first.low == pytest.approx(0.025 ** (1 / 30), abs=1e-6)


@pytest.mark.parametrize("kl", [[], [float("nan")], [0.1, float("inf")]])
def test_what_is_no_number_is_not_certified(kl: list[float]) -> None:
    with pytest.raises(CertificateError):
        figures_of([Row([0.1]), Row(kl)])
    with pytest.raises(CertificateError):
        figures_of([])


def test_the_edge_bounds_the_90th_percentile_with_the_stated_confidence() -> None:
    rng = np.random.default_rng(7)
    draws = np.exp(1.7 * rng.standard_normal((2000, 40)))
    p90 = float(np.exp(1.7 * 1.2815515))
    held = float(np.mean([module._p90_bound(row.tolist()) >= p90 for row in draws]))
    assert 0.94 < held < 0.99
    assert module._p90_bound(draws[0, :28].tolist()) == draws[0, :28].max()
    assert module._p90_bound(draws.ravel()[:1000].tolist()) < np.quantile(draws.ravel()[:1000], 0.93)


def test_the_band_is_the_policy_s_and_never_below_the_floor_s() -> None:
    for policy, budget, index in (("rotate", None, 0), ("probe", "0.1", 2), ("probe", "0.3", 3)):
        band = CERTIFICATE.band(policy, budget)
        assert band.edge == CERTIFICATE.candidates[index].figures.next_kl_edge
        assert "2026-11-24" in band.source
    assert CERTIFICATE.band("full", None).edge == CERTIFICATE.floor.next_kl_edge > 0


def test_a_budget_between_two_has_the_band_of_the_smaller() -> None:
    assert CERTIFICATE.band("probe", "0.25") == CERTIFICATE.band("probe", "0.1")
    assert CERTIFICATE.band("probe", "0.5") == CERTIFICATE.band("probe", "0.3")
    for policy, budget in (
        ("probe", "0.05"),
        ("probe", None),
        ("probe", "32"),
        ("probe", "coverage:0.8"),
        ("relay", "0.2"),
    ):
        assert CERTIFICATE.band(policy, budget) == UNCERTIFIED


def test_further_parameters_are_part_of_the_label_and_have_no_band() -> None:
    plain = candidate("probe", "0.2", 1e-3, 0.2)
    extra = msgspec.structs.replace(plain, params={"relay_router": False})
    assert extra.label == "probe@0.2+router=False"
    assert made(extra).band("probe", "0.2") == UNCERTIFIED


def test_differing_settings_are_named() -> None:
    assert CERTIFICATE.differing_settings({"page_size": 1}) == []
    assert CERTIFICATE.differing_settings({"page_size": 16, "tp_size": 2}) == [
        "page_size: measured with 1, now 16",
        "tp_size: measured with None, now 2",
    ]


def test_the_table_names_every_candidate_and_the_floor() -> None:
    lines = CERTIFICATE.table().splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        *("rotate", "legolink@16", "probe@0.1", "probe@0.3", "probe@0.7", "full", "(noise"),
    ]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "low"])
def test_bounds_that_are_none(text: str) -> None:
    with pytest.raises(ValueError):
        parse_bound(text)


def test_bounds() -> None:
    assert parse_bound("floor") == "floor" and parse_bound("0.02") == 0.02
