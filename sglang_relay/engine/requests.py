"""What a request asks of the relay (``custom_params``), and the relay's state of one request."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sglang_relay.breaker import Breaker, Verdict
from sglang_relay.budget import Budget, parse_budget
from sglang_relay.config import MOST_QUOTE_TOKENS, POLICIES, RelayConfig
from sglang_relay.engine.capture import capture_name
from sglang_relay.engine.namespaces import Tenant
from sglang_relay.plan import Candidate, Decline, Placed
from sglang_relay.policies import Policy

if TYPE_CHECKING:
    from sglang_relay.engine.influence import Collected
    from sglang_relay.engine.quote_book import Quotes

PRIMES = "relay_primes"
"""Set by the front end, too (front_end.py, ``send``)."""

_LONGEST_PROMPT = 1 << 31
"""Tokens; longer than any."""
_MODES = ("on", "off", "exact")
_DONATE = ("output", "all", "none")
_KEYS = (
    *("relay", "relay_policy", "relay_budget", "relay_donate", "relay_scope", "relay_capture"),
    *("relay_generated_from", "relay_quote_tokens", PRIMES),
)


@dataclass(frozen=True, slots=True)
class Controls:
    """Validated wishes of one request. mode: on, off or exact; donate: output, all or none; budget: what the policy
    may recompute, None for policies that take none and for thresholds without a cap; generated_from: prompt tokens from
    this one on are a transcript: donated, and their influence collected (engine/influence.py), as if decoded.
    quote_tokens: how far ahead quotes are recomputed (quotes.py); other_quotes: whether the server's settings say
    otherwise. primes: it computes KV for requests that follow, and so as theirs is computed.
    """

    mode: str
    policy: str
    budget: Budget | None
    donate: str
    generated_from: int | None = None
    quote_tokens: int = 0
    other_quotes: bool = False
    primes: bool = False

    @property
    def tier(self) -> str:
        """Requests of one tier share a relay namespace: their KV is of one making."""
        tier = self.policy if self.budget is None else f"{self.policy}@{self.budget}"
        return f"{tier}+quote_tokens={self.quote_tokens}" if self.other_quotes else tier


def named_scope(params: Any) -> str | None:
    """A text of fixed length that stands for the scope that a request names, whatever else is wrong with it. A scope
    that is not allowed confines it all the same: to requests that name the same."""
    scope = params.get("relay_scope") if isinstance(params, Mapping) else None
    if scope is None:
        return None
    try:
        named = repr(scope)
    except (ValueError, RecursionError):  # too many digits, too many brackets
        named = type(scope).__name__
    return hashlib.blake2b(named.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _allowed(scope: Any) -> bool:
    return isinstance(scope, str) and 0 < len(scope) <= 256


def read_controls(params: Any, config: RelayConfig, policies: Mapping[str, Policy]) -> Controls:
    """Raises Decline("bad_custom_params") when a ``relay*`` parameter has a value that is not allowed, and when
    ``params`` is neither an object nor None: SGLang takes what JSON can say."""
    if not isinstance(params, Mapping | None):
        raise Decline("bad_custom_params", f"custom_params={params!r}: allowed is an object")
    given = {k: v for k, v in (params or {}).items() if isinstance(k, str) and k.startswith("relay") and v is not None}
    if unknown := sorted(set(given) - set(_KEYS)):
        raise Decline("bad_custom_params", f"unknown {', '.join(unknown)}; allowed are {', '.join(_KEYS)}")
    capture_name(given)
    name = _choice(given, "relay_policy", config.policy, POLICIES)
    if not _allowed(given.get("relay_scope", "any")):
        raise Decline("bad_custom_params", "relay_scope: allowed is a text of 1 to 256 characters")
    mode = _choice(given, "relay", config.default, _MODES)
    donate = _choice(given, "relay_donate", config.donate, _DONATE)
    follows = policies[name].follows_quotes
    asked, usual = _count(given, "relay_quote_tokens", MOST_QUOTE_TOKENS), config.quote_tokens
    quotes = (usual if asked is None else asked) if follows else 0
    return Controls(
        mode=mode,
        policy=name,
        budget=_budget(given.get("relay_budget"), policies[name], config),
        donate="none" if mode == "off" else donate,
        generated_from=_count(given, "relay_generated_from", _LONGEST_PROMPT),
        quote_tokens=quotes,
        other_quotes=follows and quotes != usual,
        primes=_switch(given, PRIMES),
    )


def _budget(asked: Any, policy: Policy, config: RelayConfig) -> Budget | None:
    if asked is None:
        kept = config.budget is not None and config.budget.kind in policy.budgets
        return config.budget if kept else policy.default_budget
    try:
        budget = parse_budget(asked)
    except ValueError as error:
        raise Decline("bad_custom_params", f"relay_budget={error}") from None
    if budget.kind not in policy.budgets:
        allowed = " or ".join(policy.budgets) or "no budget"
        raise Decline("bad_custom_params", f"relay_budget={asked!r}: {policy.name} takes {allowed}")
    return budget


def _count(given: Mapping[str, Any], key: str, most: int) -> int | None:
    value = given.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most):
        raise Decline("bad_custom_params", f"{key}={value!r}: allowed is a whole number from 0 to {most}")
    return value


def _switch(given: Mapping[str, Any], key: str) -> bool:
    value = given.get(key, False)
    if not isinstance(value, bool):
        raise Decline("bad_custom_params", f"{key}={value!r}: allowed are true and false")
    return value


def _choice(given: Mapping[str, Any], key: str, default: str, allowed: tuple[str, ...]) -> str:
    value = given.get(key, default)
    if value not in allowed:
        raise Decline("bad_custom_params", f"{key}={value!r}: allowed are {', '.join(allowed)}")
    return value


@dataclass(slots=True, eq=False)
class RelayRequest:
    """The relay's state of one request; lives on the Req as ``req.relay``.

    declined: named reason why the request is served without reuse, None while it may relay.
    pieces: disjoint runs of the prompt that donors hold, sorted, chosen at admission; ``pieces_version`` is the index
    version they were chosen at, ``pieces_from`` the prefix length. prefix_key: extra_key and cache_salt of the
    namespace that continues the prefix exactly, where the first piece says so.
    shortfall: why the prompt's matches are not used, None when they are.
    reached: end of the last chunk that was planned; a chunk that starts elsewhere begins a new attempt.
    depth: approximation depth of the KV computed so far; 0 while it equals full prefill up to rounding.
    report: the dict behind ``meta_info["relay"]``, updated in place.
    """

    controls: Controls
    tenant: Tenant
    epoch: int
    report: dict[str, Any]
    declined: str | None = None
    pieces: list[Candidate] = field(default_factory=list)
    pieces_version: int = -1
    pieces_from: int = 0
    prefix_key: tuple[str | None, str | None] = (None, None)
    shortfall: str | None = "nothing_to_reuse"
    reached: int = -1
    depth: int = 0
    breaker: Breaker | None = None
    verdict: Verdict | None = None
    """Of its tier and tenant, and what it said, once donors were found."""
    pending: int | None = None
    """From here on the KV holds placed spans that the prompt's last chunk has yet to repair: not to be published."""
    placed: list[Placed] = field(default_factory=list)
    """Donor KV since ``pending``."""
    reused: int = 0
    layers: float = 0.0
    """Reused approximate tokens of this attempt, and token-layers that ran on account of their repair."""
    inherited: int = 0
    inherited_stop: int = 0
    inherited_depth: int = 0
    """Prompt tokens found in the tree whose KV is approximate, where they end, and their depth."""
    influence: Collected | None = None
    """What its decoding has collected (engine/influence.py)."""
    own: list[tuple[int, int]] = field(default_factory=list)
    """Prompt ranges that no donor lent: computed by this request, or found as exact KV. What it may donate."""
    quotes: Quotes | None = None
    """What its decoding may still recompute (engine/quotes.py)."""
    waited: int = 0
    """Batches that it was left waiting beside (engine/adder.py)."""
    found: int = 0
    """End of the last range that was found: another request may have donated it already."""

    @property
    def relays(self) -> bool:
        return self.declined is None


