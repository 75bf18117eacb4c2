"""The accuracy certificate of one model: how far each policy's answers are from full prefill, as measured beforehand.

A JSON file per identity, found by the digest of the weights. It speaks for exactly the identity it was made for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Protocol

import msgspec
import numpy as np

from sglang_relay.breaker import UNCERTIFIED, Band
from sglang_relay.budget import parse_budget
from sglang_relay.config import POLICIES
from sglang_relay.identity import Identity, IdentityError, user_cache, write_atomically
from sglang_relay.measure.statistics import CONFIDENCE, Estimate, Summary, summarise

Bound = float | Literal["floor"]
"""What an operator allows: a mean KL in nats, or the noise floor of full prefill itself."""

Setting = str | int | float | bool | None

_PARTS = ("mean", "median", "p90")
_MOST_NATS = 100.0
"""No distribution over a vocabulary, rounded as logits are, is further from another."""
_WIDEST_EDGE = 1.0
"""Nats; a wider band of audits would see nothing."""


class CertificateError(ValueError):
    """A certificate cannot be read or made; the text says why."""


class Measured(Protocol):
    """One policy on one case. kl: KL(full prefill || policy), nats, at each position of full prefill's greedy
    continuation, the next token first. top1: share of these positions whose most likely token is the same. first:
    whether it is at the first. exact_length: tokens up to the first that differs. cost: recomputed share of the reused
    tokens' token-layers, in [0, 1] or above where a probe is charged."""

    @property
    def kl(self) -> Sequence[float]: ...
    @property
    def top1(self) -> float: ...
    @property
    def first(self) -> bool: ...
    @property
    def exact_length(self) -> int: ...
    @property
    def cost(self) -> float: ...


