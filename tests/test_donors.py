"""Donors in SGLang's own tree: each path is walked once, whatever is asked of it, and locked once."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.runtime_context import publish, reset_context
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs

from sglang_relay.engine import donors as module
from sglang_relay.engine.donors import EXACT_PREFIX, Donors
from sglang_relay.engine.namespaces import Tenant
from sglang_relay.engine.tree import RelayCache
from sglang_relay.index import ContentIndex
from sglang_relay.plan import Candidate

TENANT = Tenant(None, None, None)
SLOTS = 60_000


class World:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reset_context()
        publish(ServerArgs(**{"model_path": "none", "device": "cpu"}), role="scheduler")
        kinds: dict[str, Any] = {"head_num": 1, "head_dim": 2, "layer_num": 1, "enable_memory_saver": False}
        pool = MHATokenToKVPool(SLOTS, 1, torch.float16, device="cpu", **kinds)
        self.allocator = TokenToKVPoolAllocator(SLOTS, torch.float16, "cpu", pool, need_sort=False)
        rows = ReqToTokenPool(size=4, max_context_len=10_000, device="cpu", enable_memory_saver=False)
        self.tree = RelayCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=rows,
                token_to_kv_pool_allocator=self.allocator,
                page_size=1,
                tree_components=(ComponentType.FULL,),
            )
        )
        self.index = ContentIndex(base=0x5EC4E7)
        self.donors = Donors(self.tree, self.index)
        self.walks = 0
        walk = self.donors._walk

        def counted(key: RadixKey) -> Any:
            self.walks += 1
            return walk(key)

        monkeypatch.setattr(self.donors, "_walk", counted)

    def decoded(self, path: list[int], start: int) -> tuple[int, torch.Tensor]:
        slots = self.allocator.alloc(len(path))
        assert slots is not None
        result = self.tree.insert(InsertParams(key=RadixKey(array("q", path), None), value=slots))
        held = torch.cat((self.held(path)[: result.prefix_len], slots[result.prefix_len :]))
        donor = self.index.learn(TENANT, None, np.array(path, dtype=np.int32), start, len(path), 0)
        assert donor is not None
        return donor, held

    def held(self, path: list[int]) -> torch.Tensor:
        walk = Donors(self.tree, self.index)._walk(RadixKey(array("q", path), None))
        return self.tree.path_device_indices(walk.node)[: walk.reached]

    def evict(self, count: int) -> None:
        self.tree.evict(EvictParams(num_tokens=count))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    yield World(monkeypatch)
    reset_context()


def request(tokens: list[int]) -> Req:
    path = array("q", tokens)
    req = Req("", "", path, SamplingParams(max_new_tokens=1))
    req.full_untruncated_fill_ids, req.extend_end = path, len(path)
    return req


def piece(at: int, donor: int, source: int, length: int) -> Candidate:
    return Candidate(at, at + length, donor, source, 0)


def test_the_turns_of_a_conversation_are_one_walk_and_one_lock(world: World) -> None:
    rng = random.Random(1)
    path = [rng.randrange(3, 50_000) for _ in range(4000)]
    turns = [world.decoded(path[:stop], stop - 100) for stop in range(100, 4001, 100)]
    wanted = [piece(i * 100, donor, i * 100, 90) for i, (donor, _) in enumerate(turns)]
    rng.shuffle(wanted)
    assert world.donors.available(wanted) == [90] * 40 and world.walks == 1
    found = world.donors.hold(request(path), (None, None), wanted)
    assert world.walks == 2 and world.donors.locked == 1
    for part, held in zip(wanted, found, strict=True):
        assert held is not None and torch.equal(held.slots, turns[-1][1][part.source : part.source + 90])
    world.evict(SLOTS)
    assert len(world.held(path)) >= 3990, "what is locked stays"
    world.donors.touch([held for held in found if held is not None])
    world.donors.release([held for held in found if held is not None])
    assert world.donors.locked == 0
    world.evict(SLOTS)
    assert len(world.held(path)) == 0
    assert world.donors.available(wanted[:5]) == [0] * 5 and len(world.index) == 35, "the dead are forgotten"


@pytest.mark.parametrize("seed", range(20))
def test_as_one_by_one(world: World, seed: int) -> None:
    """Random trees of paths, parts of them evicted: the same lengths and slots as by a walk for each piece alone."""
    rng = random.Random(seed)
    paths: list[list[int]] = []
    found: list[int] = []
    for _ in range(12):
        head = rng.choice(paths)[: rng.randrange(1, 300)] if paths and rng.random() < 0.7 else []
        path = [*head, *(rng.randrange(3, 500) for _ in range(rng.randrange(50, 300)))]
        if path not in paths:
            paths.append(path)
            found.append(world.decoded(path, 0)[0])
    world.evict(rng.randrange(0, 1200))
    wanted = []
    for _ in range(30):
        number = rng.randrange(len(paths))
        source = rng.randrange(len(paths[number]))
        wanted.append(piece(0, found[number], source, rng.randrange(1, len(paths[number]) - source + 1)))
    alone = {donor: world.held(path) for donor, path in zip(found, paths, strict=True)}
    held = world.donors.hold(request([5]), (None, None), wanted)
    for part, got in zip(wanted, held, strict=True):
        want = alone[part.donor][part.source : part.source + part.stop - part.start]
        assert (got is None) == (len(want) == 0)
        assert got is None or torch.equal(got.slots, want)
    world.donors.release([h for h in held if h is not None])
    assert world.donors.locked == 0
    lengths = [len(alone[p.donor][p.source : p.source + p.stop - p.start]) for p in wanted]
    assert world.donors.available(wanted) == lengths


def test_a_prompt_walks_no_more_than_its_share(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WALKED", 1000)
    rng = random.Random(2)
    paths = [[rng.randrange(3, 50_000) for _ in range(400)] for _ in range(5)]
    found = [world.decoded(path, 0)[0] for path in paths]
    assert world.donors.available([piece(0, donor, 0, 400) for donor in found]) == [400, 400, 0, 0, 0]
    assert len(world.index) == 5, "who was not looked at is not forgotten"


def test_a_prefix_from_another_namespace_is_held(world: World) -> None:
    path = list(range(10, 210))
    _, slots = world.decoded(path, 0)
    (held,) = world.donors.hold(request([*path, 5]), (None, None), [Candidate(50, 150, EXACT_PREFIX, 50, 0)])
    assert held is not None and torch.equal(held.slots, slots[50:150])
    world.donors.release([held])


def test_a_lock_that_fails_leaves_none_behind(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(3)
    paths = [[rng.randrange(3, 50_000) for _ in range(100)] for _ in range(3)]
    wanted = [piece(0, world.decoded(path, 0)[0], 0, 100) for path in paths]
    lock, calls = world.tree.lock, []

    def failing(node: int) -> Any:
        calls.append(node)
        if len(calls) == 3:
            raise RuntimeError("injected")
        return lock(node)

    monkeypatch.setattr(world.tree, "lock", failing)
    with pytest.raises(RuntimeError, match="injected"):
        world.donors.hold(request([5]), (None, None), wanted)
    assert world.donors.locked == 0
    world.evict(SLOTS)
    assert all(len(world.held(path)) == 0 for path in paths)
