"""`sglang-relay certify` on a real server with the tiny model, and the server that its certificate then decides for."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from tiny_model import make_tiny_llama

from sglang_relay.certificate import CertificateError, read_certificate
from sglang_relay.certify import POLICIES, _figures, _require_known, candidates_of, spread
from sglang_relay.cli import main
from sglang_relay.config import RelayConfig
from sglang_relay.engine.certified import choose
from sglang_relay.identity import identify
from sglang_relay.measure.divergence import Case
from sglang_relay.measure.server import Server
from sglang_relay.measure.tasks import load_tasks


def tokens(n: int, seed: int) -> list[int]:
    return torch.randint(3, 1024, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_a_certificate_from_the_command_line_and_the_server_that_obeys_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured among settings of the user that would have requests served exactly, and would end the start-up."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = make_tiny_llama(tmp_path / "model")
    flags = ["--dtype", "float32", "--max-total-tokens", "16384"]
    user = ["--page-size", "4", "--relay-audit-every", "1", "--relay-default", "exact", "--relay-certificate", "/gone"]
    asked = ["--policies", "rotate,probe@fast", "--cases", "2", "--bound", "2"]
    assert main(["certify", str(model), *asked, *flags, *user]) == 0
    shown, said = capsys.readouterr()
    assert "2 prompts are few" in said

    file = Path(shown.splitlines()[-1])
    found = read_certificate(file)
    assert file.parent == tmp_path / "cache" / "sglang-relay" / "certificates"
    assert found.identity == identify(model, dtype="float32")
    assert (found.settings["page_size"], found.settings["relay_layer_range"]) == (4, "1,3,5")
    assert found.cases == "held-out tasks of sglang-relay: 2 prompts with 2 reused texts"
    rotate, probe = found.candidates
    assert (rotate.label, probe.label, found.floor.n) == ("rotate", "probe@0.1", 2)
    assert found.floor.kl.max < 1e-8 < 1e-3 < rotate.figures.kl.mean.value < 2
    assert rotate.figures.cost.value < 0.01
    # The prompt with the long suffix was prefilled in full: exact, at the full price, and no audit would see it.
    assert 0.53 < probe.figures.cost.value < 0.65 and probe.figures.kl.mean.low < 1e-8 < 1e-4 < probe.figures.kl.max
    assert shown.startswith(found.table())
    will = "servers with policy=auto and bound=2 will relay with"
    assert f"\n{will} rotate: cheapest within 2 by the certificate of {found.made}\n" in shown

    # Nothing was measured within such a bound: the server says so, and relays all the same.
    chosen = choose(RelayConfig(bound="1e-9"), found)
    with Server(model, "--radix-cache-backend", "relay", *flags, env={"SGLANG_RELAY_BOUND": "1e-9"}) as server:
        state = server.get("/server_info")["internal_states"][0]["relay"]
        assert state["default_tier"] == chosen.tier == min(found.candidates, key=lambda c: c.figures.kl.mean.high).label
        assert f"policy {chosen.tier}: NO POLICY IS WITHIN 1e-9 by the certificate of {found.made}" in server.log()
        assert "is of other settings: page_size: measured with 4, now 1\n" in server.log()
        assert "the server is starting, " in said
        output = server.generate(tokens(30, 1), max_new_tokens=101, ignore_eos=True)["output_ids"][:-1]
        report = server.generate(tokens(20, 2) + output + tokens(10, 3), max_new_tokens=1)["meta_info"]["relay"]
        assert (report["policy"], report["declined"]) == (chosen.policy, None)
        assert report["relayed"] + report["recomputed"] == 100
        _require_known(server, candidates_of(POLICIES))
        with pytest.raises(CertificateError, match=r"policy rotate\+nonsense=1: the server knows no such"):
            _require_known(server, candidates_of(["full", "rotate+nonsense=1"]))


def test_a_budget_is_written_as_the_server_writes_it_and_measured_once() -> None:
    found = candidates_of(["probe@careful", "probe@0.30", "probe", "legolink@16", "legolink", "relay", "probe@+a=true"])
    assert [choice.params for choice in found] == [
        {"relay_policy": "probe", "relay_budget": "0.3"},
        {"relay_policy": "probe", "relay_budget": "0.2"},
        {"relay_policy": "legolink", "relay_budget": "16"},
        {"relay_policy": "relay"},
        {"relay_policy": "probe", "relay_budget": "0.2", "relay_a": True},
    ]
    assert len(candidates_of(POLICIES)) == len(POLICIES)


def test_few_tasks_are_of_all_kinds() -> None:
    tasks = load_tasks("heldout")
    assert spread(tasks, None) == spread(tasks, 1000) == tasks
    for count in (8, 16):
        few = spread(tasks, count)
        assert set(Counter((task.kind, task.long) for task in few).values()) == {count // 8}
        assert few == [task for task in tasks if task in few]


def test_the_band_of_audits_is_of_relayed_answers() -> None:
    """Prompts that the router sends to full prefill are exact; half of them would halve what an audit may find."""

    def case(i: int, kl: float, declined: str | None) -> Case:
        return Case(str(i), "single", "probe", 200, 100, 20, (kl,), 1.0, True, 1, 0.2, declined)

    relayed = [case(i, 1e-3 * i, None) for i in range(100)]
    routed = [case(100 + i, 0.0, "long_suffix") for i in range(100)]
    mixed, alone = _figures(relayed + routed), _figures(relayed)
    assert mixed.next_kl_edge == alone.next_kl_edge > 0.09
    assert (mixed.n, mixed.kl.mean.value) == (200, pytest.approx(alone.kl.mean.value / 2))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--bound", "0"], "bound='0': allowed is floor or"),
        (["--policies", "rotate,nonsense"], "policy nonsense: allowed are relay, probe"),
        (["--policies", "rotate,"], "policy : "),
        (["--policies", "rotate@0.2"], "policy rotate@0.2: rotate takes no budget"),
        (["--policies", "probe@lots"], "policy probe@lots: 'lots': allowed is a share"),
        (["--policies", "rotate+a=[1]"], r"policy rotate\+a=\[1\]: relay_a: a text, a number"),
        (["--cases", "0"], "cases: 0, allowed is"),
        (["--data", "/gone.jsonl"], "gone.jsonl: cannot be read"),
        ([], "no-such-model: neither a folder nor"),
    ],
)
def test_what_cannot_be_certified_is_named_before_a_server_starts(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["certify", "no-such-org/no-such-model", *arguments]) == 1
    shown, said = capsys.readouterr()
    assert shown == "" and re.match(f"sglang-relay certify: .*{reason}", said), said
