"""What a server relays with where a request names no policy: what its certificate allows, or a cautious default."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from sglang_relay.breaker import UNCERTIFIED, Band
from sglang_relay.budget import NAMED, Budget, parse_budget
from sglang_relay.certificate import (
    Candidate,
    Certificate,
    CertificateError,
    Setting,
    default_directory,
    load_certificate,
    parse_bound,
    read_certificate,
)
from sglang_relay.config import ConfigError, LayerRange, RelayConfig, setting_names
from sglang_relay.engine.served import served_identity
from sglang_relay.identity import IdentityError

logger = logging.getLogger(__name__)

CONSERVATIVE = ("probe", Budget("share", NAMED["careful"]))
"""Without a certificate (design: policy-study.md, "Defaults that follow")."""

_SERVER = (
    *("attention_backend", "prefill_attention_backend", "decode_attention_backend", "triton_attention_reduce_in_fp32"),
    *("device", "tp_size", "ep_size", "moe_runner_backend", "model_impl", "json_model_override_args"),
    *("page_size", "chunked_prefill_size", "enable_mixed_chunk", "enable_tf32_matmul"),
)
"""Fields of sglang's ServerArgs that may change an answer; dtypes and versions are the identity's. Not
``enable_fp32_lm_head``: measured servers always have it (measure/divergence.py), whatever the user's flags say."""

_ELSEWHERE = frozenset(
    (
        "policy",
        "budget",
        "bound",
        "certificate",
        "profile",
        "audit_every",
        "cost_model",
        "graphs",
        "report",
        "default",
        "donate",
        "index_bytes",
    )
)
"""Settings of the relay that change which requests are relayed under which policy, and not what a policy answers."""


class Choice(NamedTuple):
    """policy and budget of requests that name none. why: for the log. assured: whether it is what the operator asked
    for, by name or by the bound; where it is not, that is said loudly."""

    policy: str
    budget: Budget | None
    why: str
    assured: bool = True

    @property
    def tier(self) -> str | None:
        """As in `requests.Controls.tier`."""
        return self.policy if self.budget is None else f"{self.policy}@{self.budget}"


def require_certificate(config: RelayConfig) -> None:
    """Raise ConfigError where ``config`` names a certificate that cannot be read, whatever it was made for."""
    where = _named(config)
    if where is None or where.is_dir():
        return
    try:
        read_certificate(where)
    except CertificateError as error:
        raise ConfigError(f"certificate={config.certificate}: {error}", "certificate") from error


def _named(config: RelayConfig) -> Path | None:
    return Path(config.certificate).expanduser() if config.certificate else None


def find_certificate(config: RelayConfig, args: Any) -> Certificate | None:
    """The certificate for the model that ``args`` (fields of sglang's ServerArgs, resolved) serves.

    A certificate that the operator names must fit: ConfigError otherwise, which ends the start-up. One that is merely
    found and does not fit is logged and left out.
    """
    where = _named(config)
    if where is None and not any(default_directory().glob("*.json")):
        return None
    try:
        found = load_certificate(served_identity(args), where)
    except (IdentityError, CertificateError, OSError, ValueError) as error:
        if where is not None:
            raise ConfigError(f"certificate={config.certificate}: {error}", "certificate") from error
        logger.warning("relay: a certificate is not used: %s", error)
        return None
    if found is None and where is not None:
        raise ConfigError(f"certificate={config.certificate}: holds none for these weights", "certificate")
    return found


def settings_of(config: RelayConfig, layers: LayerRange, args: Any) -> dict[str, Setting]:
    """What a certificate says of the server it was measured on, and is compared with at start-up. args: as above."""
    own = {name: getattr(config, name) for name in setting_names() if name not in _ELSEWHERE} | {"layer_range": layers}
    found = {name: getattr(args, name) for name in _SERVER} | {f"relay_{name}": value for name, value in own.items()}
    return {name: v if v is None or isinstance(v, (bool, int, float, str)) else str(v) for name, v in found.items()}


def warn_of_other_settings(certificate: Certificate | None, settings: dict[str, Setting]) -> None:
    """Log what a certificate was measured with otherwise: its figures may not hold here."""
    if certificate is not None and (other := certificate.differing_settings(settings)):
        logger.warning("relay: the certificate of %s is of other settings: %s", certificate.made, "; ".join(other))


def choose(config: RelayConfig, certificate: Certificate | None, *, influence: bool = False) -> Choice:
    """The operator's policy, else the cheapest that is certified within ``config.bound``, else, where none is, the most
    careful that was measured, and where none was, the conservative one.

    A budget that the operator sets leaves only the candidates that were measured with it, or take none. influence:
    whether decode influence is collected; where it is not, the paper's policy is no default. `certify` asks here, too,
    what servers will do with what it has measured."""
    if config.policy != "auto":
        return Choice(config.policy, None, "set by the operator")
    if certificate is None:
        return Choice(*CONSERVATIVE, "NO CERTIFICATE for this model: conservative default", assured=False)
    wanted = None if config.budget is None else str(config.budget)
    plain = tuple(c for c in certificate.candidates if not c.params and (wanted is None or c.budget in (None, wanted)))
    if not influence:
        plain = tuple(c for c in plain if c.policy != "relay")
    by = f"the certificate of {certificate.made}"
    if not plain:
        why = f"NOT MEASURED: {by} holds no policy that could be the default here: conservative default"
        return Choice(*CONSERVATIVE, why, assured=False)
    found = msgspec.structs.replace(certificate, candidates=plain)
    if (best := found.cheapest(parse_bound(config.bound))) is not None:
        return _chosen(best, f"cheapest within {config.bound} by {by}")
    best = found.closest()
    most = best.figures.kl.mean.high
    why = f"NO POLICY IS WITHIN {config.bound} by {by}: the closest to full prefill, mean KL up to {most:.2g}"
    return _chosen(best, why, assured=False)


def _chosen(candidate: Candidate, why: str, *, assured: bool = True) -> Choice:
    budget = None if candidate.budget is None else parse_budget(candidate.budget)
    return Choice(candidate.policy, budget, why, assured)


def bands(certificate: Certificate | None) -> Callable[[str], Band]:
    """Where audits of a tier (``Controls.tier``) lie while the certificate holds."""

    def band_of(tier: str) -> Band:
        policy, _, budget = tier.partition("@")
        return UNCERTIFIED if certificate is None else certificate.band(policy, budget or None)

    return band_of
