"""A real SGLang server on this machine: started, awaited, queried and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import requests
import torch

from sglang_relay.measure import vital
from sglang_relay.measure.vital import START_LIMIT_S

LOG_TAIL = 4000
"""Characters of the log that a failed start shows."""

PROGRESS_S = 5.0
"""Seconds between two calls of ``progress`` while a server starts."""

LOOK_S = 1.0
"""Seconds between two looks for a sign of life."""


class ServerError(RuntimeError):
    """The server did not come up or died; the message ends with the end of its log."""


class Server:
    """``python -m sglang.launch_server`` as a context manager; on the CPU platform where no GPU is present.

    The server runs in a session and process group of its own; leaving the context ends these processes and no others.

    Args:
        model: checkpoint directory; with the Hugging Face Hub within reach also a name there.
        args: further command line flags, e.g. ``"--page-size", 16``. They come last and so win over those set here.
        env: environment variables on top of the caller's; None as a value removes a variable.
        log_path: the server's log; by default a new file in the temporary directory, removed unless the start failed.
        start_limit: seconds for which a start may show no sign of life (`vital.alive`) before it is given up.
        progress: called every few seconds until the server answers, with the seconds that passed and the log's last
            line.

    Raises:
        ServerError: on entering the context, when the server ends before it answers, or stands still.

    Example:
        >>> with Server(model, "--page-size", 16) as server:
        ...     server.generate([5, 6, 7], max_new_tokens=4)["output_ids"]
    """

    answer_limit: ClassVar[float | None] = None
    """Seconds that an answer may take; None: as long as the server lives. How long one takes depends on the model and
    the machine, and a server whose forward hangs ends itself (SGLang's ``--watchdog-timeout``)."""

    def __init__(
        self,
        model: str | Path,
        *args: object,
        env: Mapping[str, str | None] | None = None,
        log_path: str | Path | None = None,
        start_limit: float = START_LIMIT_S,
        progress: Callable[[float, str], object] | None = None,
    ) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._start_limit = start_limit
        self._progress = progress
        self._keep_log = log_path is not None
        self.log_path = Path(log_path) if log_path is not None else _new_log()
        self._command = [
            *(sys.executable, "-m", "sglang.launch_server"),
            *("--model-path", str(model), "--host", "127.0.0.1", "--port", str(self.port)),
            *("--skip-server-warmup", "--sleep-on-idle"),
            *map(str, args),
        ]
        self._scratch = tempfile.TemporaryDirectory(prefix="sglang-server-", ignore_cleanup_errors=True)
        self._env = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TMPDIR": self._scratch.name,
            # Otherwise each /health runs a one-token request, which shows up in the radix cache and in counters.
            "SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0",
        }
        if not torch.cuda.is_available():
            self._env.setdefault("SGLANG_PLATFORM", "relay_cpu")
        if Path(model).is_dir():
            self._env["HF_HUB_OFFLINE"] = "1"
        for name, value in (env or {}).items():
            self._env.pop(name, None)
            if value is not None:
                self._env[name] = value
        self._process: subprocess.Popen[bytes] | None = None
        self._http = requests.Session()

    def __enter__(self) -> Self:
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._await_ready()
        except BaseException:
            self._keep_log = True
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def command(self) -> str:
        """The command line that starts the server."""
        return " ".join(self._command)

    @property
    def pid(self) -> int:
        """Process id of the launcher, which is also the id of the server's session and process group."""
        assert self._process is not None, "the server is not started"
        return self._process.pid

    def log(self) -> str:
        """Everything the server has written so far."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def post(self, path: str, json: Any = None, *, timeout: float | None = None) -> Any:
        """POST `json` and return the decoded answer (text if it is no JSON); HTTP errors raise with the body.

        timeout: seconds, instead of `answer_limit`.
        """
        return _body(self._http.post(self.url + path, json=json, timeout=timeout or self.answer_limit))

    def get(self, path: str, *, timeout: float | None = None) -> Any:
        """GET, as `post`."""
        return _body(self._http.get(self.url + path, timeout=timeout or self.answer_limit))

    def generate(self, prompt: str | list[Any], *, fields: Mapping[str, Any] | None = None, **sampling: Any) -> Any:
        """``/generate`` for a text, a list of texts, token ids or a list of them; greedy unless `sampling` says else.

        Args:
            prompt: text or token ids.
            fields: further fields of the request, e.g. ``{"return_logprob": True}``.
            sampling: sampling parameters, e.g. ``max_new_tokens=8``.
        """
        first = prompt if isinstance(prompt, str) or not prompt else prompt[0]
        name = "text" if isinstance(first, str) else "input_ids"
        request = {name: prompt, "sampling_params": {"temperature": 0, **sampling}, **(fields or {})}
        return self.post("/generate", request)

    def stop(self) -> None:
        """End the server's processes; safe to call twice.

        They are killed: a graceful end takes SGLang several seconds and a test server has nothing to save. What the
        server leaves in its temporary directory (sockets, metrics) goes with that directory.
        """
        self._http.close()
        if self._process is not None:
            # The server leads a process group of its own, so nobody else is hit.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._scratch.cleanup()
        if not self._keep_log:
            self.log_path.unlink(missing_ok=True)

    def _await_ready(self) -> None:
        assert self._process is not None
        started = told = lived = time.monotonic()
        signs = vital.signs(self._process.pid, self.log_path)
        looked = started
        while True:
            if self._process.poll() is not None:
                raise ServerError(f"the server ended with status {self._process.returncode}; {self._tail()}")
            with contextlib.suppress(requests.RequestException):
                if self._http.get(self.url + "/health", timeout=5).status_code == 200:
                    return
            now = time.monotonic()
            if now - looked >= LOOK_S:
                before, signs = signs, vital.signs(self._process.pid, self.log_path)
                lived = now if vital.alive(before, signs, now - looked) else lived
                looked = now
            if now - lived >= self._start_limit:
                raise ServerError(
                    f"the server does not answer after {now - started:.0f} s, and for {now - lived:.0f} s it has "
                    f"neither worked nor said anything (start limit: {self._start_limit:g} s); {self._tail()}"
                )
            if self._progress is not None and now - told >= PROGRESS_S:
                told = now
                self._progress(now - started, self._last_line())
            time.sleep(0.1)

    def _tail(self) -> str:
        return f"the end of its log, {self.log_path}:\n{self.log()[-LOG_TAIL:]}\nIt was started with: {self.command}"

    def _last_line(self) -> str:
        lines = self.log().strip().splitlines()
        return lines[-1] if lines else ""


def _body(response: requests.Response) -> Any:
    if not response.ok:
        raise requests.HTTPError(f"{response.status_code} {response.url}: {response.text[:2000]}", response=response)
    try:
        return response.json()
    except ValueError:
        return response.text


def _free_port() -> int:
    """A port that is free now; SGLang derives further ports itself and checks those."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _new_log() -> Path:
    handle, name = tempfile.mkstemp(prefix="sglang-server-", suffix=".log")
    os.close(handle)
    return Path(name)
