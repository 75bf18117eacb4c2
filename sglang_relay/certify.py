"""`sglang-relay certify`: measure how far every policy is from full prefill on one model, on a private server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import msgspec

from sglang_relay.budget import parse_budget
from sglang_relay.certificate import Candidate, Certificate, CertificateError, Figures, figures_of
from sglang_relay.config import RelayConfig
from sglang_relay.measure.chains import Decoding, build_chains
from sglang_relay.measure.divergence import FLOOR, SERVER_ARGS, Case, Choice, measure, parse_choice
from sglang_relay.measure.private import POOL, checkpoint, served_identity, starting
from sglang_relay.measure.server import Server
from sglang_relay.measure.tasks import Task, load_tasks
from sglang_relay.measure.vital import START_LIMIT_S
from sglang_relay.policies import make_policies
from sglang_relay.profile.run import read_tasks

POLICIES = (
    *("rotate", "legolink", "probe@0.05", "probe@0.1", "probe@0.2", "probe@0.3"),
    *("cacheblend@0.15", "cacheblend@0.2", "relay"),
)
"""What is measured where the user does not say; written as `parse_choice` reads it."""

FEW = 29
"""With fewer cases the bootstrap's intervals are too narrow, and no order statistic bounds the 90th percentile."""

_FORCED = (
    *SERVER_ARGS,
    *("--relay-default", "on", "--relay-policy", "full", "--relay-budget", "none", "--relay-certificate", "none"),
)
"""Last, and so stronger than the user's flags: what decides over requests that ask for nothing, an earlier certificate
among it, would have requests served exactly, or under another budget than the one that is recorded."""


def certify(
    model: str | Path,
    *,
    policies: Sequence[str] = POLICIES,
    cases: int | None = None,
    data: Path | None = None,
    server_args: Sequence[str] = (),
    start_limit: float = START_LIMIT_S,
    progress: Callable[[str], object] = lambda _: None,
) -> Certificate:
    """Certify ``model``, a checkpoint folder or the name of one in the local Hugging Face cache.

    Every policy, full prefill and the noise floor read the same prompts, in which other agents' texts stand; texts of
    an earlier run are reused. A policy without a budget is measured at its own default, and is recorded with it. A
    prompt that the server itself sends to full prefill (``long_suffix``) counts as it is served.

    policies: as `parse_choice` reads them. cases: only so many tasks, of all kinds alike. data: see
    `profile.run.read_tasks`; the held-out tasks of this project by default. server_args: flags of the private server;
    its settings are recorded in the certificate. start_limit: as in `Server`.
    Raises CertificateError, MeasureError, ProfileError (of ``data``), IdentityError, ServerError (of `measure`).
    """
    candidates = candidates_of(policies)
    tasks = spread(load_tasks("heldout") if data is None else read_tasks(data), cases)
    folder = checkpoint(model)
    flags = ("--max-total-tokens", POOL, *server_args, *_FORCED)
    with Server(folder, *flags, start_limit=start_limit, progress=starting(progress)) as server:
        state = _relay(server)
        _require_known(server, candidates)
        identity = served_identity(server, folder)
        chains = build_chains(server, folder, tasks, Decoding(), dtype=identity.dtype, progress=progress)
        found = measure(server, chains, candidates, progress=progress)
    of = {label: [case for case in found if case.policy == label] for label in {case.policy for case in found}}
    measured = [choice for choice in candidates if any(case.declined is None for case in of[choice.label])]
    if idle := [choice.label for choice in candidates if choice not in measured]:
        progress(f"not certified, as the server prefilled every prompt in full: {', '.join(idle)}")
    source = "held-out tasks of sglang-relay" if data is None else data.name
    return Certificate(
        identity=identity,
        settings=state["settings"],
        cases=f"{source}: {len(tasks)} prompts with {sum(len(chain.segments) for chain in chains)} reused texts",
        made=date.today().isoformat(),
        floor=_figures(of[FLOOR]),
        candidates=tuple(_candidate(choice.params, _figures(of[choice.label])) for choice in measured),
    )


def candidates_of(policies: Sequence[str]) -> list[Choice]:
    """The policies to measure, each once, with the budget that it runs at written as the server writes it.

    Raises CertificateError, naming the policy, for what no server would accept.
    """
    known = make_policies(RelayConfig(), num_layers=1)
    found: dict[tuple[Any, ...], Choice] = {}
    for label in policies:
        try:
            params = dict(parse_choice(label).params)
            policy = known.get(params["relay_policy"])
            if policy is None:
                raise ValueError(f"allowed are {', '.join(known)}")
            asked = params.pop("relay_budget", None)
            budget = policy.default_budget if asked is None else parse_budget(asked)
        except ValueError as error:
            raise CertificateError(f"policy {label}: {error}") from error
        if budget is not None and budget.kind not in policy.budgets:
            raise CertificateError(f"policy {label}: {policy.name} takes {' or '.join(policy.budgets) or 'no budget'}")
        if odd := [k for k, v in params.items() if v is not None and not isinstance(v, (str, int, float, bool))]:
            raise CertificateError(
                f"policy {label}: {', '.join(odd)}: a text, a number, true, false or null is expected"
            )
        params |= {} if budget is None else {"relay_budget": str(budget)}
        found.setdefault(tuple(sorted(params.items())), Choice(label, params))
    if not found:
        raise CertificateError("there is no policy to measure")
    return list(found.values())


def spread(tasks: Sequence[Task], count: int | None) -> list[Task]:
    """``count`` of the tasks, in their order: of every kind, with short and with long suffixes, equally many."""
    if count is not None and count < 1:
        raise CertificateError(f"cases: {count}, allowed is a number from 1")
    seen: Counter[tuple[str, bool]] = Counter()
    turns: list[tuple[int, int]] = []
    for i, task in enumerate(tasks):
        turns.append((seen[task.kind, task.long], i))
        seen[task.kind, task.long] += 1
    return [tasks[i] for i in sorted(i for _, i in sorted(turns)[:count])]


def _figures(cases: Sequence[Case]) -> Figures:
    """Those of all cases, but for the band of live audits: these see relayed answers only."""
    relayed = figures_of([case for case in cases if case.declined is None])
    return msgspec.structs.replace(figures_of(cases), next_kl_edge=relayed.next_kl_edge)


def _candidate(params: Mapping[str, Any], figures: Figures) -> Candidate:
    extra = {name: value for name, value in params.items() if name not in ("relay_policy", "relay_budget")}
    return Candidate(params["relay_policy"], params.get("relay_budget"), figures, extra)


def _relay(server: Server) -> dict[str, Any]:
    """What the server says of its relay, which must be on."""
    state = server.get("/server_info")["internal_states"][0]["relay"]
    if not state["active"]:
        raise CertificateError(f"the server does not relay this model: {', '.join(state['unsupported'])}")
    return state


def _require_known(server: Server, candidates: Sequence[Choice]) -> None:
    """Ask for every policy once, on a prompt too short to matter, before texts are decoded for hours."""
    for choice in candidates:
        answer = server.generate([0, 1, 2], max_new_tokens=1, custom_params={"relay_donate": "none", **choice.params})
        if answer["meta_info"]["relay"]["declined"] == "bad_custom_params":
            raise CertificateError(f"policy {choice.label}: the server knows no such parameters")
