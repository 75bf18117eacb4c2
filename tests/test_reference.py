"""The reference alone: equal to Hugging Face's fp64 decoder, and its policies are what their definitions say."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from reference import Full, Mutation, Policy, Reference, Relay, Result, Rotate, Segment
from safetensors.torch import load_file, save_file
from tiny_model import make_tiny_llama

LAYERS = 6
RELAY = Relay(det=1, end=3, tau_dev=1.2, suffix=5)
EVERYTHING = 10**6
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(make_tiny_llama(tmp_path_factory.mktemp("tiny"), layers=LAYERS))


@pytest.fixture(scope="module")
def chain(reference: Reference) -> tuple[list[int], list[Segment], Result]:
    """A third agent's prompt that holds the outputs of two others, and the prompt computed as a whole."""
    first, second, prompt = tokens(60, 1), tokens(90, 2), tokens(120, 3)
    prompt[10:50], prompt[58:100] = first[20:60], second[45:87]
    segments = [cut(reference.prefill(first), 20, 10, 40), cut(reference.prefill(second), 45, 58, 42)]
    return prompt, segments, reference.prefill(prompt)


def tokens(n: int, seed: int) -> list[int]:
    return torch.randint(3, 1024, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def cut(donor: Result, source: int, start: int, length: int) -> Segment:
    span = slice(source, source + length)
    return Segment(start, start + length, source, donor.k[:, span], donor.v[:, span])


def far(a: Result, b: Result) -> float:
    return float((a.logits - b.logits).abs().max())


@pytest.mark.parametrize(
    "scaling", [None, {"rope_type": "linear", "factor": 4.0}, LLAMA3], ids=["default", "linear", "llama3"]
)
@pytest.mark.parametrize(("heads", "kv_heads", "tied"), [(4, 2, False), (4, 1, True), (4, 4, False)])
def test_prefill_is_hugging_face(tmp_path: Path, scaling: Any, heads: int, kv_heads: int, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    path = make_tiny_llama(tmp_path, layers=3, heads=heads, kv_heads=kv_heads, rope_scaling=scaling)
    if tied:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
        weights = load_file(path / "model.safetensors")
        del weights["lm_head.weight"]
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    prompt = tokens(150, 0)
    with torch.no_grad():
        want = model(torch.tensor([prompt]), use_cache=True)
    got = Reference(path).prefill(prompt)
    # Hugging Face rounds cosines and sines to fp32.
    assert float((got.logits - want.logits[0, -1]).abs().max()) < 5e-5
    for layer in range(3):
        cached = want.past_key_values.layers[layer]
        assert torch.allclose(got.k[layer], cached.keys[0].transpose(0, 1), atol=2e-5)
        assert torch.allclose(got.v[layer], cached.values[0].transpose(0, 1), atol=2e-5)


@pytest.mark.parametrize(
    "policy",
    [
        Full(),
        Relay(LAYERS - 1, LAYERS - 1, 1.5, 0),
        Relay(1, LAYERS - 1, -1.0, 0),
        Relay(2, LAYERS - 1, 9.0, EVERYTHING),
    ],
)
def test_recomputing_everything_is_full_prefill(
    reference: Reference, chain: tuple[list[int], list[Segment], Result], policy: Policy
) -> None:
    prompt, segments, whole = chain
    result = reference.run(prompt, segments, policy)
    assert far(result, whole) < 1e-10
    assert torch.allclose(result.k, whole.k) and torch.allclose(result.v, whole.v)


def test_donor_of_the_same_context_changes_nothing(reference: Reference) -> None:
    prompt = tokens(100, 4)
    whole = reference.prefill(prompt)
    segments = [cut(whole, 30, 30, 40)]
    for policy in (Rotate(), Relay(1, 3, 1.5, 10)):
        assert far(reference.run(prompt, segments, policy), whole) < 1e-10


def test_rotation_places_keys_at_their_new_positions(
    reference: Reference, chain: tuple[list[int], list[Segment], Result]
) -> None:
    """In layer 0 a key depends on its token and its position only, so the turned donor must be the fresh key."""
    prompt, segments, whole = chain
    result = reference.run(prompt, segments, Rotate())
    assert torch.allclose(result.k[0], whole.k[0], atol=1e-10) and torch.allclose(result.v[0], whole.v[0], atol=1e-10)
    for s in segments:
        assert torch.equal(result.v[:, s.start : s.stop], s.v)
    assert far(result, whole) > 0.01, "donors of another context should matter on this model"


def test_relay_recomputes_what_its_definition_says(
    reference: Reference, chain: tuple[list[int], list[Segment], Result]
) -> None:
    prompt, segments, whole = chain
    rotated, result = reference.run(prompt, segments, Rotate()), reference.run(prompt, segments, RELAY)
    reused = torch.zeros(len(prompt), dtype=torch.bool)
    for s in segments:
        reused[s.start : s.stop] = True
        # All tokens ran through layers 0..det, so the fresh values there are those of full prefill.
        a, b = s.v[RELAY.det], whole.v[RELAY.det, s.start : s.stop]
        cosine = (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()
        deviation = (1 - cosine).mean(-1)
        chosen = deviation >= RELAY.tau_dev * deviation.mean()
        chosen[-RELAY.suffix :] = True
        assert torch.equal(result.selected[s.start : s.stop], chosen)
        assert RELAY.suffix < int(chosen.sum()) < len(chosen)
    assert not result.selected[~reused].any()
    for layer in range(LAYERS):
        recomputed = (result.v[layer] != rotated.v[layer]).any(-1).any(-1) & reused
        if layer == 0:
            continue  # equal to the donor's by definition
        want = reused if layer <= RELAY.det else result.selected if layer <= RELAY.end else torch.zeros_like(reused)
        assert torch.equal(recomputed, want), layer
    early = slice(0, RELAY.det + 1)
    assert torch.allclose(result.k[early], whole.k[early]) and torch.allclose(result.v[early], whole.v[early])


def test_repair_comes_closer_to_full_prefill(
    reference: Reference, chain: tuple[list[int], list[Segment], Result]
) -> None:
    prompt, segments, whole = chain
    relay = reference.run(prompt, segments, Relay(2, LAYERS - 1, 1.0, 10))
    assert far(relay, whole) < far(reference.run(prompt, segments, Rotate()), whole)


@pytest.mark.parametrize("mutate", get_args(Mutation))
@pytest.mark.parametrize(
    "policy", [Rotate(), RELAY, Relay(1, LAYERS - 1, 1.2, 5)], ids=["rotate", "relay", "relay-to-end"]
)
def test_mutations_move_the_logits(
    reference: Reference, chain: tuple[list[int], list[Segment], Result], policy: Policy, mutate: Mutation
) -> None:
    """Each by far more than the 1e-4 within which a server must agree."""
    prompt, segments, _ = chain
    moved = far(reference.run(prompt, segments, policy, mutate), reference.run(prompt, segments, policy))
    if mutate == "stale_stage" and isinstance(policy, Rotate):
        assert moved == 0, "rotate has no stages"
    else:
        assert moved > 0.01


def test_nothing_is_read_before_it_is_written(reference: Reference) -> None:
    """Positions without a donor hold NaN until they are computed, and none reaches the logits."""
    prompt = tokens(80, 5)
    donor = cut(reference.prefill(tokens(80, 6)), 3, 40, 20)
    for policy in (Rotate(), RELAY, Full()):
        result = reference.run(prompt, [donor], policy)
        assert result.logits.isfinite().all() and result.k.isfinite().all() and result.v.isfinite().all()
