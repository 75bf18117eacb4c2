"""A server as it is shipped: audits on, cost model on, which every other test turns off or to its own ends."""

from __future__ import annotations

import itertools
import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prompts import random_tokens
from reference import Reference

from sglang_relay.config import RelayConfig
from sglang_relay.cost import TRIAL_EVERY
from sglang_relay.engine.consensus import digest_of
from sglang_relay.engine.requests import KINDS
from sglang_relay.measure.server import Server

VOCAB = 1024
SHIPPED = {"SGLANG_RELAY_AUDIT_EVERY": None, "SGLANG_RELAY_COST_MODEL": None}
TIER = "probe@0.3"
"""Of a model without a certificate."""


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    env = {**SHIPPED, "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}
    with Server(model, "--radix-cache-backend", "relay", "--max-total-tokens", 16384, env=env) as running:
        yield running


def relay(server: Server) -> dict[str, Any]:
    (internal,) = server.get("/server_info")["internal_states"]
    return internal["relay"]


def ask(server: Server, tokens: list[int], new: int, *, trial: bool = False, **custom: Any) -> Any:
    """trial: under an id for which the cost model is not asked."""
    fitting = (uuid.uuid4().hex for _ in itertools.count())
    rid = next(r for r in fitting if (digest_of(r) % TRIAL_EVERY == 0) is trial)
    return server.generate(tokens, fields={"rid": rid}, max_new_tokens=new, ignore_eos=True, custom_params=custom)


def test_what_is_shipped_serves_relays_and_watches_itself(server: Server, reference: Reference) -> None:
    shipped = RelayConfig()
    state = relay(server)
    assert (state["config"]["audit_every"], state["config"]["cost_model"]) == (shipped.audit_every, True)
    assert shipped.audit_every > 0 and shipped.cost_model
    assert state["active"] and state["default_tier"] == TIER and state["audit"] == {}
    assert state["cost"]["deciding"] and state["cost"]["calibration_seconds"] > 0

    rng = random.Random(3)
    text = ask(server, random_tokens(30, rng, VOCAB), 401)["output_ids"][:-1]
    reports = []
    for number in range(16):
        reused, tail = rng.randrange(100, 400), rng.randrange(5, 60)
        prompt = [*random_tokens(rng.randrange(5, 200), rng, VOCAB), *text[:reused], *random_tokens(tail, rng, VOCAB)]
        answer = ask(server, prompt, 4, trial=number < 4, relay_donate="none")
        report = answer["meta_info"]["relay"]
        assert sum(report[kind] for kind in KINDS) == len(prompt) and len(answer["output_ids"]) == 4, report
        assert report["declined"] in (None, "predicted_slower", "audited"), report
        if report["declined"] is None:
            assert (report["relayed"] + report["recomputed"], report["segments"]) == (reused, 1), report
            assert report["policy"] == "probe" and report["cost"] > 0.2, report
        else:
            assert (report["relayed"], report["recomputed"], report["segments"]) == (0, 0, 0), report
        reports.append(report)
    # One in 200 is audited, so that of four that are relayed whatever they cost three are at least.
    relayed = sum(report["declined"] is None for report in reports)
    assert relayed >= 3
    state = relay(server)
    assert state["stats"]["failures"] == 0 and state["stats"]["fallbacks"] == 0
    assert state["audit"][TIER]["open"] == 0 and state["audit"][TIER]["source"] == "default, no certificate"
    assert state["cost"]["deciding"] and state["cost"]["timed"] > 8

    prompt = [*random_tokens(50, rng, VOCAB), *text[:200], *random_tokens(20, rng, VOCAB)]
    for mode in ("exact", "off"):
        output = ask(server, prompt, 4, relay=mode)["output_ids"]
        for i, token in enumerate(output):
            assert int(reference.prefill(prompt + output[:i]).logits.argmax()) == token