def relay_of(req: Any) -> RelayRequest | None:
    """The relay state of a Req; None where the request was not made through the scheduler's front door."""
    return getattr(req, "relay", None)


KINDS = ("exact", "approximate", "relayed", "recomputed", "fresh")
"""What a prompt token can be; the counts of a report add up to the prompt."""


def new_report(policy: str | None, declined: str | None, why: str | None = None) -> dict[str, Any]:
    """``meta_info["relay"]``. exact: prefix hits and copies of exact KV; approximate: prefix hits on what a relayed
    request left; relayed: donor KV used as it is; recomputed: reused tokens that the policy computed again; fresh: the
    rest. cost: token-layers that the repair ran, its probe included, as a share of those of the relayed, recomputed and
    approximate tokens; above 1 only where a prompt's last chunk repeats more fresh tokens than it reuses. quoted: such
    tokens that were recomputed while the answer that quotes them was decoded. why: what more there is to say about
    ``declined``, None where its name says all. Under policy ``relay`` also influence: ``used``, ``none`` (no reused
    token has one), or ``unavailable:`` and why; and entry: ``hidden`` or ``embeddings``, where the reused tokens
    entered, and why."""
    return {
        **dict.fromkeys(KINDS, 0),
        "segments": 0,
        "cost": 0.0,
        "quoted": 0,
        "policy": policy,
        "depth": 0,
        "declined": declined,
        "why": why,
        "match_ms": 0.0,
    }
