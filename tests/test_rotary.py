"""Delta rotation against SGLang's own rotary embeddings, and both against the formulas in fp64."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from sglang.srt.layers.rotary_embedding import get_rope
from torch import Tensor

from sglang_relay.rotary import DeltaRotary, additive_error, is_static_table

FAR = 131072
HEADS = 3


class Case(NamedTuple):
    """One rotary embedding: arguments for SGLang, and what the fp64 formula needs."""

    head_dim: int = 64
    rotary_dim: int = 64
    base: float = 10000.0
    max_position: int = FAR
    neox: bool = True
    scaling: dict[str, Any] | None = None


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": FAR // 4}
CASES = {
    "default": Case(),
    "llama3": Case(head_dim=128, rotary_dim=128, base=500000.0, scaling=LLAMA3),
    "yarn": Case(base=1000000.0, max_position=FAR // 4, scaling=YARN),
    "linear": Case(max_position=FAR // 4, scaling={"rope_type": "linear", "factor": 4.0}),
    "gptj": Case(neox=False),
    "partial": Case(rotary_dim=32),
    "partial-gptj": Case(head_dim=128, rotary_dim=32, neox=False),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def engine(case: Case, dtype: torch.dtype = torch.float32) -> Any:
    return get_rope(
        case.head_dim,
        case.rotary_dim,
        max_position=case.max_position,
        base=case.base,  # pyright: ignore[reportArgumentType]
        is_neox_style=case.neox,
        rope_scaling=dict(case.scaling) if case.scaling else None,
        dtype=dtype,
    )


def delta(case: Case) -> DeltaRotary:
    table = engine(case)._compute_cos_sin_cache()
    return DeltaRotary.from_table(table, neox=case.neox, rotary_dim=case.rotary_dim, head_dim=case.head_dim)


def direct(case: Case, positions: Tensor, keys: Tensor) -> Tensor:
    """Keys as the engine computes and caches them."""
    flat = keys.reshape(len(keys), -1)
    return engine(case).forward_native(positions, flat.clone(), flat.clone())[1].view_as(keys)


def exact(case: Case, positions: Tensor, keys: Tensor) -> Tensor:
    """The published formulas in fp64."""
    frequency = case.base ** -(torch.arange(0, case.rotary_dim, 2, dtype=torch.float64) / case.rotary_dim)
    scaling, scale = case.scaling or {"rope_type": "default"}, 1.0
    factor = scaling.get("factor", 1.0)
    if scaling["rope_type"] == "linear":
        frequency = frequency / factor
    elif scaling["rope_type"] == "llama3":
        context, low, high = (
            scaling[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        share = ((context * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequency = share * frequency + (1 - share) * frequency / factor
    elif scaling["rope_type"] == "yarn":
        context, d = scaling["original_max_position_embeddings"], case.rotary_dim
        first, last = (d * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(case.base)) for turns in (32, 1))
        first, last = max(math.floor(first), 0), min(math.ceil(last), d - 1)
        share = ((torch.arange(d // 2, dtype=torch.float64) - first) / (last - first)).clamp(0, 1)
        frequency = (1 - share) * frequency + share * frequency / factor
        scale = 0.1 * math.log(factor) + 1
    angle = positions.double()[:, None, None] * frequency
    turned = keys.double().clone()
    half = case.rotary_dim // 2
    a, b = (slice(0, half), slice(half, 2 * half)) if case.neox else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    x, y = keys[..., a].double(), keys[..., b].double()
    turned[..., a] = scale * (x * angle.cos() - y * angle.sin())
    turned[..., b] = scale * (y * angle.cos() + x * angle.sin())
    return turned


def keys_and_positions(case: Case, below: int, n: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(below)
    keys = torch.randn(n, HEADS, case.head_dim, generator=generator)
    source, target = torch.randint(below, (2, n), generator=generator)
    source[0], target[0] = 0, below - 1
    source[1], target[1] = below - 1, 0
    return keys, source, target


def error(a: Tensor, b: Tensor) -> float:
    """Largest relative error of a key."""
    return float(((a.double() - b.double()).norm(dim=-1) / b.double().norm(dim=-1)).max())


@pytest.mark.parametrize("below", [4096, FAR])
def test_rerotated_key_is_the_directly_computed_key(case: Case, below: int) -> None:
    keys, source, target = keys_and_positions(case, below)
    rotary = delta(case)
    moved = rotary.rotate(direct(case, source, keys), *rotary.factors(source, target))
    there, truth = direct(case, target, keys), exact(case, target, keys)
    assert error(moved, there) <= 1e-5
    # The engine's own rounding of the angle is all that separates the moved key from the formula.
    assert error(moved, truth) <= error(there, truth) * 1.05 + 1e-6
    assert error(there, truth) <= below * 2**-22, (
        "the fp64 formula is not the engine's: the line above would prove nothing"
    )


def test_bf16_keys_move_within_their_rounding(case: Case) -> None:
    keys, source, target = keys_and_positions(case, 4096)
    rotary = delta(case)
    moved = rotary.rotate(direct(case, source, keys).bfloat16(), *rotary.factors(source, target))
    assert moved.dtype == torch.bfloat16
    # Rounded when cached and when moved: at most 2^-8 of an element, about 2^-9 of a key. The rest is the fp32 angle.
    assert error(moved, exact(case, target, keys)) <= 2**-8 + 5e-4


@pytest.mark.parametrize("off", [-1, 1])
def test_a_position_off_by_one_is_far_away(case: Case, off: int) -> None:
    keys, source, target = keys_and_positions(case, 4096)
    rotary = delta(case)
    target = target.clamp(1, 4000)
    wrong = rotary.rotate(direct(case, source, keys), *rotary.factors(source, target + off))
    assert float((wrong - direct(case, target, keys)).norm(dim=-1).min()) > 0.1


def test_hops_do_not_add_up(case: Case) -> None:
    keys, source, target = keys_and_positions(case, 4096)
    rotary, key, at = delta(case), direct(case, source, keys), source
    for hop in (torch.flip(target, (0,)), source // 2, target):
        key, at = rotary.rotate(key, *rotary.factors(at, hop)), hop
    assert error(key, direct(case, target, keys)) <= 1e-6


def test_no_distance_keeps_the_bits(case: Case) -> None:
    positions = torch.tensor([0, 1, 77, 4095, FAR - 1])
    rotary = delta(case)
    cos, sin = rotary.factors(positions, positions)
    assert torch.equal(cos, torch.ones_like(cos)) and torch.equal(sin, torch.zeros_like(sin))
    keys = torch.randn(5, HEADS, case.head_dim)
    assert torch.equal(rotary.rotate(keys, cos, sin), keys)


def test_factors_have_unit_norm(case: Case) -> None:
    _, source, target = keys_and_positions(case, FAR)
    cos, sin = delta(case).factors(source, target)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (256, case.rotary_dim // 2)
    assert float((cos.double() ** 2 + sin.double() ** 2 - 1).abs().max()) <= 1e-6


def test_rotates_in_place_in_batches_and_in_views(case: Case) -> None:
    keys, source, target = keys_and_positions(case, 4096)
    rotary = delta(case)
    cos, sin = rotary.factors(source, target)
    expected = rotary.rotate(keys, cos, sin)
    layers = torch.stack((keys, 2 * keys))
    assert torch.allclose(rotary.rotate(layers, cos, sin), torch.stack((expected, 2 * expected)))
    pool = torch.zeros(256, 2 * HEADS, case.head_dim)
    view = pool[:, ::2]
    view.copy_(keys)
    assert rotary.rotate(view, cos, sin, out=view) is view
    assert torch.equal(view, expected) and not pool[:, 1::2].any()


@pytest.mark.parametrize("name", CASES)
def test_engine_tables_are_additive(name: str) -> None:
    assert additive_error(engine(CASES[name])._compute_cos_sin_cache()) < 2


def test_a_table_that_is_not_one_rotation_per_position_is_found_out() -> None:
    table = engine(CASES["default"])._compute_cos_sin_cache()
    slower = engine(CASES["linear"])._compute_cos_sin_cache()
    longrope = {
        "rope_type": "longrope",
        "factor": 32.0,
        "short_factor": [1.0] * 32,
        "long_factor": [1.0 + i / 8 for i in range(32)],
        "original_max_position_embeddings": 4096,
    }
    bad = {
        "rescaled beyond the trained context": torch.cat((table[:8192], slower[8192:])),
        "longrope": engine(Case(scaling=longrope)).long_short_cos_sin_cache.float(),
        "several linear factors": engine(
            Case(max_position=4096, scaling={"rope_type": "linear", "factor": [1.0, 4.0]})
        )._compute_cos_sin_cache(),
        "starts at position 1": table[1:],
        "magnitude grows": table * torch.linspace(1, 1.1, len(table))[:, None],
        "rounded to bf16": table.bfloat16().float(),
        "sines first": torch.cat(table.chunk(2, -1)[::-1], -1),
        "zeros": torch.zeros_like(table),
        "not finite": table.masked_fill(table > 0.999999, float("nan")),
        "three-dimensional": table.unsqueeze(1),
    }
    accepted = [name for name, t in bad.items() if is_static_table(t)]
    assert not accepted


def test_wrong_tables_and_keys_are_refused() -> None:
    table = engine(CASES["default"])._compute_cos_sin_cache()
    with pytest.raises(ValueError, match="float32"):
        # What SGLang's own `cos_sin_cache` is on platforms that round it to the model's dtype.
        DeltaRotary.from_table(table.bfloat16(), neox=True, rotary_dim=64, head_dim=64)
    with pytest.raises(ValueError, match="32"):
        DeltaRotary.from_table(table, neox=True, rotary_dim=32, head_dim=64)
    with pytest.raises(ValueError, match="head_dim 32"):
        DeltaRotary.from_table(table, neox=True, rotary_dim=64, head_dim=32)
    rotary = delta(CASES["default"])
    with pytest.raises(ValueError, match="head_dim"):
        rotary.rotate(torch.zeros(1, HEADS, 32), *rotary.factors(torch.zeros(1).long(), torch.zeros(1).long()))
    with pytest.raises(IndexError):
        rotary.factors(torch.tensor([0]), torch.tensor([rotary.positions]))
