"""How far the answers of a policy are from full prefill, measured on a running server from outside.

A prompt is read in one request that decodes: a logit processor (engine/forcing.py) keeps the logits of every step,
float32 over the whole vocabulary, and forces the next token of a given continuation. So the request is served as any
other is, what the server does between decode steps included, and all policies are compared behind the same tokens.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sglang_relay.measure.chains import Chain
from sglang_relay.measure.server import Server

FLOOR = "floor"
"""Label of the noise floor: full prefill of the same prompt in two chunks instead of one."""

READ_ARGS = ("--enable-custom-logit-processor", "--enable-fp32-lm-head")
"""What a server needs to be read from. Logits that it rounds to bfloat16 would add 1e-2 nats of noise."""

SERVER_ARGS = (
    *("--radix-cache-backend", "relay", *READ_ARGS),
    *("--relay-audit-every", "0", "--relay-cost-model", "false", "--relay-report", "full"),
)
"""What a server needs to be measured: an audited request is served exactly, and so is one that relay would slow."""

CHOSEN_DECLINES = ("long_suffix", "below_min_relayed")
"""Declines by which the server chooses full prefill; any other one means that the policy was not measured."""

_PROCESSOR = json.dumps({"callable": b"csglang_relay.engine.forcing\nForced\n.".hex()})
"""The class `engine.forcing.Forced`, pickled by name, as ``CustomLogitProcessor.from_str`` reads it: a client that only
measures need not import SGLang."""

_FOUND = 0.95
"""Least share of the donors' tokens that must be found again; page borders may cost some."""


class MeasureError(RuntimeError):
    """The server did not do what the measurement relies on; the message says what."""


class Choice(NamedTuple):
    """A policy as a request asks for it: the label it is reported under, and its ``custom_params``."""

    label: str
    params: Mapping[str, Any]


def parse_choice(label: str) -> Choice:
    """``name[@budget][+key=value...]``: ``probe@0.2+quote_tokens=0`` asks for ``relay_policy: probe``,
    ``relay_budget: 0.2`` and ``relay_quote_tokens: 0``. Values are JSON, or text. ValueError for anything else."""
    head, *extras = label.split("+")
    name, _, budget = head.partition("@")
    params: dict[str, Any] = {"relay_policy": name}
    if budget:
        params["relay_budget"] = _value(budget)
    for extra in extras:
        key, equals, value = extra.partition("=")
        if not (key and equals):
            raise ValueError(f"{label!r}: expected key=value behind +, not {extra!r}")
        params[f"relay_{key}"] = _value(value)
    if not name or label == FLOOR:
        raise ValueError(f"{label!r} is no policy; expected name[@budget][+key=value...]")
    return Choice(label, params)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


class Reading(NamedTuple):
    """logprobs: float32 [positions, vocab], the distribution before each forced token; report: ``meta_info["relay"]``;
    first: the token that greedy decoding would have begun with."""

    logprobs: np.ndarray
    report: dict[str, Any]
    first: int


def read(
    server: Server,
    prompt: list[int],
    forced: list[int],
    params: Mapping[str, Any],
    *,
    salt: str | None = None,
    chunks: Sequence[int] = (),
) -> Reading:
    """Read ``prompt`` as the module says: the distributions before each of the ``forced`` tokens (at least 1).

    server: on this machine, started with `READ_ARGS`. salt: the tenant, which must not know the prompt under these
    ``params``. chunks: lengths of the prompt up to which it is prefilled in requests of its own before.
    Raises MeasureError when the server decodes anything but ``forced``, or a distribution is missing.
    """
    ask = {"relay_donate": "none", **params}
    tenant = {"cache_salt": salt}
    for end in chunks:
        server.generate(prompt[:end], fields=tenant, max_new_tokens=1, custom_params=ask)
    with tempfile.TemporaryDirectory(prefix="sglang-relay-read-") as folder:
        answer = server.generate(
            prompt,
            fields=tenant | {"custom_logit_processor": _PROCESSOR},
            max_new_tokens=len(forced),
            ignore_eos=True,
            custom_params={"forced_tokens": forced, "forced_folder": folder, **ask},
        )
        if answer["output_ids"] != forced:
            raise MeasureError(f"the server decoded {answer['output_ids']} where {forced} was forced: {answer}")
        logits = _logits(Path(folder), len(forced))
    logprobs = torch.log_softmax(torch.from_numpy(logits), dim=-1).numpy()
    return Reading(logprobs, answer["meta_info"]["relay"], int(logprobs[0].argmax()))


def _logits(folder: Path, steps: int) -> np.ndarray:
    """float32 [steps, vocab]"""
    try:
        return np.stack([np.load(folder / f"{step}.npy") for step in range(steps)])
    except (OSError, ValueError) as error:  # no such file, or rows of different lengths
        raise MeasureError(f"the server did not leave {steps} distributions of one length: {error}") from error


