"""Budgets: what can be asked for, and how many tokens it is."""

import pytest

from sglang_relay.budget import Budget, parse_budget


@pytest.mark.parametrize(
    ("given", "kind", "amount"),
    [
        (0.2, "share", 0.2),
        (1, "share", 1.0),
        ("0.15", "share", 0.15),
        ("fast", "share", 0.1),
        ("Default", "share", 0.2),
        ("careful", "share", 0.3),
        (16, "tokens", 16.0),
        ("32", "tokens", 32.0),
        ("coverage:0.8", "coverage", 0.8),
    ],
)
def test_what_is_read_is_written_the_same(given: object, kind: str, amount: float) -> None:
    budget = parse_budget(given)
    assert (budget.kind, budget.amount) == (kind, amount)
    assert parse_budget(str(budget)) == budget


@pytest.mark.parametrize(
    "given",
    [
        0,
        -0.1,
        1.5,
        2.5,
        "",
        "much",
        "coverage:",
        "coverage:0",
        "coverage:2",
        "share:0.2",
        True,
        None,
        [0.1],
        1e9,
        10**400,
        -(10**400),
    ],
)
def test_what_is_not_allowed_is_refused_with_what_is(given: object) -> None:
    with pytest.raises(ValueError, match="allowed is a share above 0"):
        parse_budget(given)


@pytest.mark.parametrize("given", [float("nan"), float("inf"), "nan", "inf"])
def test_no_number_is_no_budget(given: object) -> None:
    with pytest.raises(ValueError, match="allowed is"):
        parse_budget(given)


def test_limits() -> None:
    assert Budget("share", 0.2).limit(100, 3) == 20
    assert Budget("share", 0.001).limit(100, 3) == 1
    assert Budget("tokens", 16).limit(100, 3) == 48
    assert Budget("tokens", 64).limit(100, 3) == 100
    assert Budget("coverage", 0.5).limit(100, 3) == 100
