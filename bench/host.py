"""Host time of the relay at its worst: for a prompt of 128k tokens, and for a decode step.

    python -m bench.host --json results/host.json

No model and no server: the index, SGLang's own radix tree and pool, and the matcher of a server, over texts that are
made to be slow. What is printed is the least of ``--repeats`` runs, in milliseconds:

- match: find the pieces of a prompt, donors looked up in the tree (`Matcher.pieces`)
- lock: lock the donors of all pieces that were found, and release them (`Donors.hold`)
- step: what a decode step spends on a request that may quote, per request (`Quotes.wanted`)
- learn: the slowest of the learns that filled the index
"""

from __future__ import annotations

import argparse
import json
import os
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("SGLANG_PLATFORM", "relay_cpu")

import numpy as np
import torch
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import InsertParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.runtime_context import publish
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.server_args import ServerArgs

from sglang_relay.config import RelayConfig
from sglang_relay.engine.donors import Donors
from sglang_relay.engine.matching import Matcher
from sglang_relay.engine.namespaces import Namespaces, Tenant
from sglang_relay.engine.quote_book import QuoteBook
from sglang_relay.engine.requests import RelayRequest, new_report, read_controls
from sglang_relay.engine.selection import Unselected
from sglang_relay.engine.tree import RelayCache
from sglang_relay.index import ContentIndex, DepthMap, warm_up
from sglang_relay.plan import Candidate
from sglang_relay.policies import make_policies

LENGTH = 128 * 1024
VOCAB = 50_000
SLOTS = 16 * LENGTH
BASE = 0x5EC4E7
NOBODY = Tenant(None, None, None)


class World:
    """A server's index and tree, without a model."""

    def __init__(self) -> None:
        self.config = RelayConfig(policy="probe")
        pool = MHATokenToKVPool(
            SLOTS, 1, torch.float16, head_num=1, head_dim=2, layer_num=1, device="cpu", enable_memory_saver=False
        )
        self.allocator = TokenToKVPoolAllocator(SLOTS, torch.float16, "cpu", pool, need_sort=False)
        rows = ReqToTokenPool(size=4, max_context_len=2 * LENGTH, device="cpu", enable_memory_saver=False)
        self.tree = RelayCache(
            CacheInitParams(
                disable=False,
                req_to_token_pool=rows,
                token_to_kv_pool_allocator=self.allocator,
                page_size=1,
                tree_components=(ComponentType.FULL,),
            )
        )
        config = self.config
        self.index = ContentIndex(
            base=BASE,
            window=config.window,
            stride=config.stride,
            min_run=config.min_segment,
            max_bytes=config.index_bytes,
            max_runs=2 * config.max_segments,
        )
        self.donors = Donors(self.tree, self.index)
        self.policies = make_policies(config, 32)
        self.matcher = Matcher(config, self.donors, DepthMap(BASE, 1 << 18), Namespaces("secret"), None, None)
        self.slowest_learn = 0.0

    def decoded(self, path: np.ndarray, start: int) -> None:
        """A request has left ``path`` in the tree, and its tokens from ``start`` on as a donor."""
        slots = self.allocator.alloc(len(path))
        assert slots is not None, "the pool is full"
        self.tree.insert(InsertParams(key=RadixKey(array("q", path.tolist()), None), value=slots))
        began = time.perf_counter()
        self.index.learn(NOBODY, None, path, start, len(path), 0)
        self.slowest_learn = max(self.slowest_learn, time.perf_counter() - began)

    def request(self, prompt: np.ndarray) -> tuple[Req, RelayRequest]:
        req = request_of(prompt, 0)
        controls = read_controls(None, self.config, self.policies)
        return req, RelayRequest(controls, NOBODY, 0, new_report("probe", None))

    def match(self, prompt: np.ndarray) -> Callable[[], list[Candidate]]:
        req, state = self.request(prompt)
        return lambda: self.matcher.pieces(req, state, self.policies["probe"])

    def lock(self, prompt: np.ndarray, pieces: list[Candidate]) -> Callable[[], None]:
        req, _ = self.request(prompt)

        def both() -> None:
            found = self.donors.hold(req, (None, None), pieces)
            self.donors.release([held for held in found if held is not None])

        return both


def request_of(prompt: np.ndarray, prefix: int) -> Req:
    tokens = array("q", prompt.tolist())
    req = Req("bench", "", tokens, SamplingParams(max_new_tokens=1))
    req.full_untruncated_fill_ids, req.extend_end, req.prefix_len = tokens, len(tokens), prefix
    return req


# ---------------------------------------------------------------------- shapes of texts