class Divergence(NamedTuple):
    """Of one policy on one prompt. kl: float64 [positions], KL(full || policy) in nats; agree: bool [positions],
    whether both distributions have the same most likely token."""

    kl: np.ndarray
    agree: np.ndarray

    @property
    def exact_length(self) -> int:
        """Tokens for which the policy's greedy continuation equals that of full prefill."""
        return int(np.argmin(self.agree)) if not self.agree.all() else len(self.agree)


def compare(reference: np.ndarray, other: np.ndarray) -> Divergence:
    """Both float32 [positions, vocab], log-probabilities."""
    p, q = _normalised(reference), _normalised(other)
    return Divergence((np.exp(p) * (p - q)).sum(axis=1), p.argmax(axis=1) == q.argmax(axis=1))


def _normalised(logprobs: np.ndarray) -> np.ndarray:
    """float64; in float32 the probabilities of a row miss one by 1e-7, which would count as divergence."""
    x = logprobs.astype(np.float64)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


@dataclass(frozen=True, slots=True)
class Case:
    """One policy on one chain. Counts are tokens.

    kl: nats, one value per position. top1: share of positions with the same most likely token. first: whether that
    holds at the first position. exact_length: see `Divergence`; bounded by ``positions``. cost: recomputed share of the
    token-layers of the ``reused`` tokens, a probe pass included; tokens that were not reused count as recomputed.
    """

    chain: str
    kind: str
    policy: str
    prompt: int
    reused: int
    suffix: int
    kl: tuple[float, ...]
    top1: float
    first: bool
    exact_length: int
    cost: float
    declined: str | None

    @property
    def kl_mean(self) -> float:
        return float(np.mean(self.kl))

    @property
    def ratio(self) -> float:
        """Fresh suffix over reused segments."""
        return self.suffix / self.reused


def measure(
    server: Server,
    chains: Sequence[Chain],
    choices: Sequence[Choice],
    *,
    floor: bool = True,
    progress: Callable[[str], object] = lambda _: None,
) -> list[Case]:
    """Every policy, and the noise floor, on every chain, against full prefill on the same server.

    Each reading has a tenant of its own, in which only the chain's donors were placed before: a policy that serves a
    prompt exactly would otherwise be the exact prefix of the next one.

    Raises MeasureError when a policy does not reuse the donors' tokens, for another reason than `CHOSEN_DECLINES`.
    """
    cases: list[Case] = []
    run = uuid.uuid4().hex
    for number, chain in enumerate(chains):

        def one(label: str, params: Mapping[str, Any], chunks: Sequence[int] = (), chain: Chain = chain) -> Reading:
            salt = f"{run}/{chain.task.id}/{label}"
            if "relay" not in params:
                chain.donate(server, salt)
            return read(server, chain.prompt, chain.forced, params, salt=salt, chunks=chunks)

        reference = one("full prefill", {"relay": "off"}).logprobs
        readings = {choice.label: one(choice.label, choice.params) for choice in choices}
        for label, reading in readings.items():
            require_reuse(label, reading.report, chain.reused)
        if floor:
            readings[FLOOR] = one(FLOOR, {"relay": "off"}, [len(chain.prompt) // 2])
        cases += [_case(chain, label, reference, reading) for label, reading in readings.items()]
        row = ", ".join(f"{case.policy} {case.kl_mean:.1e}" for case in cases[-len(readings) :])
        progress(f"{chain.task.id} ({number + 1} of {len(chains)}): {row}")
    return cases


def require_reuse(label: str, report: Mapping[str, Any], reused: int) -> None:
    """Raise MeasureError unless ``report`` says that the ``reused`` tokens of donors were reused, or were prefilled
    because the server chose to: what is prefilled for another reason looks exact."""
    if report["declined"] in CHOSEN_DECLINES:
        return
    if report["declined"] is not None or report["relayed"] + report["recomputed"] < _FOUND * reused:
        raise MeasureError(f"{label} was to reuse {reused} tokens, but the server reports {dict(report)}")


def _case(chain: Chain, label: str, reference: np.ndarray, reading: Reading) -> Case:
    found = compare(reference, reading.logprobs)
    return Case(
        chain=chain.task.id,
        kind=chain.task.kind,
        policy=label,
        prompt=len(chain.prompt),
        reused=chain.reused,
        suffix=chain.suffix,
        kl=tuple(found.kl.tolist()),
        top1=float(found.agree.mean()),
        first=bool(found.agree[0]),
        exact_length=found.exact_length,
        cost=cost_of(reading.report, chain.reused),
        declined=None if label == FLOOR else reading.report["declined"],
    )


def cost_of(report: Mapping[str, Any], reused: int) -> float:
    """`Case.cost` from ``meta_info["relay"]``, for a prompt that holds ``reused`` tokens of producers."""
    placed = report["relayed"] + report["recomputed"]
    share = report.get("cost")
    if share is None:
        share = report["recomputed"] / placed if placed else 0.0
    return (share * placed + max(0, reused - placed)) / max(reused, placed)
