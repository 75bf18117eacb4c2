"""What the private servers of ``profile`` and ``certify`` have in common."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from sglang_relay.identity import (
    Identity,
    IdentityError,
    checkpoint_folder,
    dtype_name,
    identify,
    require_weights,
)
from sglang_relay.measure.server import Server

POOL = 32768
"""KV slots of a private server, in tokens, where the user's flags do not say."""


def checkpoint(model: str | Path) -> Path:
    """The folder of ``model``, as `checkpoint_folder`, which holds what a server needs. Raises IdentityError: the
    server itself would say so a minute later, in the middle of its log."""
    folder = checkpoint_folder(model)
    file = folder / "config.json"
    try:
        good = isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError) as error:
        raise IdentityError(f"{file}: cannot be read ({error}); give the folder of a checkpoint") from error
    if not good:
        raise IdentityError(f"{file}: no JSON object; give the folder of a checkpoint")
    require_weights(folder)
    return folder


def starting(progress: Callable[[str], object]) -> Callable[[float, str], object]:
    """Passes on to ``progress`` what `Server` says while it starts."""
    return lambda seconds, line: progress(f"the server is starting, {seconds:.0f} s: {line[:100]}")


def served_identity(server: Server, folder: Path) -> Identity:
    """The identity of the checkpoint ``folder`` as ``server`` runs it, by its own word (``/server_info``)."""
    info = server.get("/server_info")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    dtype = dtype_name(config, info["dtype"], quantization=info["quantization"], kv=info["kv_cache_dtype"])
    return identify(folder, dtype=dtype)
