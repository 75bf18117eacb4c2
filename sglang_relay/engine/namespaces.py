"""Tree namespaces of relayed requests.

A relayed request lives in the same tree under an ``extra_key`` that no client can name: it starts with a secret of
this server. Approximate KV is therefore unreachable for exact requests by construction, and prefix hits, forks,
locks, eviction and accounting of relayed requests stay SGLang's own.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

MAX_TIERS = 8
"""Tiers whose namespaces are searched for an exact prefix."""


LONGEST_NAME = 1024
"""Characters of an ``extra_key`` or ``cache_salt`` whose requests donate and relay: the index remembers both."""


class Tenant(NamedTuple):
    """Who may share KV with whom; runs never cross tenants. ``key`` is the client's extra_key incl. the LoRA id;
    ``scope`` stands for the scope (requests.py, ``named_scope``)."""

    key: str | None
    salt: str | None
    scope: str | None

    @property
    def too_long(self) -> bool:
        return max(len(self.key or ""), len(self.salt or "")) > LONGEST_NAME

    @property
    def digest(self) -> bytes:
        """Names the tenant where it is remembered: clients choose how long their texts are."""
        return hashlib.blake2b(repr(tuple(self)).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def new_secret() -> str:
    """128 random bits as text. Never logged, exported or reported."""
    return secrets.token_hex(16)


@dataclass(slots=True)
class Namespaces:
    """Keys of the relay namespaces. ``epoch`` counts weight changes, so KV of other weights is never found again.

    ``isolated``: only tenants that name a salt or a scope donate and relay. ``exact_is_current``: the exact namespace
    holds KV of the current weights only (false between a weight update and the next flush). ``trips``: how often the
    breaker of a tier's tenant has tripped: what was relayed before is never found again.
    """

    secret: str
    isolated: bool = False
    epoch: int = 0
    exact_is_current: bool = True
    trips: Callable[[str, Tenant], int] = lambda tier, tenant: 0
    _tiers: dict[str, None] = field(default_factory=dict)

    def unscoped(self, tenant: Tenant) -> bool:
        """Whether ``tenant`` names neither salt nor scope where one is asked for."""
        return self.isolated and tenant.salt is None and tenant.scope is None

    def note_tier(self, tier: str) -> None:
        """Remember that requests of ``tier`` exist; the oldest is forgotten beyond ``MAX_TIERS``."""
        self._tiers.pop(tier, None)
        self._tiers[tier] = None
        if len(self._tiers) > MAX_TIERS:
            del self._tiers[next(iter(self._tiers))]

    def siblings(self, tenant: Tenant, tier: str) -> list[str | None]:
        """Keys of ``tenant`` other than its namespace in ``tier``: where a longer exact prefix may lie."""
        exact = [self.exact_key(tenant)] if self.exact_is_current else []
        return [*exact, *(self.key(tenant, t) for t in self._tiers if t != tier)]

    def key(self, tenant: Tenant, tier: str) -> str:
        """The extra_key of a request of ``tenant`` in ``tier``. The client's key stays the suffix, where SGLang's KV
        events look for the LoRA id (sglang/srt/mem_cache/events.py)."""
        trips = self.trips(tier, tenant)
        made = f"{tier}#{trips}" if trips else tier
        return f"{self.secret}/{self.epoch}/{made}/{_scope(tenant)}/{tenant.key or ''}"

    def exact_key(self, tenant: Tenant) -> str | None:
        """The extra_key of a request of ``tenant`` that does not relay: the client's own where it names no scope."""
        return tenant.key if tenant.scope is None else f"{self.secret}//{_scope(tenant)}/{tenant.key or ''}"


def _scope(tenant: Tenant) -> str:
    return "" if tenant.scope is None else f"{len(tenant.scope)}:{tenant.scope}"
