"""How much of a prompt's reused text a policy may recompute: a share, tokens per segment, or coverage of its score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["share", "tokens", "coverage"]

NAMED = {"fast": 0.1, "default": 0.2, "careful": 0.3}
"""Shares with a name (design: policy-study.md, "Defaults that follow")."""
ALLOWED = (
    f"a share above 0 and at most 1, {', '.join(NAMED)}, a whole number of tokens per segment (2 or more), "
    "or coverage:SHARE of the score mass"
)

_MOST_TOKENS = 1 << 20


@dataclass(frozen=True, slots=True)
class Budget:
    """kind and amount: ``share`` of the reused tokens, in (0, 1]; ``tokens`` per segment; ``coverage``: as many tokens
    as carry this share, in (0, 1], of the policy's score."""

    kind: Kind
    amount: float

    def __str__(self) -> str:
        """As ``parse_budget`` reads it; equal budgets have equal texts."""
        return f"coverage:{self.amount:g}" if self.kind == "coverage" else f"{self.amount:g}"

    def limit(self, tokens: int, segments: int) -> int:
        """Most tokens to recompute of ``tokens`` reused ones in ``segments`` segments, at least one; all of them under
        ``coverage``, which the scores decide."""
        if self.kind == "coverage":
            return tokens
        wanted = self.amount * tokens if self.kind == "share" else self.amount * segments
        return min(tokens, max(1, int(wanted)))

    def expected_share(self) -> float:
        """The share that a prefill budget charges before the prompt is known."""
        return self.amount if self.kind == "share" else 0.2


def parse_budget(value: object) -> Budget:
    """Raises ValueError, saying what is allowed."""
    if isinstance(value, str):
        text = value.strip().lower()
        if text in NAMED:
            return Budget("share", NAMED[text])
        kind, _, amount = text.rpartition(":")
        if kind in ("", "coverage"):
            return _checked("coverage" if kind else None, _number(amount))
        raise ValueError(f"{value!r}: allowed is {ALLOWED}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r}: allowed is {ALLOWED}")
    return _checked(None, value)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r}: allowed is {ALLOWED}") from None


def _checked(kind: Kind | None, amount: float) -> Budget:
    if isinstance(amount, int) and not -_MOST_TOKENS <= amount <= _MOST_TOKENS:
        raise ValueError(f"a whole number of {amount.bit_length()} bits: allowed is {ALLOWED}")
    if 0 < amount <= 1:
        return Budget(kind or "share", float(amount))
    if kind is None and 2 <= amount <= _MOST_TOKENS and amount == int(amount):
        return Budget("tokens", float(amount))
    raise ValueError(f"{amount:g}: allowed is {ALLOWED}")
