"""How far the answers of a policy are from full prefill, measured on a running server from outside.

A prompt is read in two requests with the same ``custom_params``. The first is served as any request is, and leaves its
KV in the namespace of its policy. The second repeats the prompt with forced tokens behind it and asks for hidden states
and prompt logprobs from the prompt's last token on: so its prefix hit ends right before that token, and what it
computes are the rows whose next-token distributions are compared. The server returns these rows behind the final norm
(sglang/srt/layers/logits_processor.py, ``_get_hidden_states_to_store``); the distributions over the whole vocabulary
are computed here, in float32, and checked against the server's own logprobs of the forced tokens.
"""

from __future__ import annotations

import json
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

SERVER_ARGS = (
    *("--radix-cache-backend", "relay", "--enable-return-hidden-states"),
    *("--relay-audit-every", "0", "--relay-cost-model", "false"),
)
"""What a server needs to be measured: an audited request is served exactly, and so is one that relay would slow."""

CHOSEN_DECLINES = ("long_suffix", "below_min_relayed")
"""Declines by which the server chooses full prefill; any other one means that the policy was not measured."""

_LOGPROB_TOLERANCE = 0.1
"""Largest mean difference, in nats, between the server's logprobs and those computed here. Logits that the server
rounds to bfloat16 explain 0.01 to 0.02; a forgotten norm, scale or soft cap gives whole nats."""


_FOUND = 0.95
"""Least share of the donors' tokens that must be found again; page borders may cost some."""

_MAX_PAGE = 64
"""Largest page size; a prefix hit ends at a full page."""


class MeasureError(RuntimeError):
    """The server did not do what the measurement relies on; the message says what."""


class Choice(NamedTuple):
    """A policy as a request asks for it: the label it is reported under, and its ``custom_params``."""

    label: str
    params: Mapping[str, Any]


def parse_choice(label: str) -> Choice:
    """``name[@budget][+key=value...]``: ``probe@0.2+router=false`` asks for ``relay_policy: probe``,
    ``relay_budget: 0.2`` and ``relay_router: false``. Values are JSON, or text. ValueError for anything else."""
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


class Head:
    """The checkpoint's projection from hidden states to logits, in float32."""

    def __init__(self, model: str | Path) -> None:
        folder = Path(model)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tied = config.get("text_config", config).get("tie_word_embeddings", False)
        self._weight = _tensor(folder, "embed_tokens.weight" if tied else "lm_head.weight").float()

    @torch.inference_mode()
    def logprobs(self, hidden: Sequence[Sequence[float]]) -> np.ndarray:
        """Log-probabilities, float32 [rows, vocab], of the token behind each row of ``hidden`` [rows, width]."""
        rows = torch.tensor(hidden, dtype=torch.float32)
        return torch.log_softmax(rows @ self._weight.T, dim=-1).numpy()


def _tensor(folder: Path, ending: str) -> torch.Tensor:
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                if name.endswith(ending):
                    return tensors.get_tensor(name)
    raise MeasureError(f"{folder}: no tensor {ending} in safetensors files")


class Reading(NamedTuple):
    """logprobs: float32 [positions, vocab], the distribution before each forced token; report: ``meta_info["relay"]``
    of the first request; first: the token that it sampled greedily."""

    logprobs: np.ndarray
    report: dict[str, Any]
    first: int


def read(
    server: Server,
    head: Head,
    prompt: list[int],
    forced: list[int],
    params: Mapping[str, Any],
    *,
    salt: str | None = None,
    chunks: Sequence[int] = (),
) -> Reading:
    """Read ``prompt`` as the module says: the distributions before each of the ``forced`` tokens (at least 1).

    server: started with `SERVER_ARGS`. salt: the tenant, which must not know the prompt under these ``params``.
    chunks: lengths of the prompt up to which it is prefilled in requests of its own before.
    """
    ask = {"max_new_tokens": 1, "custom_params": {"relay_donate": "none", **params}}
    tenant = {"cache_salt": salt}
    for end in chunks:
        server.generate(prompt[:end], fields=tenant, **ask)
    served = server.generate(prompt, fields=tenant, **ask)
    last = len(prompt) - 1
    wanted = {"return_hidden_states": True, "return_logprob": True, "logprob_start_len": last}
    repeated = server.generate(prompt + forced[:-1], fields=tenant | wanted, **ask)["meta_info"]
    if repeated["prompt_tokens"] - repeated["cached_tokens"] >= len(forced) + _MAX_PAGE:
        raise MeasureError(f"only {repeated['cached_tokens']} of {last} prompt tokens were found again: {repeated}")
    hidden = [row for chunk in repeated["hidden_states"] for row in chunk]
    logprobs = head.logprobs(hidden[-len(forced) :])
    theirs = [value for value, *_ in repeated["input_token_logprobs"][1:]]
    ours = logprobs[np.arange(len(theirs)), forced[: len(theirs)]]
    if len(theirs) != len(forced) - 1 or (theirs and np.abs(ours - theirs).mean() > _LOGPROB_TOLERANCE):
        raise MeasureError(f"the server's logprobs {theirs} are not those of its hidden states {ours.tolist()}")
    return Reading(logprobs, served["meta_info"]["relay"], served["output_ids"][0])


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
    head: Head,
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
            return read(server, head, chain.prompt, chain.forced, params, salt=salt, chunks=chunks)

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
