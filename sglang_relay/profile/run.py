"""`sglang-relay profile`: measure where a model's reused values deviate, on a private server."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from sglang_relay.measure.chains import Chain, Decoding, build_chains
from sglang_relay.measure.private import POOL, checkpoint, served_identity, starting
from sglang_relay.measure.server import Server
from sglang_relay.measure.tasks import Agent, Task, load_tasks
from sglang_relay.measure.vital import START_LIMIT_S
from sglang_relay.profile.deviation import deviation
from sglang_relay.profile.file import Profile, ProfileError, make_profile


def profile(
    model: str | Path,
    *,
    data: Path | None = None,
    cases: int | None = None,
    server_args: Sequence[str] = (),
    start_limit: float = START_LIMIT_S,
    progress: Callable[[str], object] = lambda _: None,
) -> Profile:
    """Profile ``model``, a checkpoint folder or the name of one in the local Hugging Face cache.

    Agents write texts (or wrote them in an earlier run: they are kept); for every text the values that its own agent
    has of it are compared with those of a full prefill of the reader's prompt. The first are taken from a prefill of
    the agent's prompt and output, whose values equal the decoded ones up to rounding.

    data: see `read_tasks`; the calibration tasks of this project by default. cases: only the first so many tasks.
    server_args: flags of the private server, e.g. its ``--dtype``. start_limit: as in `Server`.
    Raises ProfileError, IdentityError, `measure.server.ServerError`.
    """
    if cases is not None and cases < 1:
        raise ProfileError(f"cases: {cases}, allowed is a number from 1")
    folder = checkpoint(model)
    tasks = (load_tasks("calibration") if data is None else read_tasks(data))[:cases]
    with tempfile.TemporaryDirectory(prefix="relay-capture-") as captured:
        flags = ["--radix-cache-backend", "relay", "--max-total-tokens", POOL, *server_args]
        env = {"RELAY_CAPTURE_DIR": captured}
        with Server(folder, *flags, env=env, start_limit=start_limit, progress=starting(progress)) as server:
            identity = served_identity(server, folder)
            chains = build_chains(server, folder, tasks, Decoding(), dtype=identity.dtype, progress=progress)
            fields: list[np.ndarray] = []
            for number, chain in enumerate(chains):
                fields += _fields(server, chain, Path(captured))
                progress(f"{chain.task.id}: {number + 1} of {len(chains)}")
    source = "calibration tasks of sglang-relay" if data is None else data.name
    return make_profile(identity, fields, data=f"{source}, {len(tasks)} tasks", made=date.today().isoformat())


def read_tasks(file: Path) -> list[Task]:
    """Tasks of a JSONL file, one object a line: ``role`` (system prompt of the agent that writes), ``task`` (what it is
    asked), and optionally ``reader`` (system prompt of the agent that reads) and ``question`` (what that one is asked).

    Raises ProfileError, naming the line.
    """
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{file}: cannot be read ({error})") from error
    if not lines:
        raise ProfileError(f"{file}: holds no tasks")
    return [_task(file, number, line) for number, line in enumerate(lines, 1)]


def _task(file: Path, number: int, line: str) -> Task:
    try:
        given: Any = json.loads(line)
    except ValueError as error:
        raise ProfileError(f"{file}, task {number}: no JSON ({error})") from error
    names = {"role", "task", "reader", "question"}
    if not isinstance(given, dict) or not {"role", "task"} <= given.keys() <= names:
        raise ProfileError(f"{file}, task {number}: expected an object with role, task, and perhaps reader, question")
    if not all(isinstance(text, str) and text.strip() for text in given.values()):
        raise ProfileError(f"{file}, task {number}: every value is a text that is not empty")
    return Task(
        id=f"{file.stem}-{number}",
        split="calibration",
        domain="user",
        kind="single",
        topic=given["task"],
        agents=(Agent("writer", given["role"], "Write your answer."),),
        role=given.get("reader", "You review the work of others and improve it."),
        question=given.get("question", "Improve the text above."),
        rubric=None,
    )


def _fields(server: Server, chain: Chain, captured: Path) -> list[np.ndarray]:
    """The deviation field, float32 [tokens, layers], of every text that the chain's reader finds in its prompt."""
    full = _values(server, chain.prompt, captured)
    fields = []
    for producer, (start, stop) in zip(chain.producers, chain.segments, strict=True):
        own = _values(server, producer.prompt + producer.output, captured)
        fields.append(deviation(own[:, len(producer.prompt) :], full[:, start:stop]))
    return fields


def _values(server: Server, tokens: list[int], captured: Path) -> np.ndarray:
    """float32 [layers, tokens, heads, head_dim], computed by exact prefill."""
    file = captured / "values.npz"
    file.unlink(missing_ok=True)
    server.generate(tokens, max_new_tokens=1, custom_params={"relay": "off", "relay_capture": file.stem})
    if not file.exists():
        server.get("/server_info")  # its scheduler answers when it is done with the request, the file included
    if not file.exists():
        print(server.log()[-2000:], file=sys.stderr)
        raise ProfileError("the server wrote no values; the end of its log stands above")
    with np.load(file) as arrays:
        if arrays["tokens"].tolist() != tokens:
            raise ProfileError("the values captured are those of other tokens")
        return arrays["v"]
