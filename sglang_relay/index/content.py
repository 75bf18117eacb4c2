"""The content index: learns what requests computed, and finds it again inside later prompts, wherever it stands
there."""

from collections import Counter
from collections.abc import Callable, Hashable

import numpy as np

from .blocks import BLOCK, BLOCK_BYTES, BlockPool
from .deepen import deepen_rows
from .match import Run, Work, find_runs, rank
from .rolling import MODULUS, mix, power, prefix_hashes, table_key, window_hash
from .shares import OWNER_BYTES, Shares
from .spans import (
    RECORD_BYTES,
    ROW_BYTES,
    START,
    STOP,
    TAIL,
    TENANT,
    Donor,
    DonorRecords,
    Names,
)
from .table import SLOT_BYTES, Table
from .windows import BUCKET, PER_DONOR, add_windows, count_windows, remove_windows, unpack

_TOKEN_LIMIT = 1 << 31
# Shares of `max_bytes`, so that room for one more donor can always be made: blocks never take more than 3/4 and donor
# rows no more than 1/8, and a donor whose windows and record need more than the last 1/8 is not learnt.
_POOL_SHARE, _ROWS_SHARE, _DONOR_SHARE = 6 / 8, 1 / 8, 1 / 8
# A structure grows by half while bytes are left, then by an eighth; smaller steps would copy a table at nearly every
# learn.
_STEPS = (2, 8)
_UNLIMITED = 1 << 62
_LEARNING = ("learnt", "refreshed", "oversized", "evictions", "forgotten", "shared_blocks", "displaced", "repeats")
_TOTALS = (*_LEARNING, "matches", *Work._fields)


def as_tokens(tokens: np.ndarray) -> np.ndarray:
    """The same token ids as a writable, contiguous int32 array; kernels are compiled for no other kind."""
    return np.require(tokens, np.int32, ("C", "W"))


