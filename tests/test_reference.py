"""The reference alone: equal to Hugging Face's fp64 decoder, and its policies are what their definitions say."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from reference import (
    FULL,
    ROTATE,
    SPOILS,
    CacheBlend,
    LegoLink,
    Mutation,
    Policy,
    Probe,
    Reference,
    Relay,
    Result,
    Segment,
)
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
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), layers=LAYERS)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    return Reference(checkpoint)


@pytest.fixture(scope="module")
def chain(reference: Reference) -> tuple[list[int], list[Segment], Result]:
    """A third agent's prompt that holds the outputs of two others, and the prompt computed as a whole."""
    first, second, prompt = tokens(60, 1), tokens(90, 2), tokens(120, 3)
    prompt[10:50], prompt[58:100] = first[20:60], second[45:87]
    segments = [cut(reference.prefill(first), 20, 10, 40), cut(reference.prefill(second), 45, 58, 42, donor=1)]
    return prompt, segments, reference.prefill(prompt)


def tokens(n: int, seed: int) -> list[int]:
    return torch.randint(3, 1024, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def cut(held: Result, source: int, start: int, length: int, donor: int = 0) -> Segment:
    span = slice(source, source + length)
    return Segment(start, start + length, donor, source, held.k[:, span], held.v[:, span])


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
        FULL,
        Relay(LAYERS - 1, LAYERS - 1, 1.5, 0),
        Relay(1, LAYERS - 1, -1.0, 0),
        Relay(2, LAYERS - 1, 9.0, EVERYTHING),
        LegoLink(42),
        CacheBlend(1.0),
        Probe(1.0),
        Probe(coverage=1.0),
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
    for policy in (ROTATE, RELAY, LegoLink(4), CacheBlend(), Probe(queries=8), Probe(chunks=(20, 50))):
        assert far(reference.run(prompt, segments, policy), whole) < 1e-10


def test_rotation_places_keys_at_their_new_positions(
    reference: Reference, chain: tuple[list[int], list[Segment], Result]
) -> None:
    """In layer 0 a key depends on its token and its position only, so the turned donor must be the fresh key."""
    prompt, segments, whole = chain
    result = reference.run(prompt, segments, ROTATE)
    assert torch.allclose(result.k[0], whole.k[0], atol=1e-10) and torch.allclose(result.v[0], whole.v[0], atol=1e-10)
    for s in segments:
        assert torch.equal(result.v[:, s.start : s.stop], s.v)
    assert far(result, whole) > 0.01, "donors of another context should matter on this model"


def test_relay_recomputes_what_its_definition_says(
    reference: Reference, chain: tuple[list[int], list[Segment], Result]
) -> None:
    prompt, segments, whole = chain
    rotated, result = reference.run(prompt, segments, ROTATE), reference.run(prompt, segments, RELAY)
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
    assert far(relay, whole) < far(reference.run(prompt, segments, ROTATE), whole)


@pytest.mark.parametrize("mutate", get_args(Mutation))
@pytest.mark.parametrize(
    "policy",
    [ROTATE, RELAY, Relay(1, LAYERS - 1, 1.2, 5), LegoLink(), CacheBlend(), Probe(0.15, queries=5)],
    ids=["rotate", "relay", "relay-to-end", "legolink", "cacheblend", "probe"],
)
def test_mutations_move_the_logits(
    reference: Reference, chain: tuple[list[int], list[Segment], Result], policy: Policy, mutate: Mutation
) -> None:
    """Each by far more than the 1e-4 within which a server must agree."""
    prompt, segments, _ = chain
    moved = far(reference.run(prompt, segments, policy, mutate), reference.run(prompt, segments, policy))
    if isinstance(policy, SPOILS.get(mutate, Policy)):
        assert moved > 0.01
    else:
        assert moved == 0


def test_nothing_is_read_before_it_is_written(reference: Reference) -> None:
    """Positions without a donor hold NaN until they are computed, and none reaches the logits."""
    prompt = tokens(80, 5)
    donor = cut(reference.prefill(tokens(80, 6)), 3, 40, 20)
    for policy in (ROTATE, RELAY, FULL, LegoLink(), CacheBlend(), Probe(queries=5), Probe(chunks=(24, 50))):
        result = reference.run(prompt, [donor], policy)
        assert result.logits.isfinite().all() and result.k.isfinite().all() and result.v.isfinite().all()


def test_legolink_counts_from_where_a_donors_text_begins(reference: Reference) -> None:
    """A later part of the same text goes on counting; an earlier part, and another donor's text, begin anew."""
    text, other, prompt = tokens(90, 7), tokens(90, 8), tokens(110, 9)
    held, cuts = reference.prefill(text), [(20, 5, 12), (50, 20, 20), (10, 45, 15)]
    for source, start, length in cuts:
        prompt[start : start + length] = text[source : source + length]
    prompt[70:90] = other[33:53]
    segments = [cut(held, *c) for c in cuts] + [cut(reference.prefill(other), 33, 70, 20, donor=1)]
    selected = reference.run(prompt, segments, LegoLink(35)).selected
    # Sources 20-31 and 50-69 are indices 0-11 and 30-49; source 10 comes before 20.
    assert selected.nonzero()[:, 0].tolist() == [*range(5, 17), *range(20, 25), *range(45, 60), *range(70, 90)]


def test_cacheblend_takes_the_largest_deviations_of_all_segments(
    reference: Reference, chain: tuple[list[int], list[Segment], Result]
) -> None:
    prompt, segments, whole = chain
    result, rotated = reference.run(prompt, segments, CacheBlend(0.1)), reference.run(prompt, segments, ROTATE)
    deviation = {}
    for s in segments:
        for i in range(s.stop - s.start):
            # Layers 0 and 1 computed everything, so that the fresh values there are those of full prefill.
            pairs = zip(s.v[1, i], whole.v[1, s.start + i], strict=True)
            cosine = [float(a @ b / (a @ a).sqrt() / (b @ b).sqrt()) for a, b in pairs]
            deviation[s.start + i] = 1 - sum(cosine) / len(cosine)
    best = sorted(deviation, key=lambda p: -deviation[p])[: int(0.1 * 82)]
    assert result.selected.nonzero()[:, 0].tolist() == sorted(best)
    for layer in range(1, LAYERS):
        recomputed = (result.v[layer] != rotated.v[layer]).any(-1).any(-1)[list(deviation)]
        assert torch.equal(recomputed, torch.tensor([layer == 1 or p in best for p in deviation])), layer


def test_probe_scores_what_its_definition_says(
    checkpoint: Path, reference: Reference, chain: tuple[list[int], list[Segment], Result]
) -> None:
    """By Hugging Face's attention over a cache that holds the segments and what precedes them, and nothing else."""
    transformers = pytest.importorskip("transformers")
    prompt, segments, _ = chain
    plain = Probe(0.25, queries=6, interpolates=False)
    result, rotated = reference.run(prompt, segments, plain), reference.run(prompt, segments, ROTATE)
    held, probing = [*range(50), *range(58, 100)], [*range(114, 120)]
    cache = transformers.DynamicCache()
    for layer in range(LAYERS):
        cache.update(*(x[layer, held].transpose(0, 1)[None].clone() for x in (rotated.k, rotated.v)), layer)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float64, attn_implementation="eager"
    )
    with torch.no_grad():
        attentions = model(
            torch.tensor([[prompt[p] for p in probing]]),
            attention_mask=torch.ones(1, len(held) + len(probing), dtype=torch.int64),
            position_ids=torch.tensor([probing]),
            past_key_values=cache,
            output_attentions=True,
        ).attentions
    want = {}
    for column, p in enumerate(held):
        for s in segments:
            if s.start <= p < s.stop:
                # Heads 0 and 1 read the first kv head, 2 and 3 the second.
                want[p] = (p - s.start + 4) ** -0.35 * sum(
                    float(
                        (layer + 1) / LAYERS * weight[0, head, :, column].sum() * rotated.v[layer, p, head // 2].norm()
                    )
                    for layer, weight in enumerate(attentions)
                    for head in range(4)
                )
    assert {p: float(result.measured[p]) for p in want} == pytest.approx(want, rel=1e-5)
    assert int(result.measured.isfinite().sum()) == len(want) == 82
    ranked = sorted(want, key=lambda p: -want[p])
    assert result.selected.nonzero()[:, 0].tolist() == sorted(ranked[: int(0.25 * 82)])
    begins = {p: p - s.start for s in segments for p in range(s.start, s.stop)}
    rooted = sorted(want, key=lambda p: -((want[p] * (begins[p] + 4) ** -0.35) ** 0.5))
    assert rooted != ranked
    for interpolates, by_rank in ((False, ranked), (True, rooted)):
        policy = Probe(coverage=0.6, queries=6, interpolates=interpolates)
        covered = reference.run(prompt, segments, policy).selected.nonzero()[:, 0].tolist()
        most, enough = by_rank[: len(covered)], 0.6 * sum(want.values())
        assert covered == sorted(most)
        assert sum(want[p] for p in most[:-1]) < enough <= sum(want[p] for p in most)


@pytest.mark.parametrize(
    "policy", [Probe(interpolates=False), Probe(queries=5, interpolates=False), LegoLink(7)], ids=str
)
def test_selected_tokens_are_computed_like_fresh_ones(
    reference: Reference, chain: tuple[list[int], list[Segment], Result], policy: Policy
) -> None:
    """Rotation alone, of segments from which they are cut out, gives the same."""
    prompt, segments, _ = chain
    result = reference.run(prompt, segments, policy)
    kept = []
    for s in segments:
        for i in range(s.stop - s.start):
            if not result.selected[s.start + i]:
                one = slice(i, i + 1)
                kept.append(Segment(s.start + i, s.start + i + 1, s.donor, s.source + i, s.k[:, one], s.v[:, one]))
    assert 0 < len(kept) < 82
    assert far(reference.run(prompt, kept, ROTATE), result) < 1e-10


@pytest.mark.parametrize("chunks", [(8,), (10, 54), (55,)])
def test_chunks_between_segments_change_only_what_the_probe_sees(
    reference: Reference, chain: tuple[list[int], list[Segment], Result], chunks: tuple[int, ...]
) -> None:
    """With everything selected, it is full prefill however it was cut."""
    prompt, segments, whole = chain
    assert far(reference.run(prompt, segments, Probe(1.0, chunks=chunks)), whole) < 1e-10
    cut_up, at_once = (reference.run(prompt, segments, Probe(queries=6, chunks=c)) for c in (chunks, ()))
    # Before position 10 nothing is relayed; 50 to 57 lie between the segments.
    assert torch.allclose(cut_up.measured, at_once.measured, equal_nan=True) == (max(chunks) <= 10)


def test_interpolation_is_the_regression_that_scipy_solves(
    reference: Reference, chain: tuple[list[int], list[Segment], Result]
) -> None:
    """Values of layer 1, with a Cholesky solver."""
    scipy = pytest.importorskip("scipy.linalg")
    prompt, segments, _ = chain
    result = reference.run(prompt, segments, Probe(queries=6))
    for s in segments:
        at = torch.arange(s.start, s.stop)
        chosen = result.selected[at]
        source = torch.arange(s.stop - s.start) + s.source
        looks = [reference._turn(s.k[layer], 0 * source, source).flatten(1) for layer in (1, 3, 4)]
        looks += [s.v[layer].flatten(1) for layer in (1, 3, 4)]
        unit = [x / x.norm(dim=-1, keepdim=True) for x in looks]
        cosine = torch.stack([x @ x.T for x in unit]).mean(0)
        place = torch.log(torch.arange(s.stop - s.start, dtype=torch.float64) + 4)
        kernel = torch.exp(4 * (cosine - 1) - (place[:, None] - place[None, :]).abs())
        change = (result.v[1, at] - s.v[1])[chosen].flatten(1)
        ridge = kernel[chosen][:, chosen] + 0.2 * torch.eye(int(chosen.sum()), dtype=torch.float64)
        want = s.v[1].flatten(1)[~chosen] + kernel[~chosen][:, chosen] @ torch.from_numpy(
            scipy.solve(ridge.numpy(), change.numpy(), assume_a="pos")
        )
        assert torch.allclose(result.v[1, at[~chosen]].flatten(1), want, atol=1e-9)
        assert not torch.allclose(result.v[1, at[~chosen]], s.v[1][~chosen], atol=1e-3)
