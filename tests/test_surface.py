"""What users see, pinned in surface.json: names and texts that others' programs and notes may hold on to.

A change there is to be meant, and stands in CHANGELOG.md. It is written anew, section by section, by
``RELAY_TEST_WRITE_SURFACE=1 python -m pytest tests/test_surface.py``; review the difference.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import random
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from plugins import install_plugin
from prompts import random_tokens

from sglang_relay import cli
from sglang_relay.config import POLICIES, RelayConfig
from sglang_relay.cost import TRIAL_EVERY
from sglang_relay.declines import SECTIONS
from sglang_relay.engine.consensus import digest_of
from sglang_relay.measure.server import Server

PINNED = Path(__file__).with_name("surface.json")
VOCAB = 1024
EVERYTHING_ON = {"SGLANG_RELAY_COST_MODEL": "true", "SGLANG_RELAY_INFLUENCE": "auto", "SGLANG_RELAY_ENTRY": "hidden"}
"""What adds to the reports and to ``/server_info``."""
HOPELESS = {"relay_policy": "probe", "relay_budget": 1.0}
"""Everything runs again, and a probe before it: predicted to be slower."""
NAMED_BY_OTHERS = ("audit", "declined")
"""Objects of ``/server_info`` whose keys are tiers and reasons."""


def check(section: str, found: Any) -> None:
    pinned = json.loads(PINNED.read_text(encoding="utf-8")) if PINNED.exists() else {}
    if os.environ.get("RELAY_TEST_WRITE_SURFACE"):
        PINNED.write_text(json.dumps(pinned | {section: found}, indent=1) + "\n", encoding="utf-8")
        return
    before, now = (json.dumps(part, indent=1).splitlines() for part in (pinned.get(section), found))
    difference = list(difflib.unified_diff(before, now, "pinned", "found", n=2, lineterm=""))
    if difference:
        pytest.fail("\n".join([f"{section} changed; see the docstring of {__name__}", *difference]), pytrace=False)


# ---------------------------------------------------------------------- what no server is needed for


def test_settings_and_their_defaults() -> None:
    config = RelayConfig()
    check("settings", {f.name: getattr(config, f.name) for f in fields(config)})


def test_policies() -> None:
    check("policies", list(POLICIES))


def test_declines() -> None:
    """test_declines.py holds the table to the sources."""
    check("declines", {title: sorted(reasons) for title, _, reasons in SECTIONS})


def test_command_line_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")

    def text(*command: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main([*command, "--help"])
        assert ended.value.code == 0
        return capsys.readouterr().out

    general = text()
    names = re.findall(r"^    ([a-z-]+)", general, re.MULTILINE)
    assert "doctor" in names
    check("help", {"": general.splitlines()} | {name: text(name).splitlines() for name in names})


# ---------------------------------------------------------------------- what a server shows


class Served:
    """A server, and the reports of requests to it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        rng = random.Random(5)
        donor = self._ask(random_tokens(30, rng, VOCAB), {"relay": "exact"}, 201)["output_ids"]

        def report(custom: dict[str, Any], *, trial: bool) -> dict[str, Any]:
            prompt = [*random_tokens(30, rng, VOCAB), *donor[:-1], *random_tokens(10, rng, VOCAB)]
            return self._ask(prompt, custom | {"relay_donate": "none"}, 1, trial=trial)["meta_info"]["relay"]

        self.relayed = report({}, trial=True)
        self.by_the_paper = report({"relay_policy": "relay"}, trial=True)
        self.slower = report(HOPELESS, trial=False)
        self.refused = report({"relay_nonsense": 1}, trial=False)

    def _ask(self, tokens: list[int], custom: dict[str, Any], new: int, *, trial: bool = False) -> Any:
        """trial: under an id for which the cost model is not asked."""
        rid = next(r for r in (os.urandom(8).hex() for _ in itertools.count()) if _is_trial(r) is trial)
        return self.server.generate(
            tokens, max_new_tokens=new, ignore_eos=True, custom_params=custom, fields={"rid": rid}
        )


def _is_trial(rid: str) -> bool:
    return digest_of(rid) % TRIAL_EVERY == 0


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Its cost model decides by the prior: what is predicted does not depend on this machine."""
    folder = tmp_path_factory.mktemp("surface")
    code = (Path(__file__).parent / "cost_fault_plugin.py").read_text(encoding="utf-8")
    env = install_plugin(folder / "plugin", "relay_test_cost_fault", code)
    env |= {**EVERYTHING_ON, "RELAY_TEST_COST": str(folder), "XDG_CACHE_HOME": str(folder / "cache")}
    (folder / "fault").write_text("calibrate", encoding="utf-8")
    flags = ("--radix-cache-backend", "relay", "--enable-metrics", "--disable-cuda-graph")
    with Server(model, *flags, "--max-total-tokens", 8192, env=env) as server:
        (folder / "fault").write_text("observe", encoding="utf-8")  # nor is anything learnt
        yield Served(server)


def test_report_fields(served: Served) -> None:
    assert served.relayed["declined"] is served.by_the_paper["declined"] is None
    assert (served.slower["declined"], served.refused["declined"]) == ("predicted_slower", "bad_custom_params")
    slower = sorted(_paths(served.slower))
    check("report", {"": sorted(served.relayed), "relay": sorted(served.by_the_paper), "predicted_slower": slower})


def test_request_parameters(served: Served) -> None:
    check("custom_params", served.refused["why"])


def test_server_info_keys(served: Served) -> None:
    (internal,) = served.server.get("/server_info")["internal_states"]
    assert internal["relay"]["audit"] and internal["relay"]["stats"]["declined"]
    check("server_info", sorted(_paths(internal["relay"])))


def test_metric_names(served: Served) -> None:
    shown = re.findall(r"^(sglang_relay:\w+)(.*)", served.server.get("/metrics"), re.MULTILINE)
    labels = {name: sorted(re.findall(r'(\w+)="', rest)) for name, rest in shown}
    check("metrics", dict(sorted(labels.items())))


def _paths(shown: dict[str, Any], above: str = "") -> Iterator[str]:
    """``stats/seconds/plan`` for each key that holds no object, or an empty one."""
    for key, value in shown.items():
        if not isinstance(value, dict) or not value:
            yield above + key
        elif key in NAMED_BY_OTHERS:
            yield from _paths({"*": next(iter(value.values()))}, f"{above}{key}/")
        else:
            yield from _paths(value, f"{above}{key}/")
