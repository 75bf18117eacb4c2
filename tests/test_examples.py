"""Both examples, run as a user runs them, at small settings on the small real model."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_relay.fetch_model import ensure_model
from sglang_relay.measure.server import Server

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / script), *map(str, arguments)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)


@pytest.fixture(scope="module")
def relay_server() -> Iterator[Server]:
    with Server(ensure_model("smollm2-135m"), "--radix-cache-backend", "relay") as server:
        yield server


def test_quickstart_on_its_own_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = tmp_path / "figures.json"
    # The texts are short here: the question behind them would send them to full prefill (``long_suffix``).
    monkeypatch.setenv("SGLANG_RELAY_ROUTE_ABOVE", "100")
    # Above the server's least number of reused tokens (RelayConfig.min_relayed) already for the second agent.
    done = run("quickstart.py", "--max-tokens", 96, "--repeats", 1, "--json", figures)
    assert done.returncode == 0, done.stderr
    agents = json.loads(figures.read_text())["agents"]
    assert [agent["name"] for agent in agents] == ["planner", "treasurer", "reviewer"]
    assert all(agent["ttft_ms_exact"] > 0 and agent["ttft_ms_relay"] > 0 for agent in agents)

    first, *later = agents
    assert first["relayed"] == first["recomputed"] == first["segments"] == 0
    assert first["matched_share"] is None
    # Nothing is reused, so both answers come from the same computation.
    assert first["answer_exact"] == first["answer_relay"]
    for number, agent in enumerate(later, 1):
        assert agent["declined"] is None
        assert agent["segments"] >= number
        # In the few places where a text is tokenized otherwise than it was decoded, an end shorter than min_segment
        # (32) is lost with it; a whole text that is not found would leave at most half.
        assert agent["matched_share"] >= 1 - 32 / 96
        # The prefix of the chat template is all that a new number at the head leaves to the prefix cache.
        assert agent["exact"] < 16
        assert agent["fresh"] > 0
        assert agent["answer_exact"]

    head, *rows = [line for line in done.stdout.splitlines() if re.match(r"(agent|planner|treasurer|reviewer)  ", line)]
    assert head.split()[:3] == ["agent", "TTFT", "exact"]
    assert len(rows) == 3
    for agent in agents:
        assert f"{agent['name']}: " in done.stdout
    assert "planner: both answers are the same" in done.stdout
    assert "starting the server" in done.stderr


def test_team(relay_server: Server) -> None:
    done = run("team.py", "--max-tokens", 64, "--url", relay_server.url)
    assert done.returncode == 0, done.stderr
    row = r"^(architect|developer 1|developer 2|reviewer) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)(  declined: .*)?$"
    rows = {found[1]: found for found in re.finditer(row, done.stdout, re.MULTILINE)}
    assert list(rows) == ["architect", "developer 1", "developer 2", "reviewer"]
    for found in rows.values():
        prompt, prefix, relayed, recomputed, fresh = (int(found[i]) for i in range(2, 7))
        assert prefix + relayed + recomputed + fresh == prompt
    # A fork shares the architect's prompt and text by prefix; the last token of a text has no KV when it is finished.
    plan_end = int(rows["architect"][2]) + 63
    for name in ("developer 1", "developer 2"):
        assert int(rows[name][3]) >= plan_end - 1
        assert int(rows[name][4]) + int(rows[name][5]) == 0
    reused = int(rows["reviewer"][4]) + int(rows["reviewer"][5])
    assert reused >= 0.9 * 3 * 64
    assert int(rows["reviewer"][7]) >= 3


def test_a_server_that_does_not_come_up_is_explained(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    done = run("quickstart.py", "--model", tmp_path)
    assert done.returncode == 1
    assert "the server ended with status" in done.stderr
    # The end of the log names the cause; the example's own code adds no traceback after it.
    assert "the end of its log" in done.stderr
    assert str(EXAMPLES / "serving.py") not in done.stderr


@pytest.mark.parametrize("script", ["quickstart.py", "team.py"])
def test_no_server_at_the_url(script: str) -> None:
    done = run(script, "--url", "http://127.0.0.1:9")
    assert done.returncode == 1
    assert "no SGLang server answers at http://127.0.0.1:9" in done.stderr
    assert "Traceback" not in done.stderr
