"""Living beside another plugin, and being installed without being selected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from plugins import Inspector, install_plugin
from tiny_model import make_tiny_llama

from sglang_relay.measure.server import Server

PROMPT = [11, 12, 13, 14, 15, 16, 17, 18]
NEIGHBOUR = """
import json, os
from pathlib import Path
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

SEEN = Path(os.environ["NEIGHBOUR_SEEN"])
COUNTS = {"prepare": 0, "run": 0}

def count(name):
    def hook(original, *args, **kwargs):
        COUNTS[name] += 1
        SEEN.write_text(json.dumps(COUNTS))
        return original(*args, **kwargs)
    return hook

def load():
    scheduler = "sglang.srt.managers.scheduler.Scheduler.run_batch"
    HookRegistry.register(scheduler, count("run"), HookType.AROUND)
    batch = "sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_extend"
    HookRegistry.register(batch, count("prepare"), HookType.AROUND)
"""
"""A plugin that hooks what the relay hooks too, and counts its calls."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("plugins"))


def ask(server: Server, prompt: list[int], new: int = 24) -> Any:
    return server.generate(prompt, max_new_tokens=new, ignore_eos=True, fields={"return_logprob": True})


def logprobs(answer: Any) -> list[float]:
    return [value for value, *_ in answer["meta_info"]["output_token_logprobs"]]


def test_a_second_plugin_keeps_working_and_so_does_the_relay(model: Path, tmp_path: Path) -> None:
    env = install_plugin(tmp_path / "neighbour", "relay_test_neighbour", NEIGHBOUR)
    seen = tmp_path / "seen.json"
    with Server(model, "--radix-cache-backend", "relay", env={**env, "NEIGHBOUR_SEEN": str(seen)}) as server:
        donor = ask(server, PROMPT, new=120)["output_ids"]
        before = json.loads(seen.read_text())
        report = ask(server, [5, 6, 7, *donor, 8])["meta_info"]["relay"]
        after = json.loads(seen.read_text())
        state = server.get("/server_info")["internal_states"][0]["relay"]
    assert report["relayed"] + report["recomputed"] == 119
    assert state["active"] and all(state["hooks"].values())
    assert after["prepare"] == before["prepare"] + 1
    assert after["run"] >= before["run"] + 24


def test_installed_but_not_selected_changes_nothing(model: Path, tmp_path: Path) -> None:
    """The same bits as a server whose plugins exclude the relay, and no hook of ours where requests are served."""
    inspector = Inspector(tmp_path / "inspector")
    with Server(model, env=inspector.env) as installed:
        ours = [ask(installed, p) for p in (PROMPT, PROMPT[::-1] * 40)]
        hooked = inspector.ask(installed, "hooked")
    # SGLANG_PLUGINS names the plugins that are loaded; the CPU platform's own must stay.
    with Server(model, env={"SGLANG_PLUGINS": "relay_cpu"}) as excluded:
        theirs = [ask(excluded, p) for p in (PROMPT, PROMPT[::-1] * 40)]
    for a, b in zip(ours, theirs, strict=True):
        assert a["output_ids"] == b["output_ids"] and logprobs(a) == logprobs(b)
        assert "relay" not in a["meta_info"]
    assert hooked == [
        "sglang.srt.managers.multi_tokenizer_mixin.write_data_for_multi_tokenizer",
        "sglang.srt.managers.tokenizer_manager.TokenizerManager.__init__",
        "sglang.srt.server_args.ServerArgs.add_cli_args",
        "sglang.srt.server_args.ServerArgs.check_server_args",
        "sglang.srt.server_args.ServerArgs.from_cli_args",
    ], "start-up only"
