"""Changes on recomputed tokens, carried over to the others."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_relay.attention import Interpolation, TorchCarrier, parts_of
from sglang_relay.rotary import DeltaRotary

LAYERS, SLOTS, HEADS, DIM, ROTARY = 5, 200, 2, 16, 8
POSITIONS = 512


def make_rotary(neox: bool) -> DeltaRotary:
    frequency = 1.0 / 10000 ** (torch.arange(0, ROTARY, 2, dtype=torch.float32) / ROTARY)
    angle = torch.outer(torch.arange(POSITIONS, dtype=torch.float32), frequency)
    return DeltaRotary.from_table(torch.cat((angle.cos(), angle.sin()), -1), neox=neox, rotary_dim=ROTARY, head_dim=DIM)


class World(NamedTuple):
    """Donor KV of `n` reused tokens in two segments, and fresh KV on the chosen ones of them."""

    offsets: tuple[int, ...]
    slots: torch.Tensor
    positions: torch.Tensor
    index: torch.Tensor
    chosen: np.ndarray
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    rotary: DeltaRotary

    def interpolation(self) -> Interpolation:
        parts = parts_of(self.offsets, self.chosen)
        buffers = self.keys, self.values
        return Interpolation(parts, self.slots, self.positions, self.index, buffers, self.rotary, TorchCarrier())

    def plain(self, layer: int) -> torch.Tensor:
        """float64 [n, heads * dim]: keys without their positions."""
        cos, sin = self.rotary.factors(self.positions, torch.zeros_like(self.positions))
        return self.rotary.rotate(self.keys[layer][self.slots].double().float(), cos, sin).double().flatten(1)


def make_world(seed: int = 0, *, neox: bool = True, dtype: torch.dtype = torch.float32, every: int = 4) -> World:
    g = torch.Generator().manual_seed(seed)
    slots = torch.randperm(SLOTS, generator=g)[:90]
    positions = torch.cat((torch.arange(5, 65), torch.arange(80, 110)))
    index = torch.cat((torch.arange(60), torch.arange(7, 37)))
    kinds = torch.randint(0, 3, (SLOTS,), generator=g)  # tokens of one kind are alike

    def buffer() -> torch.Tensor:
        kind, own = (torch.randn(n, HEADS, DIM, generator=g) for n in (3, SLOTS))
        return (kind[kinds] + 0.3 * own).to(dtype)

    keys, values = ([buffer() for _ in range(LAYERS)] for _ in "kv")
    chosen = np.arange(90) % every == 0
    return World((0, 60, 90), slots, positions, index, chosen, keys, values, make_rotary(neox))


def recompute(world: World, layer: int) -> None:
    g, at = torch.Generator().manual_seed(layer), world.slots[torch.from_numpy(world.chosen)]
    for buffer in (world.keys[layer], world.values[layer]):
        buffer[at] += 0.3 * torch.randn(len(at), HEADS, DIM, generator=g).to(buffer.dtype)


def expected(world: World, layer: int, donor: World) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [n, ...], keys without positions and values, by the formula of the module's docstring, token by token."""
    old_k, old_v = donor.plain(layer), donor.values[layer][world.slots].double().flatten(1)
    new_k, new_v = world.plain(layer), world.values[layer][world.slots].double().flatten(1)
    looks = [x for i in (1, 2, 3) for x in (donor.plain(i), donor.values[i][world.slots].double().flatten(1))]

    def likeness(a: int, b: int) -> float:
        cos = sum(torch.cosine_similarity(x[a], x[b], dim=0).item() for x in looks) / 6
        return math.exp(4 * (cos - 1) - abs(math.log((world.index[a].item() + 4) / (world.index[b].item() + 4))))

    for start, stop in ((0, 60), (60, 90)):
        s = [i for i in range(start, stop) if world.chosen[i]]
        gram = torch.tensor([[likeness(a, b) + 0.2 * (a == b) for b in s] for a in s], dtype=torch.float64)
        for u in (i for i in range(start, stop) if not world.chosen[i]):
            weight = torch.linalg.solve(gram, torch.tensor([likeness(u, a) for a in s], dtype=torch.float64))
            new_k[u] += weight @ (new_k[s] - old_k[s])
            new_v[u] += weight @ (new_v[s] - old_v[s])
    return new_k, new_v


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
def test_equals_the_formula(neox: bool, dtype: torch.dtype, error: float) -> None:
    world, donor = (make_world(neox=neox, dtype=dtype) for _ in range(2))
    interpolation = world.interpolation()
    others = torch.ones(SLOTS, dtype=torch.bool)
    others[world.slots[torch.from_numpy(~world.chosen)]] = False
    for layer in range(1, LAYERS):
        recompute(world, layer)
        before = [buffer[others].clone() for buffer in (world.keys[layer], world.values[layer])]
        want_k, want_v = expected(world, layer, donor)
        interpolation.apply(layer, world.keys[layer], world.values[layer])
        torch.testing.assert_close(world.plain(layer), want_k, rtol=0, atol=error)
        got_v = world.values[layer][world.slots].double().flatten(1)
        torch.testing.assert_close(got_v, want_v, rtol=0, atol=error)
        moved = (got_v - donor.values[layer][world.slots].double().flatten(1)).norm(dim=-1)
        assert moved.median() > 3 * error, "most tokens are alike to some chosen one in this world"
        for buffer, as_it_was in zip((world.keys[layer], world.values[layer]), before, strict=True):
            assert torch.equal(buffer[others], as_it_was), "only kept tokens change"


