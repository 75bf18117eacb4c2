"""SGLang plugins made at test time: how a test looks into a scheduler process, breaks something there, or stands in for
somebody else's plugin."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_relay.measure.server import Server


def install_plugin(directory: Path, name: str, code: str) -> dict[str, str]:
    """Write a distribution with one ``sglang.srt.plugins`` entry point, ``<name>:load``, into ``directory``.

    Returns the environment in which it counts as installed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.py").write_text(code, encoding="utf-8")
    info = directory / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{name} = {name}:load\n", encoding="utf-8")
    inherited = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": str(directory) + (os.pathsep + inherited if inherited else "")}


class Inspector:
    """Questions to a scheduler process (scheduler_plugin.py), asked through ``/server_info``.

    The plugin changes nothing in a server unless a question says so. Answers go through files of the test, so that what
    the server itself shows stays untouched.
    """

    def __init__(self, directory: Path) -> None:
        code = (Path(__file__).parent / "scheduler_plugin.py").read_text(encoding="utf-8")
        self._folder = directory
        self.env = install_plugin(directory, "relay_test_inspector", code)
        self.env["RELAY_TEST_INSPECTOR"] = str(directory)

    def ask(self, server: Server, question: str, **arguments: Any) -> Any:
        asked, answered = self._folder / "question.json", self._folder / "answer.json"
        answered.unlink(missing_ok=True)
        asked.write_text(json.dumps({"question": question, "arguments": arguments}), encoding="utf-8")
        server.get("/server_info")
        return json.loads(answered.read_text(encoding="utf-8"))

    def rows(
        self,
        server: Server,
        tokens: list[int],
        *,
        extra_key: str | None = None,
        salt: str | None = None,
        namespace: Mapping[str, Any] | None = None,
    ) -> list[str]:
        """One digest per token of ``tokens`` that the tree holds: the bits of its K and V in all layers.

        ``namespace``: ``{"tier": ...}`` to look where relayed requests live instead of under ``extra_key``.
        """
        return self.ask(server, "rows", tokens=tokens, extra_key=extra_key, salt=salt, namespace=namespace)

    def influence(
        self, server: Server, tokens: list[int], *, namespace: Mapping[str, Any] | None = None
    ) -> list[float | None]:
        """Of each token of ``tokens`` that the tree holds, None for those without (engine/influence.py)."""
        return self.ask(server, "influence", tokens=tokens, extra_key=None, salt=None, namespace=namespace)

    def hidden(
        self, server: Server, tokens: list[int], *, namespace: Mapping[str, Any] | None = None
    ) -> list[list[float] | None]:
        """The hidden state of each token of ``tokens`` that the tree holds; None where none is (engine/hidden.py)."""
        return self.ask(server, "hidden", tokens=tokens, extra_key=None, salt=None, namespace=namespace)

    def break_(self, server: Server, what: str | None) -> None:
        """Make one step of the relay fail (scheduler_plugin.py, ``FAULTS``), or none."""
        assert self.ask(server, "break", what=what) == what
