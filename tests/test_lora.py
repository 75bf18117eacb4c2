"""Requests with LoRA adapters beside relayed ones of the base model: neither changes what the other answers.

SGLang prepares the routing of rows to adapters once per batch. A repair runs other rows, between two decode steps or
instead of a prefill.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from plugins import Inspector
from prompts import Cut, Donor, Prompt, compose, random_tokens
from safetensors.torch import save_file

from sglang_relay.measure.divergence import READ_ARGS, Reading, read
from sglang_relay.measure.server import Server

VOCAB = 1024
BOUND = 1e-6
"""Nats; of an answer beside neighbours to the same answer alone."""
ADAPTERS = ("one", "two")
TENANTS = itertools.count()
PROBE = {"relay_policy": "probe", "relay_budget": 0.2, "relay_quote_tokens": 5}


def make_adapter(path: Path, model: Path, seed: int, rank: int = 4) -> Path:
    """A PEFT adapter of every linear layer, strong enough to change each answer."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    hidden, kv = config["hidden_size"], config["num_key_value_heads"] * config["head_dim"]
    inner = config["intermediate_size"]
    shapes = {
        **{f"self_attn.{name}": (hidden, out) for name, out in zip("qkvo", (hidden, kv, kv, hidden), strict=True)},
        **{f"mlp.{name}": size for name, size in (("gate", (hidden, inner)), ("up", (hidden, inner)))},
        "mlp.down": (inner, hidden),
    }
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (into, out) in shapes.items():
            at = f"base_model.model.model.layers.{layer}.{name}_proj"
            weights[f"{at}.lora_A.weight"] = torch.randn(rank, into, generator=generator) / into**0.5
            weights[f"{at}.lora_B.weight"] = torch.randn(out, rank, generator=generator) / rank**0.5
    path.mkdir()
    save_file(weights, path / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [f"{name.rpartition('.')[2]}_proj" for name in shapes],
        "base_model_name_or_path": str(model),
    }
    (path / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return path


class World(NamedTuple):
    server: Server
    inspector: Inspector
    rng: random.Random
    mixed: bool

    def tokens(self, n: int) -> list[int]:
        return random_tokens(n, self.rng, VOCAB)

    def prompt(self, donors: list[Donor]) -> Prompt:
        return compose(donors, [Cut(0, 11, 100, 9), Cut(1, 5, 90, 12)], 14, self.rng, VOCAB)

    def decode(self, adapter: str, prompt: list[int], new: int) -> Any:
        return self.server.generate(
            prompt,
            fields={"lora_path": adapter, "return_logprob": not self.mixed},  # which keeps steps from being mixed
            max_new_tokens=new,
            ignore_eos=True,
            custom_params={"relay_donate": "none"},
        )

    def teach(self, donors: list[Donor]) -> str:
        """The salt of a tenant that knows ``donors`` and nothing else."""
        salt = f"tenant {next(TENANTS)}"
        for donor in donors:
            whole = {"relay": "exact", "relay_generated_from": len(donor.prompt)}
            fields = {"cache_salt": salt}
            self.server.generate(donor.path, max_new_tokens=1, custom_params=whole, fields=fields)
        return salt

    def read(self, donors: list[Donor], prompt: Prompt, answer: list[int], **params: Any) -> Reading:
        return read(self.server, prompt.tokens, answer, {**PROBE, **params}, salt=self.teach(donors))


@pytest.fixture(scope="module", params=["plain", "mixed"])
def world(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder, mixed = tmp_path_factory.mktemp("lora"), request.param == "mixed"
    adapters = [f"{name}={make_adapter(folder / name, model, seed)}" for seed, name in enumerate(ADAPTERS)]
    inspector = Inspector(folder / "inspector")
    args = ["--radix-cache-backend", "relay", "--dtype", "float32", *READ_ARGS, "--lora-paths", *adapters]
    args += ["--enable-lora", "--lora-backend", "torch_native", "--max-loras-per-batch", 3]
    if mixed:
        args += ["--enable-mixed-chunk", "--chunked-prefill-size", 512]  # a prompt in one piece, wherever others decode
    with Server(model, *args, env=inspector.env) as server:
        yield World(server, inspector, random.Random(5), mixed)


def divergence(a: Reading, b: Reading) -> float:
    """The largest KL, nats, of one step's distribution to the other's."""
    p, q = a.logprobs.astype(np.float64), b.logprobs.astype(np.float64)
    return float((np.exp(p) * (p - q)).sum(-1).max())


def quoting(prompt: Prompt, rng: random.Random) -> list[int]:
    """An answer that quotes its prompt twice."""
    first, second = prompt.pieces
    own = random_tokens(6, rng, VOCAB)
    tail = prompt.tokens[second.stop - 9 : second.stop]
    return [*own[:2], *prompt.tokens[first.start + 30 : first.start + 48], *own[2:4], *tail, *own[4:]]


def sampled(answer: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Tokens, and their log-probabilities where they were asked for."""
    entries = answer["meta_info"].get("output_token_logprobs", ())
    return answer["output_ids"], [value for value, *_ in entries]


@pytest.fixture
def donors(world: World) -> list[Donor]:
    return [Donor(world.tokens(length), world.tokens(121)) for length in (23, 40)]


def test_an_answer_that_quotes_beside_adapters(world: World, donors: list[Donor]) -> None:
    """Requests of both adapters decode in the same batch while its quotes are repaired."""
    prompt = world.prompt(donors)
    answer = quoting(prompt, world.rng)
    alone = world.read(donors, prompt, answer)
    assert alone.report["quoted"] > 5 and alone.report["declined"] is None
    theirs = [(name, world.tokens(30)) for name in ADAPTERS]
    without = [sampled(world.decode(*their, 250)) for their in theirs]
    with ThreadPoolExecutor(4) as pool:
        beside = [pool.submit(world.decode, *their, 250) for their in theirs]
        while world.inspector.ask(world.server, "pool")["running"] < 2 * 30:
            pass
        together = world.read(donors, prompt, answer)
        assert not any(b.done() for b in beside), "they decoded all the while"
    if world.mixed:  # a decoding adapter's row is in the prefill
        assert together.report["declined"] == "lora_in_batch"
        alone = world.read(donors, prompt, answer, relay="off")
    else:
        assert together.report["quoted"] == alone.report["quoted"]
    assert divergence(together, alone) < BOUND
    for (tokens, values), future in zip(without, beside, strict=True):
        got = sampled(future.result())
        assert got[0] == tokens and np.allclose(got[1], values, atol=1e-4)


@pytest.mark.parametrize("policy", ["probe", "rotate", "full"])
def test_a_relayed_prompt_that_comes_with_those_of_adapters(world: World, donors: list[Donor], policy: str) -> None:
    """They are not prefilled in one batch."""
    prompt, answer, theirs = world.prompt(donors), world.tokens(1), [(name, world.tokens(60)) for name in ADAPTERS]
    params = {"relay_policy": policy, "relay_budget": 0.2 if policy == "probe" else None}
    alone = world.read(donors, prompt, answer, **params)
    without = [sampled(world.decode(*their, 1)) for their in theirs]
    salt = world.teach(donors)
    world.inspector.ask(world.server, "gather", count=3)
    with ThreadPoolExecutor(4) as pool:
        beside = [pool.submit(world.decode, *their, 1) for their in theirs]
        together = read(world.server, prompt.tokens, answer, {**PROBE, **params}, salt=salt)
    assert together.report["declined"] is None and together.report["segments"] >= 2
    assert divergence(together, alone) < BOUND
    for (tokens, values), future in zip(without, beside, strict=True):
        got = sampled(future.result())
        assert got[0] == tokens and np.allclose(got[1], values, atol=1e-4)
