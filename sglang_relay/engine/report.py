"""Counters of one scheduler process, for /server_info and SGLang's /metrics, and the per-request report's way out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang_relay.engine.requests import KINDS

REPORT_KEY = "relay"
GRAIN = 256
"""Tokens; a coarse report counts in steps of so many. Eight of the shortest pieces that are reused by default."""


def coarse(report: Mapping[str, Any]) -> dict[str, Any]:
    """Of ``report`` what does not tell how long the matches were: counts in steps of ``GRAIN`` tokens, whose rest is in
    ``fresh``, and why the request was declined, where that was known before anything was looked for. What is reused of
    less than ``GRAIN`` tokens looks like nothing."""
    reused = {kind: report[kind] // GRAIN * GRAIN for kind in KINDS if kind != "fresh"}
    fresh = sum(report[kind] for kind in KINDS) - sum(reused.values())
    said = {**reused, "fresh": fresh, "policy": report["policy"]}
    if report["policy"] is None:
        return said | {"declined": report["declined"], "why": report["why"]}
    found = sum(reused.values()) > reused["exact"]
    return said | {"declined": None if found else "nothing_to_reuse", "why": None}


@dataclass(slots=True)
class Stats:
    """Counts of tokens, decisions and host seconds since start-up."""

    tokens: Counter[str] = field(default_factory=Counter)
    """Prompt tokens of finished requests by kind (requests.py, ``KINDS``): the sums of their reports."""
    quoted: int = 0
    declined: Counter[str] = field(default_factory=Counter)
    batches: int = 0
    fallbacks: int = 0
    audits: int = 0
    failures: int = 0
    waits: int = 0
    """Times that a request was left in the queue, as it could not join the batch."""
    match_seconds: float = 0.0
    plan_seconds: float = 0.0
    learn_seconds: float = 0.0
    place_seconds: float = 0.0
    """Host time of launching the copies; on a CPU this is the copy itself."""
    forward_seconds: float = 0.0
    metrics: Metrics | None = None

    def decline(self, reason: str) -> None:
        self.declined[reason] += 1
        if self.metrics is not None:
            self.metrics.declined.labels(reason=reason).inc()

    def finished(self, report: Mapping[str, Any]) -> None:
        """Take in the report of a request that has its whole answer."""
        for kind in KINDS:
            self.tokens[kind] += report[kind]
            if self.metrics is not None:
                self.metrics.tokens.labels(kind=kind).inc(report[kind])
        self.quoted += report["quoted"]
        if self.metrics is not None:
            self.metrics.recomputed.inc(report["recomputed"])
            self.metrics.quoted.inc(report["quoted"])

    def batch(self) -> None:
        self.batches += 1
        if self.metrics is not None:
            self.metrics.batches.inc()

    def fallback(self) -> None:
        self.fallbacks += 1
        if self.metrics is not None:
            self.metrics.fallbacks.inc()

    def audit(self, count: int) -> None:
        self.audits += count
        if self.metrics is not None:
            self.metrics.audits.inc(count)

    def as_dict(self) -> dict[str, Any]:
        """Plain types only: SGLang sends it as msgpack."""
        return {
            "tokens": dict(self.tokens),
            "recomputed": self.tokens["recomputed"],
            "quoted": self.quoted,
            "declined": dict(self.declined),
            "batches": self.batches,
            "fallbacks": self.fallbacks,
            "audits": self.audits,
            "failures": self.failures,
            "waits": self.waits,
            "seconds": {
                name: round(getattr(self, f"{name}_seconds"), 6)
                for name in ("match", "plan", "learn", "place", "forward")
            },
        }


class Metrics:
    """Prometheus counters ``sglang_relay:*``. Made late: prometheus_client reads its multi-process folder on import."""

    def __init__(self, labels: dict[str, str]) -> None:
        from prometheus_client import Counter as PrometheusCounter

        names = list(labels)

        def counter(name: str, text: str, *extra: str) -> Any:
            family = PrometheusCounter(f"sglang_relay:{name}", text, [*names, *extra])
            return _Bound(family, labels) if extra else family.labels(**labels)

        self.tokens = counter("tokens_total", "Prompt tokens of finished requests, by what became of them.", "kind")
        self.declined = counter("declined_total", "Requests or chunks served without reuse, by reason.", "reason")
        self.recomputed = counter("recomputed_tokens_total", "Reused tokens that the policy computed again.")
        self.quoted = counter("quoted_tokens_total", "Reused tokens that were recomputed while an answer quoted them.")
        self.batches = counter("batches_total", "Prefill batches that went through the relay.")
        self.audits = counter("audits_total", "Relayed requests that were computed exactly too, and served so.")
        self.fallbacks = counter("fallbacks_total", "Relay batches that ran on the stock path after a host failure.")


@dataclass(frozen=True, slots=True)
class _Bound:
    """A counter family whose server labels are already given."""

    family: Any
    fixed: dict[str, str]

    def labels(self, **extra: str) -> Any:
        return self.family.labels(**self.fixed, **extra)


def streamer_class(base: type) -> type:
    """A SchedulerOutputStreamer that sends the report once per request instead of slicing it per token
    (scheduler_components/output_streamer.py, ``is_request_level_customized_info_key``)."""

    class RelayOutputStreamer(base):
        __slots__ = ()

        def is_request_level_customized_info_key(self, key: str) -> bool:
            return key == REPORT_KEY or super().is_request_level_customized_info_key(key)

    return RelayOutputStreamer
