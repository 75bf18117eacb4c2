"""``sglang-relay doctor`` on this installation; its reading of a running server is in test_controls.py."""

from __future__ import annotations

import subprocess
import sys

from sglang_relay.engine import doctor


def _run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sglang_relay.cli", *args], capture_output=True, text=True, check=False
    )


def test_this_installation_fits() -> None:
    done = _run("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BAD" not in done.stdout and "plugin entry point: sglang_relay.engine.plugin:load" in done.stdout


def test_a_silent_server_is_named() -> None:
    done = _run("doctor", "--url", "http://127.0.0.1:9")
    assert done.returncode == 1 and "http://127.0.0.1:9 does not answer" in done.stderr


def test_a_function_that_changed_is_found() -> None:
    """SGLang renames or reorders a parameter that a hook relies on, or drops the function."""
    target = "sglang.srt.managers.scheduler.Scheduler.run_batch"
    assert doctor._signature(target, ["self", "batch"]).ok
    assert not doctor._signature(target, ["self", "plan"]).ok
    gone = doctor._signature("sglang.srt.managers.scheduler.Scheduler.no_such_method", ["self"])
    assert not gone.ok and "no_such_method" in gone.detail


def test_a_stock_server_is_told_apart() -> None:
    (finding,) = doctor.server({"internal_states": [{}], "radix_cache_backend": None})
    assert not finding.ok and "not selected" in finding.detail
