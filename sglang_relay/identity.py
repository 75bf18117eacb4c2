"""What a profile or a certificate was measured on. Files speak for one identity and are refused for any other."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

METHOD = 2
"""Revision of what a policy does to KV, which is what figures hang on; certificates and profiles of another one are
refused. Raise it with any change after which a policy (policies/, ops/, attention/, engine/ where it repairs) selects
other tokens, recomputes them otherwise, or answers otherwise than by rounding, or after which cost or deviation are
counted otherwise. Not with a release, nor for what decides only whether a request is relayed. 1: releases up to 0.6,
whose files name the release instead."""

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
"""Weight files by kind; of the first kind that a checkpoint has, all files are read."""
_RACY_NS = 2_000_000_000
"""A file changed this shortly before it was read may change again without its time stamp moving: its digest is not
kept (as git's index treats such files)."""


class IdentityError(ValueError):
    """A file speaks for something else than what it is used for, or a checkpoint cannot be identified."""


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model as one server runs it.

    model: name on the Hugging Face Hub, or the folder's name. revision: the Hub's commit, empty for a folder without
    one. weights: digest of the checkpoint (`weight_digest`). dtype: of the weights as computed with, and what differs
    from it (`dtype_name`). sglang: its version. extension: this project's `METHOD`, as ``method N``.
    """

    model: str
    revision: str
    weights: str
    dtype: str
    sglang: str
    extension: str

    def differences(self, other: Identity) -> list[str]:
        """``field: ours, not theirs`` for every field that differs."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in self.__struct_fields__)
        return [f"{name}: {ours!r}, not {theirs!r}" for name, ours, theirs in pairs if ours != theirs]

    def require(self, wanted: Identity, what: str) -> None:
        """Raise IdentityError, naming every difference, if ``what``, made for this identity, is used for another."""
        if different := self.differences(wanted):
            raise IdentityError(f"{what} was made for another {', '.join(different)}")


def identify(model: str | Path, *, dtype: str, revision: str | None = None) -> Identity:
    """The identity of ``model`` (a checkpoint folder, or a name on the Hub that is already in its local cache).

    dtype: as `dtype_name` gives it. Reads the whole checkpoint the first time, about a second per gigabyte and core.
    """
    folder = checkpoint_folder(model, revision)
    name, commit = _name_and_revision(folder)
    return Identity(name, commit, weight_digest(folder), dtype, version("sglang"), f"method {METHOD}")


def checkpoint_folder(model: str | Path, revision: str | None = None) -> Path:
    """The folder that holds ``model``; nothing is downloaded. Raises IdentityError when there is none."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path.absolute()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(model), revision=revision, local_files_only=True))
    except Exception as error:  # a bad name and a missing snapshot raise unrelated types
        raise IdentityError(f"{model}: neither a folder nor in the local Hugging Face cache ({error})") from error


def dtype_name(
    config: dict[str, Any], dtype: str = "auto", *, quantization: str | None = None, kv: str = "auto"
) -> str:
    """The dtype that SGLang computes with, e.g. ``bfloat16`` or ``bfloat16, weights fp8, KV fp8_e4m3``.

    config: the checkpoint's ``config.json``; dtype, quantization, kv: the server's ``--dtype``, ``--quantization`` and
    ``--kv-cache-dtype``. Follows sglang/srt/configs/model_config.py, ``_get_and_verify_dtype``.
    """
    short = {"half": "float16", "float": "float32"}
    dtype = short.get(dtype.lower(), dtype.lower())
    if dtype == "auto":
        text = config.get("text_config", config)
        dtype = text.get("dtype") or text.get("torch_dtype") or "float32"
        if dtype == "float32":
            dtype = "bfloat16" if str(text.get("model_type", "")).startswith("gemma") else "float16"
    extra = [f"weights {quantization}"] if quantization else []
    extra += [f"KV {kv}"] if kv not in ("auto", dtype) else []
    return ", ".join([dtype, *extra])


def weight_digest(folder: Path, cache: Path | None = None) -> str:
    """``sha256:<hex>`` of a checkpoint: names, sizes and whole contents of its weight files and of ``config.json``.

    Every byte is read; files are hashed side by side. Digests of files are remembered in ``cache`` (by default in the
    user's cache folder) under real path, size, inode and time stamps, so that a second start reads nothing.

    Raises IdentityError when the folder holds no weights or a file cannot be read.
    """
    folder, cache = Path(folder), cache or user_cache("digests")
    weights = require_weights(folder)
    files = [*weights, *(f for f in (folder / "config.json",) if f.is_file())]
    try:
        with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1, 8)) as pool:
            digests = list(pool.map(lambda file: _file_digest(file, cache), files))
        sizes = [file.stat().st_size for file in files]
    except OSError as error:
        raise IdentityError(f"{folder}: cannot be read ({error})") from error
    listing = [[file.name, size, digest] for file, size, digest in zip(files, sizes, digests, strict=True)]
    return "sha256:" + hashlib.sha256(json.dumps(listing).encode()).hexdigest()


def require_weights(folder: Path) -> list[Path]:
    """The weight files of a checkpoint. Raises IdentityError when it has none."""
    kinds = (sorted(folder.glob(pattern)) for pattern in _WEIGHTS)
    weights = next((files for files in kinds if files), None)
    if weights is None:
        raise IdentityError(f"{folder}: no weights ({', '.join(_WEIGHTS)})")
    return weights


def user_cache(*parts: str) -> Path:
    """A folder of this tool in the user's cache: ``$XDG_CACHE_HOME/sglang-relay/...``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").joinpath("sglang-relay", *parts)


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` in one step: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def _file_digest(file: Path, cache: Path) -> str:
    real = file.resolve()
    before = _stamp(real)
    entry = cache / f"{hashlib.sha256(os.fsencode(real)).hexdigest()[:32]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(entry.read_text(encoding="utf-8"))
        if kept["stamp"] == before and kept["path"] == str(real):
            return str(kept["sha256"])
    with real.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if _stamp(real) != before:
        raise IdentityError(f"{file}: changed while it was read")
    if time.time_ns() - max(before[2:]) > _RACY_NS:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
            write_atomically(entry, json.dumps({"path": str(real), "stamp": before, "sha256": digest}))
    return digest


def _stamp(file: Path) -> list[int]:
    """Size, inode, and the time stamps; ctime moves also where a copy keeps the old mtime."""
    status = file.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _name_and_revision(folder: Path) -> tuple[str, str]:
    """From a snapshot of the Hub's cache (``models--ORG--NAME/snapshots/COMMIT``), else the folder's name."""
    real = folder.resolve()
    if real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--"):
        return real.parent.parent.name.removeprefix("models--").replace("--", "/"), real.name
    return real.name, ""
