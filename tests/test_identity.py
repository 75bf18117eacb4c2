"""Identity: every field counts, and a weight digest sees every byte, whatever the cache remembers."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import msgspec
import pytest
from tiny_model import make_tiny_llama

import sglang_relay
from sglang_relay import identity
from sglang_relay.identity import (
    METHOD,
    Identity,
    IdentityError,
    checkpoint_folder,
    dtype_name,
    identify,
    weight_digest,
    write_atomically,
)

ONE = Identity("org/name", "abc", "sha256:00", "bfloat16", "0.5.23", "0.1.0")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name, content in {"a.safetensors": b"12345", "b.safetensors": b"678", "config.json": b"{}"}.items():
        (folder / name).write_bytes(content)
    return folder


def age(folder: Path) -> None:
    """As if the files had been written long ago; ctime cannot be set, so the test tolerates it as git would."""
    for file in folder.iterdir():
        os.utime(file, ns=(10**18, 10**18))


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once, so that their digests are remembered."""
    monkeypatch.setattr(identity, "_RACY_NS", -(10**18))


@pytest.mark.parametrize("name", Identity.__struct_fields__)
def test_every_field_is_compared_and_named(name: str) -> None:
    other = msgspec.structs.replace(ONE, **{name: "other"})
    with pytest.raises(IdentityError, match=f"the profile was made for another {name}: .*'other'"):
        ONE.require(other, "the profile")
    assert ONE.differences(ONE) == []


def test_all_differing_fields_are_named() -> None:
    other = msgspec.structs.replace(ONE, dtype="float16", sglang="0.6")
    with pytest.raises(IdentityError, match=r"dtype: 'bfloat16', not 'float16', sglang: '0.5.23', not '0.6'"):
        ONE.require(other, "x")


def test_the_digest_sees_contents_names_and_config(checkpoint: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    before = weight_digest(checkpoint, cache)
    copy = Path(shutil.copytree(checkpoint, tmp_path / "elsewhere"))
    (copy / "tokenizer.json").write_text("{}")
    assert weight_digest(copy, cache) == before, "neither the folder nor other files count"
    seen = {before}
    for change in (
        lambda: (copy / "a.safetensors").write_bytes(b"12346"),
        lambda: (copy / "config.json").write_bytes(b"[]"),
        lambda: (copy / "a.safetensors").rename(copy / "aa.safetensors"),
        lambda: (copy / "d.safetensors").write_bytes(b""),
        (copy / "config.json").unlink,
    ):
        change()
        seen.add(weight_digest(copy, cache))
    assert len(seen) == 6


def test_bytes_that_move_from_file_to_file_change_the_digest(checkpoint: Path, tmp_path: Path) -> None:
    before = weight_digest(checkpoint, tmp_path)
    (checkpoint / "a.safetensors").write_bytes(b"1234")
    (checkpoint / "b.safetensors").write_bytes(b"5678")
    assert weight_digest(checkpoint, tmp_path) != before


def test_a_remembered_file_is_not_read_again(
    checkpoint: Path, tmp_path: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = weight_digest(checkpoint, tmp_path / "cache")
    opened: list[Path] = []
    real_open = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: (opened.append(self), real_open(self, *a, **k))[1])
    assert weight_digest(checkpoint, tmp_path / "cache") == before
    assert not [p for p in opened if p.suffix == ".safetensors"]


def test_a_change_is_seen_although_size_and_mtime_are_kept(checkpoint: Path, tmp_path: Path, settled: None) -> None:
    age(checkpoint)
    before = weight_digest(checkpoint, tmp_path / "cache")
    (checkpoint / "a.safetensors").write_bytes(b"54321")
    age(checkpoint)
    assert weight_digest(checkpoint, tmp_path / "cache") != before


def test_a_file_that_was_just_written_is_not_remembered(checkpoint: Path, tmp_path: Path) -> None:
    weight_digest(checkpoint, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.json"))


@pytest.mark.parametrize("content", ["", "[]", '{"stamp": 1}', '{"path": "elsewhere"}'])
def test_a_damaged_cache_costs_time_only(checkpoint: Path, tmp_path: Path, settled: None, content: str) -> None:
    before = weight_digest(checkpoint, tmp_path / "cache")
    entries = list((tmp_path / "cache").glob("*.json"))
    assert len(entries) == 3
    for entry in entries:
        entry.write_text(content)
    assert weight_digest(checkpoint, tmp_path / "cache") == before


def test_a_cache_that_cannot_be_written_is_no_error(checkpoint: Path, tmp_path: Path, settled: None) -> None:
    (tmp_path / "file").write_text("")
    assert weight_digest(checkpoint, tmp_path / "file" / "cache") == weight_digest(checkpoint, tmp_path / "cache")


def test_without_weights_there_is_no_digest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(IdentityError, match="no weights"):
        weight_digest(tmp_path)


def test_identify_names_a_hub_snapshot_by_its_repository_and_commit(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    snapshot = tmp_path / "models--org--some-model" / "snapshots" / "0123abcd"
    shutil.copytree(checkpoint, snapshot)
    found = identify(snapshot, dtype="bfloat16")
    assert (found.model, found.revision) == ("org/some-model", "0123abcd")
    assert (found.sglang, found.extension) == ("0.5.23", f"method {METHOD}")
    plain = identify(str(checkpoint), dtype="bfloat16")
    assert (plain.model, plain.revision, plain.weights) == ("checkpoint", "", found.weights)


def test_a_release_that_changes_no_figure_keeps_its_files(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a release before there were methods is refused, by its name."""
    before = identify(checkpoint, dtype="bfloat16")
    monkeypatch.setattr(sglang_relay, "__version__", "99.0")
    assert identify(checkpoint, dtype="bfloat16") == before
    old = msgspec.structs.replace(before, extension="0.6.0")
    with pytest.raises(IdentityError, match=rf"^x was made for another extension: '0\.6\.0', not 'method {METHOD}'$"):
        old.require(before, "x")


def test_a_model_that_is_not_there_is_an_error_and_no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(IdentityError, match="neither a folder nor in the local Hugging Face cache"):
        checkpoint_folder("no-such-org/no-such-model")


@pytest.mark.parametrize("dtype", ["auto", "half", "float16", "bfloat16", "float", "float32"])
@pytest.mark.parametrize(
    "config",
    [
        {"torch_dtype": "bfloat16"},
        {"dtype": "float32", "torch_dtype": "bfloat16"},
        {"torch_dtype": "float32", "model_type": "gemma2"},
        {"torch_dtype": "float16", "model_type": "llama"},
        {},
    ],
)
def test_the_dtype_is_the_one_that_sglang_takes(config: dict[str, str], dtype: str) -> None:
    from sglang.srt.configs.model_config import _get_and_verify_dtype

    taken = _get_and_verify_dtype(config, dtype)  # type: ignore[arg-type]
    assert dtype_name(config, dtype) == str(taken).removeprefix("torch.")


def test_the_dtype_names_quantization(tmp_path: Path) -> None:
    config = json.loads((make_tiny_llama(tmp_path, dtype="bfloat16") / "config.json").read_text())
    assert dtype_name(config) == dtype_name(config, kv="bfloat16") == "bfloat16"
    assert dtype_name(config, quantization="fp8", kv="fp8_e4m3") == "bfloat16, weights fp8, KV fp8_e4m3"


def test_an_atomic_write_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.json"
    write_atomically(target, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(target, "\ud800")
    assert target.read_text() == "old" and list(target.parent.iterdir()) == [target]