class Interval(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A figure with its 95 % confidence interval (bootstrap over cases)."""

    value: float
    low: float
    high: float


class Spread(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a figure is distributed over the cases. max is the sample's; it bounds nothing."""

    mean: Interval
    median: Interval
    p90: Interval
    max: float


class Figures(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured over ``n`` cases.

    kl: nats, mean over the continuation of each case. next_kl: of the next token alone, which a live audit sees.
    next_kl_edge: nats, an upper confidence bound (95 %) of next_kl's 90th percentile, over the cases that were relayed
    (what audits see), that assumes no distribution; the sample's maximum where there are fewer than 29 of them. top1,
    first: shares. exact: tokens. cost: share.
    """

    n: int
    kl: Spread
    next_kl: Spread
    next_kl_edge: float
    top1: Interval
    first: Interval
    exact: Interval
    cost: Interval


class Candidate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A policy with its budget (text, as a request gives it) and the further ``relay_*`` parameters it ran with."""

    policy: str
    budget: str | None
    figures: Figures
    params: dict[str, Setting] = {}

    @property
    def label(self) -> str:
        extra = "".join(f"+{name.removeprefix('relay_')}={value}" for name, value in sorted(self.params.items()))
        return self.policy + (f"@{self.budget}" if self.budget is not None else "") + extra


class Certificate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """settings: of the server that was measured, by name. cases: what was measured on, in words. made: date.
    floor: full prefill against itself in other chunks."""

    identity: Identity
    settings: dict[str, Setting]
    cases: str
    made: str
    floor: Figures
    candidates: tuple[Candidate, ...]
    format: Literal["sglang-relay certificate 1"] = "sglang-relay certificate 1"

    def allows(self, candidate: Candidate, bound: Bound) -> bool:
        """Whether the candidate's mean KL is at most ``bound`` with 97.5 % confidence (its interval's upper end).

        ``floor``: that end is at most the noise floor's own upper end, and the p90 at most the floor's p90's.
        """
        kl, floor = candidate.figures.kl, self.floor.kl
        if bound == "floor":
            return kl.mean.high <= floor.mean.high and kl.p90.value <= floor.p90.high
        return kl.mean.high <= bound

    def cheapest(self, bound: Bound) -> Candidate | None:
        """The allowed candidate of least mean cost, of equal ones the closer to full prefill; None if none is."""
        allowed = [c for c in self.candidates if self.allows(c, bound)]
        return min(allowed, key=lambda c: (c.figures.cost.value, c.figures.kl.mean.value), default=None)

    def closest(self) -> Candidate:
        """The candidate whose mean KL is least at the upper end of its interval, of equal ones the cheaper. There must
        be one."""
        return min(self.candidates, key=lambda c: (c.figures.kl.mean.high, c.figures.cost.value))

    def band(self, policy: str, budget: str | None) -> Band:
        """The band of live audits of ``policy`` at ``budget``; not below the noise floor's, and at most a nat wide.

        A budget that was not measured has the band of the largest measured one below it: more repair does not make the
        answers worse. Without one, or for another kind of budget, nothing is certified (``UNCERTIFIED``).
        """
        edges = {c.budget: c.figures.next_kl_edge for c in self.candidates if c.policy == policy and not c.params}
        if budget not in edges:
            asked = _share(budget)
            below = [b for b in edges if asked is not None and (s := _share(b)) is not None and s <= asked]
            if not below:
                return UNCERTIFIED
            budget = max(below, key=lambda b: _share(b) or 0.0)
        edge = min(max(edges[budget], self.floor.next_kl_edge), _WIDEST_EDGE)
        return Band(edge, f"certificate of {self.made}")

    def differing_settings(self, settings: dict[str, Setting]) -> list[str]:
        """``name: measured, now`` for every setting that differs: reasons for a warning, not for a refusal."""
        names = sorted(self.settings.keys() | settings.keys())
        pairs = ((n, self.settings.get(n), settings.get(n)) for n in names)
        return [f"{name}: measured with {old!r}, now {new!r}" for name, old, new in pairs if old != new]

    def save(self, directory: Path | None = None) -> Path:
        """Write the file, in one step, and return its path. directory: the user's cache by default."""
        file = (directory or default_directory()) / _file_name(self.identity)
        write_atomically(file, msgspec.json.format(msgspec.json.encode(self)).decode() + "\n")
        return file

    def table(self) -> str:
        """The figures as text, one candidate a line, cheapest first."""
        head = ("policy", "cost %", "KL mean (95 %)", "median", "p90", "max", "top-1 %", "first %", "exact", "n")
        ordered = sorted(self.candidates, key=lambda c: c.figures.cost.value)
        rows = [_row(c.label, c.figures) for c in ordered] + [_row("(noise floor)", self.floor)]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = ([cell.rjust(w) for cell, w in zip(line, widths, strict=True)] for line in (head, *rows))
        return "\n".join("  ".join([line[0].strip().ljust(widths[0]), *line[1:]]) for line in lines)


def parse_bound(text: str) -> Bound:
    """``floor`` or a mean KL in nats, e.g. ``0.005``. Raises ValueError for anything else."""
    if text == "floor":
        return "floor"
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{text!r}: allowed is floor or a number of nats above 0")
    return value


def figures_of(cases: Sequence[Measured]) -> Figures:
    """Raises CertificateError without cases or with a figure that is no finite number."""
    if not cases or any(not len(c.kl) for c in cases):
        raise CertificateError("nothing was measured")
    columns = {
        "kl": [float(np.mean(c.kl)) for c in cases],
        "next_kl": [float(c.kl[0]) for c in cases],
        "top1": [float(c.top1) for c in cases],
        "first": [float(c.first) for c in cases],
        "exact": [float(c.exact_length) for c in cases],
        "cost": [float(c.cost) for c in cases],
    }
    for name, values in columns.items():
        if not np.isfinite(values).all():
            raise CertificateError(f"{name}: {sum(not math.isfinite(v) for v in values)} of {len(cases)} are no number")
    found = {name: summarise(values) for name, values in columns.items()}
    return Figures(
        n=len(cases),
        kl=_spread(found["kl"]),
        next_kl=_spread(found["next_kl"]),
        next_kl_edge=_p90_bound(columns["next_kl"]),
        top1=_interval(found["top1"].mean),
        first=_share_interval(sum(c.first for c in cases), len(cases)),
        exact=_interval(found["exact"].mean),
        cost=_interval(found["cost"].mean),
    )


def default_directory() -> Path:
    """``sglang-relay/certificates`` in the user's cache."""
    return user_cache("certificates")


def read_certificate(file: Path) -> Certificate:
    """Raises CertificateError when the file cannot be read or is not a certificate, or says what cannot be."""
    try:
        certificate = msgspec.json.decode(file.read_bytes(), type=Certificate)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CertificateError(f"{file}: no readable certificate ({error})") from error
    try:
        _check_figures("floor", certificate.floor)
        for candidate in certificate.candidates:
            _check_candidate(candidate)
    except ValueError as error:
        raise CertificateError(f"{file}: {error}") from error
    return certificate


def _check_candidate(candidate: Candidate) -> None:
    if candidate.policy not in POLICIES:
        raise ValueError(f"policy {candidate.policy!r}: allowed are {', '.join(POLICIES)}")
    if candidate.budget is not None:
        parse_budget(candidate.budget)
    _check_figures(candidate.label, candidate.figures)


def _check_figures(label: str, figures: Figures) -> None:
    """Raises ValueError where a figure is no number of its kind."""
    nats = {"kl": figures.kl, "next_kl": figures.next_kl}
    intervals = {f"{name}.{part}": getattr(spread, part) for name, spread in nats.items() for part in _PARTS}
    intervals |= {name: getattr(figures, name) for name in ("top1", "first", "exact", "cost")}
    numbers = {f"{name}.max": spread.max for name, spread in nats.items()} | {"next_kl_edge": figures.next_kl_edge}
    for name, interval in intervals.items():
        numbers |= {name: interval.value, f"{name}.low": interval.low, f"{name}.high": interval.high}
    for name, number in numbers.items():
        most = 1.0 if name.startswith(("top1", "first")) else _MOST_NATS if "kl" in name else math.inf
        if not (math.isfinite(number) and 0 <= number <= most):
            raise ValueError(f"{label}: {name} is {number}; allowed is 0 to {most}")
    if figures.n < 1:
        raise ValueError(f"{label}: n is {figures.n}; allowed is 1 or more")


def load_certificate(identity: Identity, where: Path | None = None) -> Certificate | None:
    """The certificate for ``identity``; None if none was made for its weights.

    where: a file, or a directory of them (by default the user's cache). Raises IdentityError, naming the fields, when
    the file, or every certificate of these weights, was made for something else, and CertificateError for a file that
    cannot be read.
    """
    where = where or default_directory()
    if not where.is_dir():
        if not where.exists() and where == default_directory():
            return None
        certificate = read_certificate(where)
        certificate.identity.require(identity, f"the certificate {where}")
        return certificate
    refused: IdentityError | CertificateError | None = None
    for file in sorted(where.glob(f"{_weights_name(identity)}-*.json")):
        try:
            certificate = read_certificate(file)
            certificate.identity.require(identity, f"the certificate {file}")
        except (IdentityError, CertificateError) as error:  # another one may fit
            refused = error
        else:
            return certificate
    if refused is not None:
        raise refused
    return None


def _file_name(identity: Identity) -> str:
    """One file per weights, dtype and versions, so that a server keeps its certificate while another is made."""
    rest = "-".join((identity.dtype, identity.sglang, identity.extension))
    return f"{_weights_name(identity)}-{re.sub(r'[^A-Za-z0-9.]+', '_', rest)}.json"


def _weights_name(identity: Identity) -> str:
    return re.sub(r"[^0-9A-Za-z]", "", identity.weights.rpartition(":")[2])[:24]


def _share(budget: str | None) -> float | None:
    """The budget as a share in (0, 1], None for other kinds."""
    try:
        value = float(budget or "")
    except ValueError:
        return None
    return value if 0 < value <= 1 else None


def _interval(estimate: Estimate) -> Interval:
    return Interval(*estimate)


def _spread(summary: Summary) -> Spread:
    return Spread(_interval(summary.mean), _interval(summary.median), _interval(summary.p90), summary.max)


def _share_interval(hits: int, n: int) -> Interval:
    """Clopper and Pearson's interval: a bootstrap of n hits in n knows no doubt."""
    from scipy.stats import binomtest

    ends = binomtest(hits, n).proportion_ci(CONFIDENCE, method="exact")
    return Interval(hits / n, float(ends.low), float(ends.high))


def _p90_bound(values: Sequence[float]) -> float:
    """The smallest order statistic that lies above the 90th percentile with 95 % confidence, else the maximum."""
    from scipy.stats import binom

    # The k-th smallest of n lies below the percentile when at least k values do: P(Binomial(n, .9) >= k).
    n = len(values)
    k = next((k for k in range(1, n + 1) if binom.sf(k - 1, n, 0.9) <= 1 - CONFIDENCE), n)
    return float(np.sort(values)[k - 1])


def _row(label: str, f: Figures) -> tuple[str, ...]:
    mean = f.kl.mean
    return (
        label,
        f"{100 * f.cost.value:.1f}",
        f"{mean.value:.2e} ({mean.low:.1e}..{mean.high:.1e})",
        f"{f.kl.median.value:.1e}",
        f"{f.kl.p90.value:.1e}",
        f"{f.kl.max:.1e}",
        f"{100 * f.top1.value:.1f}",
        f"{100 * f.first.value:.0f}",
        f"{f.exact.value:.1f}",
        str(f.n),
    )