def tokens(n: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(3, VOCAB, n, dtype=np.int32)


def pieces_of_one(world: World, rng: np.random.Generator, count: int) -> np.ndarray:
    """Pieces of one long answer, in another order."""
    path = tokens(LENGTH, rng)
    world.decoded(path, 16)
    size = LENGTH // count
    starts = rng.permutation(np.arange(0, LENGTH - size, size))
    return np.concatenate([np.concatenate((tokens(4, rng), path[s : s + size - 4])) for s in starts])[: LENGTH - 64]


def long_conversation(world: World, rng: np.random.Generator, count: int) -> np.ndarray:
    """Answers of one conversation, each behind all turns before it, told in another order."""
    path, size = tokens(LENGTH, rng), LENGTH // count
    for stop in range(size, LENGTH + 1, size):
        world.decoded(path[:stop], stop - size)
    return np.concatenate([path[s : s + size - 4] for s in rng.permutation(np.arange(0, LENGTH - size, size))])


def periodic(world: World, rng: np.random.Generator, period: int) -> np.ndarray:
    """One text again and again, in donor and prompt."""
    text = np.resize(tokens(period, rng), LENGTH)
    world.decoded(text, 0)
    return np.roll(text, 1)[: LENGTH - 64]


def many_copies(world: World, rng: np.random.Generator, copies: int, phases: int) -> np.ndarray:
    """Donors of the same text, cut at different phases of the index's stride."""
    text = tokens(LENGTH // 8, rng)
    for copy in range(copies):
        head = tokens(32 + copy % phases, rng)
        world.decoded(np.concatenate((head, text)), 0)
    return np.tile(text, 8)[: LENGTH - 64]


def near_miss(world: World, rng: np.random.Generator) -> np.ndarray:
    """Windows that are equal, and runs that are too short to be used."""
    text = tokens(LENGTH, rng)
    for _ in range(8):
        other = text.copy()
        other[:: world.config.min_segment - 2] = tokens(len(other[:: world.config.min_segment - 2]), rng)
        world.decoded(other, 0)
    return text[: LENGTH - 64]


SHAPES: dict[str, Callable[[World, np.random.Generator], np.ndarray]] = {
    "128 pieces of one answer": lambda w, r: pieces_of_one(w, r, 128),
    "512 pieces of one answer": lambda w, r: pieces_of_one(w, r, 512),
    "128 turns of a conversation": lambda w, r: long_conversation(w, r, 128),
    "512 turns of a conversation": lambda w, r: long_conversation(w, r, 512),
    "period 1": lambda w, r: periodic(w, r, 1),
    "period 7": lambda w, r: periodic(w, r, 7),
    "period 100": lambda w, r: periodic(w, r, 100),
    "64 copies in 8 phases": lambda w, r: many_copies(w, r, 64, 8),
    "near misses": near_miss,
}


# ---------------------------------------------------------------------- decode steps


def unselected(n: int) -> Unselected:
    return Unselected(np.arange(16, n - 64), torch.arange(16, n - 64))


def quoting(name: str, prompt: np.ndarray, answer: Callable[[int], list[int]]) -> tuple[str, Callable[[int], object]]:
    req = request_of(prompt, 0)
    quotes = QuoteBook().placed(req, None, unselected(len(prompt)))
    return name, lambda step: quotes.wanted(answer(step), 8)


def decoding(rng: np.random.Generator) -> Iterator[tuple[str, Callable[[int], object]]]:
    """Name, and a step of a request whose prompt has 128k tokens."""
    prompt = tokens(LENGTH, rng)
    yield quoting("quotes nothing", prompt, lambda step: tokens(16, rng).tolist())
    yield quoting("quotes all of it", prompt, lambda step: prompt[step + 100 : step + 116].tolist())
    for period in (1, 7):
        text = np.resize(tokens(period, rng), LENGTH)
        yield quoting(f"period {period}", text, lambda step, text=text: text[step : step + 16].tolist())
    yield conversation(rng)


def conversation(rng: np.random.Generator, turns: int = 400) -> tuple[str, Callable[[int], object]]:
    """The last of many turns, each of which found what the turns before had left."""
    path, book, found = tokens(LENGTH, rng), QuoteBook(), None
    size = LENGTH // turns
    for turn in range(1, turns + 1):
        req = request_of(path[: turn * size], (turn - 1) * size)
        found = book.found(req) if turn > 1 else None
        rest = np.arange((turn - 1) * size + 8, turn * size - 8)
        found = book.placed(req, found, Unselected(rest, torch.from_numpy(rest)))
    last: Any = found
    return f"turn {turns} of a conversation", lambda step: last.wanted(tokens(16, rng).tolist(), 8)


# ---------------------------------------------------------------------- report


def least_ms(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return round(1e3 * min(times), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="runs of which the least counts (%(default)s)")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="only this shape of prompt")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    publish(ServerArgs(**{"model_path": "none", "device": "cpu"}), role="scheduler")
    warm_up()
    rows: dict[str, dict[str, float]] = {}
    print(f"{'prompt of 128k tokens':<32}{'pieces':>8}{'match':>10}{'lock':>10}{'learn':>10}   ms")
    for name in args.shape or SHAPES:
        world = World()
        prompt = SHAPES[name](world, np.random.default_rng(1))
        pieces = world.match(prompt)()
        match = least_ms(world.match(prompt), args.repeats)
        lock = least_ms(world.lock(prompt, pieces), args.repeats)
        learn = round(1e3 * world.slowest_learn, 3)
        rows[name] = {"pieces": len(pieces), "match_ms": match, "lock_ms": lock, "learn_ms": learn}
        print(f"{name:<32}{len(pieces):>8}{match:>10.2f}{lock:>10.2f}{learn:>10.2f}", flush=True)
    print(f"\n{'decode step':<32}{'step':>10}   ms per request, median of 64 steps")
    for name, step in decoding(np.random.default_rng(2)):
        times = sorted(least_ms(lambda s=s: step(s), 1) for s in range(64))  # noqa: B023
        rows[name] = {"step_ms": times[32], "worst_step_ms": times[-1]}
        print(f"{name:<32}{times[32]:>10.3f}{times[-1]:>10.3f} at worst", flush=True)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
