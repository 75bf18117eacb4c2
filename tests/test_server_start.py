"""How long a start may take: as long as it goes on. The servers here are scripts that take their time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sglang_relay.cli import main
from sglang_relay.measure.server import Server, ServerError
from sglang_relay.measure.vital import Process, Signs, alive

LIMIT = 2.0
"""Seconds without a sign of life; every start here that succeeds takes longer than that."""

HEAD = """
import sys, time, http.server
def serve(status):
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
began = time.monotonic()
"""
SAYS = "while time.monotonic() - began < 4: print('loading', flush=True); time.sleep(0.5)\nserve(200)"
WORKS = "while time.monotonic() - began < 4: sum(range(10000))\nserve(200)"
READS = "while time.monotonic() - began < 4: open('/dev/zero', 'rb').read(1 << 20); time.sleep(0.3)\nserve(200)"
SLEEPS = "time.sleep(600)"
IS_NEVER_READY = "serve(503)"


def server(tmp_path: Path, code: str) -> Server:
    found = Server(tmp_path, log_path=tmp_path / "log", start_limit=LIMIT)
    found._command = [sys.executable, "-c", HEAD + code, str(found.port)]
    return found


@pytest.mark.parametrize("code", [SAYS, WORKS, READS], ids=["says", "works", "reads"])
def test_a_start_that_goes_on_is_waited_for(tmp_path: Path, code: str) -> None:
    with server(tmp_path, code) as running:
        assert running.get("/health") == ""


@pytest.mark.parametrize("code", [SLEEPS, IS_NEVER_READY], ids=["sleeps", "is never ready"])
def test_one_that_stands_still_is_given_up(tmp_path: Path, code: str) -> None:
    """Nor is it a sign of life to log that one is asked, and to answer that one is not ready."""
    with (
        pytest.raises(ServerError, match=r"neither worked nor said anything \(start limit: 2 s\)"),
        server(tmp_path, code),
    ):
        pass


def test_one_that_ends_is_not_waited_for(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="ended with status 3"), server(tmp_path, "sys.exit(3)"):
        pass


@pytest.mark.parametrize(
    ("after", "lives"),
    [
        (Signs(10, {1: Process(5.0, 0)}), False),
        (Signs(10, {1: Process(5.05, 1000)}), False),  # it is asked, and polls
        (Signs(10, {}), False),
        (Signs(11, {1: Process(5.0, 0)}), True),
        (Signs(10, {1: Process(5.0, 0), 2: Process(0.0, 0)}), True),
        (Signs(10, {1: Process(5.5, 0)}), True),
        (Signs(10, {1: Process(5.0, 1 << 20)}), True),
    ],
)
def test_signs_of_life(after: Signs, lives: bool) -> None:
    assert alive(Signs(10, {1: Process(5.0, 0)}), after, 1.0) is lives


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_a_start_limit_that_is_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("certify", "profile"):
        with pytest.raises(SystemExit):
            main([command, "M", "--start-limit", text])
        assert "--start-limit" in capsys.readouterr().err
