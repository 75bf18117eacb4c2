"""Tree namespaces of relayed requests.

A relayed request lives in the same tree under an ``extra_key`` that no client can name: it starts with a secret of
this server. Approximate KV is therefore unreachable for exact requests by construction, and prefix hits, forks,
locks, eviction and accounting of relayed requests stay SGLang's own.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import NamedTuple


class Tenant(NamedTuple):
    """Who may share KV with whom; runs never cross tenants. ``key`` is the client's extra_key incl. the LoRA id."""

    key: str | None
    salt: str | None
    scope: str | None


def new_secret() -> str:
    """128 random bits as text. Never logged, exported or reported."""
    return secrets.token_hex(16)


@dataclass(slots=True)
class Namespaces:
    """Keys of the relay namespaces. ``epoch`` counts weight changes, so KV of other weights is never found again.

    ``exact_is_current``: the exact namespace holds KV of the current weights only (false between a weight update and
    the next flush).
    """

    secret: str
    epoch: int = 0
    exact_is_current: bool = True

    def key(self, tenant: Tenant, tier: str) -> str:
        """The extra_key of a request of ``tenant`` in ``tier``. The client's key stays the suffix, where SGLang's KV
        events look for the LoRA id (sglang/srt/mem_cache/events.py)."""
        scope = "" if tenant.scope is None else f"{len(tenant.scope)}:{tenant.scope}"
        return f"{self.secret}/{self.epoch}/{tier}/{scope}/{tenant.key or ''}"
