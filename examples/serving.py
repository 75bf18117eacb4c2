"""What the examples share: their server, either one that runs already (``--url``) or an own one, and its model."""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import requests
import torch

from sglang_relay.fetch_model import ensure_model
from sglang_relay.models.sources import ModelError

DEFAULT_MODEL = "smollm2-135m"
START_LIMIT_S = 600
LOG_LINES = 30


def say(message: str) -> None:
    """Progress goes to stderr; stdout is for results."""
    print(message, file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    """End the example with a message instead of a traceback."""
    say(f"\n{message}")
    sys.exit(1)


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """``--url`` and ``--model``."""
    parser.add_argument("--url", help="a running server, e.g. http://127.0.0.1:30000 (default: start an own one)")
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="for the own server: a checkpoint folder, a Hub name, or %(default)s, which is fetched (the default)",
    )


@contextlib.contextmanager
def server(args: argparse.Namespace) -> Iterator[str]:
    """The URL of the server that the arguments ask for; an own one ends with the context."""
    if args.url:
        url = args.url.rstrip("/").removesuffix("/v1")
        if not _healthy(url):
            fail(f"no SGLang server answers at {url}")
        yield url
    else:
        with _own_server(_checkpoint(args.model)) as url:
            yield url


def _checkpoint(model: str) -> str:
    if model != DEFAULT_MODEL:
        return model
    try:
        return str(ensure_model(model))
    except ModelError as error:
        fail(str(error))


@contextlib.contextmanager
def _own_server(model: str) -> Iterator[str]:
    """A stock SGLang server with the relay extension on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--radix-cache-backend", "relay", "--sleep-on-idle"]
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment.setdefault("SGLANG_PLATFORM", "relay_cpu")
    with tempfile.NamedTemporaryFile("w+", prefix="sglang-relay-", suffix=".log") as log:
        # A session of its own, so that all its processes can be ended together, and Ctrl-C reaches this script first.
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _await_start(process, url, Path(log.name))
            yield url
        finally:
            _stop(process)


def _await_start(process: subprocess.Popen, url: str, log: Path) -> None:
    started = told = time.monotonic()
    say(f"starting the server: {' '.join(process.args)}")  # type: ignore[arg-type]
    while not _healthy(url):
        waited = time.monotonic() - started
        if process.poll() is not None or waited > START_LIMIT_S:
            what = f"ended with status {process.returncode}" if process.poll() is not None else "does not come up"
            tail = "\n".join(f"  {line}" for line in log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            fail(f"the server {what} after {waited:.0f} s; the end of its log:\n{tail}")
        if time.monotonic() - told >= 5:
            told = time.monotonic()
            say(f"  {waited:3.0f} s  {_last_line(log)}")
        time.sleep(0.5)
    say(f"  ready after {time.monotonic() - started:.0f} s")


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:100] if lines else ""


def _healthy(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=10).status_code == 200
    except requests.RequestException:
        return False


def _stop(process: subprocess.Popen) -> None:
    """End the server and the processes it started, by the id of their session."""
    for sign, patience_s in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