def test_layer_0_is_left_alone_and_no_layer_is_corrected_twice() -> None:
    world = make_world()
    interpolation = world.interpolation()
    for layer, changes in ((0, False), (1, True), (1, False), (2, True), (1, False)):
        if changes:
            recompute(world, layer)
        before = world.values[layer].clone()
        interpolation.apply(layer, world.keys[layer], world.values[layer])
        assert torch.equal(before, world.values[layer]) != changes, layer


def test_nothing_changes_where_nothing_changed() -> None:
    world, donor = make_world(dtype=torch.bfloat16), make_world(dtype=torch.bfloat16)
    interpolation = world.interpolation()
    for layer in range(LAYERS):
        interpolation.apply(layer, world.keys[layer], world.values[layer])
        assert torch.equal(world.keys[layer], donor.keys[layer])
        assert torch.equal(world.values[layer], donor.values[layer])


def test_what_depends_on_a_tokens_content_is_found() -> None:
    """8 kinds of token, each of which changes in its own way. Those far from the recomputed ones get less of it."""
    world = make_world(every=3)
    g = torch.Generator().manual_seed(5)
    kind = torch.randint(0, 8, (90,), generator=g)
    content, change = (torch.randn(8, HEADS, DIM, generator=g) for _ in range(2))
    for buffer in (*world.keys, *world.values):
        buffer[world.slots] = content[kind] + 0.05 * torch.randn(90, HEADS, DIM, generator=g)
    interpolation, before = world.interpolation(), world.values[1][world.slots].clone()
    chosen = torch.from_numpy(world.chosen)
    world.values[1][world.slots[chosen]] += change[kind[chosen]]
    interpolation.apply(1, world.keys[1], world.values[1])
    left = before + change[kind] - world.values[1][world.slots]
    assert left[~chosen].norm() < 0.75 * change[kind[~chosen]].norm()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 1700), min_size=1, max_size=4), st.floats(0, 1), st.integers(0, 9))
def test_parts_cover_each_segment_in_pieces_of_its_own(lengths: list[int], share: float, seed: int) -> None:
    offsets = np.concatenate(([0], np.cumsum(lengths))).tolist()
    chosen = np.random.default_rng(seed).random(offsets[-1]) < share
    parts = parts_of(offsets, chosen)
    seen = np.zeros(offsets[-1], dtype=int)
    for kept, some in parts:
        tokens = np.sort(np.concatenate((kept, some)))
        assert len(kept) and len(some) and len(tokens) <= 512
        assert (np.diff(tokens) == 1).all() and chosen[some].all() and not chosen[kept].any()
        segment = np.searchsorted(offsets, tokens, side="right")
        assert segment[0] == segment[-1]
        length = offsets[segment[0]] - offsets[segment[0] - 1]
        assert abs(len(tokens) - length / math.ceil(length / 512)) < 1
        seen[tokens] += 1
    assert seen.max(initial=0) <= 1
    # What is in no part has nothing to learn from, or needs nothing.
    for start, stop in pairwise(offsets):
        for tokens in np.array_split(np.arange(start, stop), math.ceil((stop - start) / 512) or 1):
            mixed = 0 < chosen[tokens].sum() < len(tokens)
            assert (seen[tokens] == mixed).all()
