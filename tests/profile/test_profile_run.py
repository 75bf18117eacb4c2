"""`sglang-relay profile` on a real server: what is captured is what the model computes, and what comes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_model import make_tiny_llama

from sglang_relay.cli import main
from sglang_relay.engine.capture import CAPTURE_ENV
from sglang_relay.measure.chains import Decoding
from sglang_relay.measure.server import Server, ServerError
from sglang_relay.profile.file import ProfileError, read_profile
from sglang_relay.profile.run import read_tasks

RELAY = ("--radix-cache-backend", "relay", "--max-total-tokens", 16384)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def capturing(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    folder = tmp_path_factory.mktemp("captured")
    with Server(model, *RELAY, env={CAPTURE_ENV: str(folder)}) as server:
        yield server, folder


def tokens(n: int, seed: int) -> list[int]:
    return torch.randint(3, 1024, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def capture(server: Server, folder: Path, prompt: list[int], name: str, new: int = 1) -> tuple[list[int], np.ndarray]:
    params = {"relay": "off", "relay_capture": name}
    output = server.generate(prompt, max_new_tokens=new, ignore_eos=True, custom_params=params)["output_ids"]
    with np.load(folder / f"{name}.npz") as arrays:
        assert arrays["tokens"].tolist() == [*prompt, *output[:-1]]  # the last token was sampled and never run
        return output, arrays["v"]


def test_captured_values_are_the_model_s(capturing: tuple[Server, Path], model: Path) -> None:
    server, folder = capturing
    prompt = tokens(50, 1)
    _, values = capture(server, folder, prompt, "prompt")
    assert values.shape == (6, 50, 2, 32) and values.dtype == np.float32
    weights = load_file(model / "model.safetensors")
    x = weights["model.embed_tokens.weight"][prompt]
    epsilon = json.loads((model / "config.json").read_text())["rms_norm_eps"]
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weights["model.layers.0.input_layernorm.weight"]
    first = x @ weights["model.layers.0.self_attn.v_proj.weight"].T
    assert np.allclose(values[0].reshape(50, -1), first.numpy(), atol=1e-4)


def test_decoded_values_are_captured_and_equal_a_prefill_of_the_same_tokens(capturing: tuple[Server, Path]) -> None:
    server, folder = capturing
    prompt = tokens(40, 2)
    output, decoded = capture(server, folder, prompt, "decoded", new=30)
    server.post("/flush_cache")
    _, prefilled = capture(server, folder, [*prompt, *output[:-1]], "prefilled")
    assert np.allclose(decoded, prefilled, atol=1e-4)
    _, elsewhere = capture(server, folder, [*tokens(10, 3), *prompt], "elsewhere")
    assert not np.allclose(elsewhere[5, 10:], prefilled[5, :40], atol=1e-2)


@pytest.mark.parametrize("name", ["../x", "", "a" * 65, "a b", 3])
def test_a_bad_name_is_declined_and_writes_nothing(capturing: tuple[Server, Path], name: object) -> None:
    server, folder = capturing
    before = sorted(folder.iterdir())
    answer = server.generate(tokens(10, 4), max_new_tokens=1, custom_params={"relay_capture": name})
    assert answer["meta_info"]["relay"]["declined"] == "bad_custom_params"
    assert sorted(folder.iterdir()) == before


def test_requests_that_do_not_ask_are_not_captured(capturing: tuple[Server, Path]) -> None:
    server, folder = capturing
    before = sorted(folder.iterdir())
    server.generate(tokens(10, 5), max_new_tokens=1)
    assert sorted(folder.iterdir()) == before
    assert server.log().count(f"are written to {folder}") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("args", "reason"), [(("--tp-size", 2), "some heads only"), ((), "no such folder")])
def test_a_server_that_cannot_capture_says_so_and_ends(
    model: Path, tmp_path: Path, args: tuple[object, ...], reason: str
) -> None:
    folder = tmp_path if args else tmp_path / "gone"
    with pytest.raises(ServerError, match=reason), Server(model, *RELAY, *args, env={CAPTURE_ENV: str(folder)}):
        pass


def test_a_profile_from_the_command_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = tmp_path / "data.jsonl"
    lines = [
        {"role": "You write.", "task": "Tell a story."},
        {"role": "You count.", "task": "Count.", "reader": "Judge."},
    ]
    data.write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    flags = ["--data", str(data), "--out", str(out), "--dtype", "float32", "--max-total-tokens", "8192"]
    assert main(["profile", str(model), *flags]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith(f"{out}\n") and shown.startswith((out / "profile.txt").read_text())
    found = read_profile(out / "profile.json")
    assert (found.identity.model, found.identity.dtype) == (model.name, "float32")
    assert found.texts == 2
    assert 2 * Decoding().min_tokens <= found.tokens <= 2 * Decoding().max_tokens
    assert found.similarity[0] == pytest.approx(1.0, abs=1e-5), "the first layer's values know no prefix"
    assert found.similarity[5] < 0.999
    assert found.data == "data.jsonl, 2 tasks"
    first = found.heat[0][5]
    assert first > found.heat[-1][5] > 0, "the start of a text deviates most"


def test_flags_of_no_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", "--dtype", "float16"])
    assert "unrecognized arguments: --dtype float16" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_explained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["profile", "no-such-org/no-such-model"]) == 1
    assert "neither a folder nor" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "holds no tasks"),
        ("{", "task 1: no JSON"),
        ('{"role": "r", "task": "t"}\n\n{"role": "r"}', "task 2: expected an object"),
        ('{"role": "r", "task": "t", "more": "m"}', "task 1: expected an object"),
        ('{"role": "", "task": "t"}', "task 1: every value"),
        ('{"role": "r", "task": 3}', "task 1: every value"),
        ("[]", "task 1: expected an object"),
    ],
)
def test_data_that_is_none_is_refused_by_its_line(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(text)
    with pytest.raises(ProfileError, match=reason):
        read_tasks(file)
    with pytest.raises(ProfileError, match="cannot be read"):
        read_tasks(tmp_path / "gone.jsonl")


def test_data_may_say_who_reads_and_what_is_asked(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"role": "r", "task": "t"}\n{"role": "r", "task": "t", "reader": "x", "question": "q"}')
    plain, full = read_tasks(file)
    assert (plain.topic, plain.agents[0].role, plain.id) == ("t", "r", "mine-1")
    assert (full.role, full.suffix) == ("x", "q")