class ContentIndex:
    """Donor spans by content, for one server process. Not thread-safe: the scheduler's thread owns it.

    Deterministic: what it answers and evicts is a function of the sequence of calls, the same in every process that
    makes the same calls with the same `base` (eviction follows shares and a logical clock; ids and hashes follow the
    calls and the base). `match` changes nothing.

    It knows token ids only. A donor's KV is looked up by path in the radix tree when it is used, and may be gone by
    then: `forget` donors found dead, `touch` those that served.

    Parameters: `base`, of the rolling hash, secret and random (any integer is correct, a guessable one can be made
    slow); `window` and `stride`, see windows.py; `min_run`, the shortest run worth reporting; `max_bytes`, bound on
    `nbytes`; `max_runs`, bound on the runs of one match; `alternatives`, how many donors at most are offered for one
    piece of text; `owner_of`, whose share of the bytes a tenant's donors count in (shares.py), one for all by default.
    """

    def __init__(
        self,
        *,
        base: int,
        window: int = 16,
        stride: int = 8,
        min_run: int = 32,
        max_bytes: int = 256 << 20,
        max_runs: int = 128,
        alternatives: int = 4,
        owner_of: Callable[[Hashable], Hashable] = lambda tenant: None,
    ) -> None:
        if min(window, stride, min_run, max_runs, alternatives) < 1:
            raise ValueError("window, stride, min_run, max_runs and alternatives must be at least 1")
        self.window, self.stride, self.min_run = window, stride, min_run
        self.max_bytes, self.max_runs, self.alternatives = max_bytes, max_runs, alternatives
        self._base = np.uint64(base % MODULUS)
        self._factor = np.uint64(power(self._base, window))
        self._blocks = BlockPool()
        self._windows = Table()
        self._donors = DonorRecords()
        self._owner_of = owner_of
        self._shares = Shares()
        self._counts: Counter[str] = Counter()
        self._blocks_limit = BlockPool.capacity_for(int(max_bytes * _POOL_SHARE))
        self._rows_limit = int(max_bytes * _ROWS_SHARE) // ROW_BYTES
        shortest = max(window, min_run)
        if not self._fits(None, None, shortest, 2):
            raise ValueError(f"max_bytes={max_bytes} has no room for a donor of {shortest} tokens")

    def __len__(self) -> int:
        """Number of donors."""
        return len(self._donors)

    @property
    def nbytes(self) -> int:
        """Bytes held: token blocks, tables and donor records. The arrays that a match works with come on top while it
        runs (32 bytes per prompt token), and so does the old table while a table grows."""
        sizes = self._blocks.capacity, self._windows.capacity, self._donors.capacity
        return self._bytes_with(*sizes, len(self), len(self._shares))

    def _bytes_with(self, blocks: int, slots: int, rows: int, donors: int, owners: int) -> int:
        names = self._donors.tenants.nbytes + self._donors.namespaces.nbytes + owners * OWNER_BYTES
        return BlockPool.bytes_for(blocks) + slots * SLOT_BYTES + rows * ROW_BYTES + donors * RECORD_BYTES + names

    # -- learning ------------------------------------------------------------------------------------------------------

    def learn(
        self, tenant: Hashable, namespace: str | None, path: np.ndarray, start: int, stop: int, depth: int
    ) -> int | None:
        """Make tokens `[start, stop)` of `path` (int32 `[n]`, from the first token of the request on) a donor.

        Returns the donor's id, greater than all before it; the id it has already if the same tenant's same span of the
        same path in the same namespace is known (it becomes the most recently used, its depth the greater of the two,
        for the tree may hold either's KV); None if the span is shorter than `min_run` or `window`, or too large for
        `max_bytes`. Room is made by the least recently used donors of who holds most. Raises ValueError if the span is
        not inside the path or `depth` is negative.
        """
        start, stop, depth = int(start), int(stop), int(depth)  # kernels are compiled for no narrower integers
        if not 0 <= start <= stop <= len(path) < _TOKEN_LIMIT or depth < 0:
            raise ValueError(f"no span [{start}, {stop}) at depth {depth} in a path of {len(path)} tokens")
        if stop - start < max(self.min_run, self.window):
            return None
        windows = int(count_windows(stop - start, self.window, self.stride))
        if not self._fits(tenant, namespace, stop, windows):
            self._counts["oversized"] += 1
            return None
        path = as_tokens(path[:stop])
        hashes = prefix_hashes(path, self._base)
        donors, blocks, table = self._donors, self._blocks, self._windows
        tenant_number, namespace_number = donors.tenants.acquire(tenant), donors.namespaces.acquire(namespace)
        chain = blocks.find(path, hashes, tenant_number)
        missing = BlockPool.blocks_of(stop) - chain.blocks
        known = None if missing else donors.same(namespace_number, chain.tail, start, stop)
        if known is not None:
            donors.tenants.release(tenant_number)
            donors.namespaces.release(namespace_number)
            donors.refresh(known, depth)
            self._shares.use(known)
            self._counts["refreshed"] += 1
            return known
        blocks.hold(chain.tail)  # evictions must not free what the path shares
        self._make_room(missing, windows)
        tail = blocks.append(path, hashes, tenant_number, chain)
        blocks.hold(tail)
        blocks.release(chain.tail)
        donor = donors.add(tenant_number, namespace_number, start, stop, depth, tail)
        arguments = (self._factor, self._seed(tenant_number), donors.slot(donor), table.keys, table.values, donors.rows)
        added, displaced, repeats = add_windows(hashes[start:], start, self.window, self.stride, *arguments)
        table.count += added
        size = RECORD_BYTES + missing * BLOCK_BYTES + windows * SLOT_BYTES
        self._shares.add(donor, self._owner_of(tenant), size)
        self._counts.update(learnt=1, displaced=displaced, repeats=repeats, shared_blocks=chain.blocks)
        return donor

    @staticmethod
    def _seed(tenant_number: int) -> np.uint64:
        """Seed of a tenant's window keys: the same window has unrelated keys in different tenants."""
        return np.uint64(mix(np.uint64(tenant_number)))

    def _fits(self, tenant: Hashable, namespace: str | None, path: int, windows: int) -> bool:
        """Whether such a donor fits into an index that holds nothing else; if not, evicting for it would be in vain."""
        record = (
            RECORD_BYTES
            + OWNER_BYTES
            + Names.cost(tenant)
            + Names.cost(namespace)
            + Table.slots_for(windows) * SLOT_BYTES
        )
        rows = self._rows_limit > 0
        return rows and BlockPool.blocks_of(path) <= self._blocks_limit and record <= self.max_bytes * _DONOR_SHARE

    def _make_room(self, blocks: int, windows: int) -> None:
        """See to free space for `blocks` blocks, `windows` table entries and one donor: by growing, and where that
        would break the byte bound, by evicting."""
        while not self._grow(blocks, windows):
            slots, alone = Table.slots_for(self._windows.count + windows), not len(self)
            if self._windows.capacity > (slots if alone else 2 * slots):
                self._windows.resize(slots if alone else slots * 5 // 4)
            else:
                self._remove(self._shares.victim())
                self._counts["evictions"] += 1

    def _grow(self, blocks: int, windows: int) -> bool:
        pool, table, donors = self._blocks, self._windows, self._donors
        needs = pool.live + blocks, Table.slots_for(table.count + windows), len(donors) + 1
        sizes = pool.capacity, table.capacity, donors.capacity
        limits = self._blocks_limit, _UNLIMITED, self._rows_limit
        if any(need > limit for need, limit in zip(needs, limits, strict=True)):
            return False
        for step in _STEPS if len(donors) else (*_STEPS, _UNLIMITED):
            room, slots, rows = (
                size if need <= size else min(max(need, size + size // step), limit)
                for need, size, limit in zip(needs, sizes, limits, strict=True)
            )
            if self._bytes_with(room, slots, rows, len(donors) + 1, len(self._shares) + 1) <= self.max_bytes:
                if room > pool.capacity:
                    pool.grow(room)
                if slots > table.capacity:
                    table.resize(slots)
                if rows > donors.capacity:
                    donors.grow(rows)
                return True
        return False

    def _remove(self, donor: int) -> None:
        donors, table = self._donors, self._windows
        slot = donors.slot(donor)
        tenant, start, stop, tail = donors.rows[slot, [TENANT, START, STOP, TAIL]].tolist()
        hashes = prefix_hashes(self._blocks.read(tail, stop, start, stop), self._base)
        arguments = (self._factor, self._seed(tenant), slot, table.keys, table.values)
        table.count -= remove_windows(hashes, start, self.window, self.stride, *arguments)
        donors.remove(donor)
        self._shares.remove(donor)
        self._blocks.release(tail)

    # -- matching ------------------------------------------------------------------------------------------------------

    def match(self, tenant: Hashable, prompt: np.ndarray, start: int = 0) -> list[Run]:
        """Maximal runs of `prompt[start:]` (int32 `[n]`) in `tenant`'s donor spans, each of at least `min_run` tokens.

        Runs may overlap: for text that several donors hold the best few are given. Sorted by depth, then longest, then
        most recently used donor, then start: meant to be resolved and covered greedily in this order. Every run is
        confirmed token by token. A common stretch of at least `max(min_run, window + stride - 1)` tokens is found
        unless a bound cut it off (match.py for one match, windows.py for what is stored; `stats` counts both). Time is
        linear in `n`.
        """
        start = int(start)
        if start < 0:
            raise ValueError(f"start={start} is negative")
        number = self._donors.tenants.get(tenant)
        if number is None or len(prompt) - start < max(self.min_run, self.window):
            return []
        prompt = as_tokens(prompt)
        runs, work = find_runs(
            prompt,
            prefix_hashes(prompt, self._base),
            start,
            window=self.window,
            min_run=self.min_run,
            factor=self._factor,
            seed=self._seed(number),
            tenant=number,
            keys=self._windows.keys,
            values=self._windows.values,
            rows=self._donors.rows,
            tokens=self._blocks.tokens,
            parents=self._blocks.parents,
        )
        self._counts.update(work._asdict())
        self._counts["matches"] += 1
        return rank(runs, self._donors.rows, self.max_runs, self.alternatives) if len(runs) else []

    # -- donors --------------------------------------------------------------------------------------------------------

    def donor(self, donor: int) -> Donor:
        """The donor with this id; KeyError if it has been evicted or forgotten."""
        return self._donors.describe(donor)

    def path(self, donor: int, stop: int) -> np.ndarray:
        """A copy of the first `stop` tokens of the donor's path, int32 `[stop]`: the key of its KV in the tree.
        KeyError if the donor is gone, ValueError unless `0 <= stop <=` the end of its span."""
        row = self._donors.rows[self._donors.slot(donor)]
        length = int(row[STOP])
        if not 0 <= stop <= length:
            raise ValueError(f"stop={stop} is outside the path of {length} tokens of donor {donor}")
        return self._blocks.read(int(row[TAIL]), length, 0, int(stop))

    def same_start(self, donor: int, other: int, stop: int) -> bool:
        """Whether the paths of two donors begin with the same `stop` tokens. False where one is shorter, or gone."""
        if donor not in self._donors or other not in self._donors:
            return False
        one, two = (self._donors.rows[self._donors.slot(d), [TAIL, STOP]].tolist() for d in (donor, other))
        return 0 < stop <= min(one[1], two[1]) and self._blocks.same_start(int(stop), *one, *two)

    def deepen(self, tenant: Hashable, namespace: str | None, path: np.ndarray, position: int, depth: int) -> int:
        """The KV of `path` (int32 `[n]`) has been computed at `depth` from `position` on: what donors of these tokens
        offer is that deep now, whatever it was when they were learnt. Returns how many donors that are."""
        owner, space = self._donors.tenants.get(tenant), self._donors.namespaces.get(namespace)
        if owner is None or space is None:
            return 0
        begin = as_tokens(path[: int(position) + 1])
        before = begin[: int(position) // BLOCK * BLOCK]  # tokens in full blocks, which equal paths share
        blocks = self._blocks
        chain = blocks.find(before, prefix_hashes(before, self._base), owner)
        if chain.blocks * BLOCK < len(before):
            return 0
        rows = self._donors.rows
        return deepen_rows(rows, owner, space, begin, chain.tail, int(depth), blocks.tokens, blocks.parents)

    def touch(self, donor: int) -> None:
        """Make a donor that has served the most recently used; one that is gone is ignored."""
        if donor in self._donors:
            self._donors.refresh(donor, 0)
            self._shares.use(donor)

    def forget(self, donor: int) -> None:
        """Drop a donor (its KV was found dead); one that is gone is ignored."""
        if donor in self._donors:
            self._remove(donor)
            self._counts["forgotten"] += 1

    def forget_where(self, predicate: Callable[[Donor], bool]) -> int:
        """Drop the donors for which `predicate` holds; returns how many."""
        doomed = [donor for donor in self._donors if predicate(self.donor(donor))]
        for donor in doomed:
            self.forget(donor)
        return len(doomed)

    def clear(self, first_id: int = 0) -> None:
        """Drop everything and give the memory back. Ids go on, so that an id from before never names a later donor;
        from `first_id` if that is greater."""
        self._blocks.clear()
        self._windows.clear()
        self._donors.clear(first_id)
        self._shares = Shares()

    # -- state ---------------------------------------------------------------------------------------------------------

    def stats(self) -> dict[str, int]:
        """Sizes now (`donors`, `blocks`, `windows`, `bytes`) and totals since construction: of learning (`learnt`,
        `refreshed`, `oversized`, `evictions`, `forgotten`, `shared_blocks`, and windows left out as `displaced` or
        `repeats`, see windows.py) and of matching (`matches`, and the fields of match.Work)."""
        sizes = {"donors": len(self), "blocks": self._blocks.live, "windows": self._windows.count, "bytes": self.nbytes}
        return sizes | {name: self._counts[name] for name in _TOTALS}

    def check_integrity(self) -> None:
        """Raises AssertionError unless all parts agree with each other and with the byte bound. Slow; for tests."""
        donors = self._donors
        donors.check_integrity()
        self._shares.check_integrity()
        assert sorted(self._shares) == sorted(donors)
        self._blocks.check_integrity(Counter(donors.rows[donors.slot(donor), TAIL].item() for donor in donors))
        table = self._windows
        table.check_integrity()
        arrays = self._blocks.nbytes + table.nbytes + donors.rows.nbytes
        names = donors.tenants.nbytes + donors.namespaces.nbytes + len(self._shares) * OWNER_BYTES
        assert self.nbytes == arrays + names + len(self) * RECORD_BYTES, "the books differ from the arrays"
        assert self.nbytes <= self.max_bytes, f"{self.nbytes} bytes exceed {self.max_bytes}"
        live = {donors.slot(donor) for donor in donors}
        for key, holders in _by_key(table.entries()).items():
            assert len(holders) <= BUCKET and len(set(holders)) == len(holders)
            assert max(Counter(slot for slot, _ in holders).values()) <= PER_DONOR
            for slot, source in holders:
                assert slot in live, "a window of a dead donor"
                tenant, start, stop, tail = donors.rows[slot, [TENANT, START, STOP, TAIL]].tolist()
                assert start <= source <= stop - self.window, "a window outside its span"
                text = self._blocks.read(tail, stop, source, source + self.window)
                hashes = prefix_hashes(text, self._base)
                value = np.uint64(window_hash(hashes, 0, self.window, self._factor))
                assert key == table_key(value, self._seed(tenant)), "a window under another window's key"


def _by_key(entries: list[tuple[int, int]]) -> dict[int, list[tuple[int, int]]]:
    grouped: dict[int, list[tuple[int, int]]] = {}
    for key, value in entries:
        grouped.setdefault(key, []).append(unpack(value))
    return grouped
