"""One decision for all tensor-parallel ranks: relay together or decline together."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import xxhash


class Vote(NamedTuple):
    """The same on all ranks. ok: every rank was ok; equal: all digests were equal."""

    ok: bool
    equal: bool


class Consensus:
    """Agreement over the scheduler's CPU process group.

    Every rank must call ``agree`` at the same points, whatever it found locally: a rank that skipped the call would
    leave the others waiting. With one rank nothing is sent.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group if group is not None and dist.get_world_size(group) > 1 else None

    @property
    def ranks(self) -> int:
        return 1 if self._group is None else dist.get_world_size(self._group)

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, whose value ``broadcast`` gives to all."""
        return self._group is None or dist.get_rank(self._group) == 0

    def agree(self, ok: bool, digest: int) -> bool:
        """True on all ranks if every rank is ok and all digests (63-bit) are equal; else False on all ranks."""
        return all(self.vote(ok, digest))

    def vote(self, ok: bool, digest: int) -> Vote:
        """As ``agree``, telling apart a rank that failed from ranks that found different things."""
        if self._group is None:
            return Vote(ok, True)
        votes = torch.tensor([int(ok), digest, -digest], dtype=torch.int64)
        dist.all_reduce(votes, op=dist.ReduceOp.MIN, group=self._group)
        all_ok, low, negated_high = votes.tolist()
        return Vote(bool(all_ok), low == -negated_high)

    def union(self, names: list[str]) -> list[str]:
        """The names that any rank has, on every rank: those of rank 0 first."""
        if self._group is None:
            return names
        everybody: list[Any] = [None] * self.ranks
        dist.all_gather_object(everybody, names, group=self._group)
        return list(dict.fromkeys(name for of_rank in everybody for name in of_rank))

    def broadcast(self, value: object) -> object:
        """Rank 0's value, on every rank."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=dist.get_global_rank(self._group, 0), group=self._group)
        return box[0]


def digest_of(*parts: object) -> int:
    """63-bit digest of the textual form of ``parts``: equal on ranks whose parts are equal."""
    return xxhash.xxh3_64_intdigest(repr(parts).encode()) >> 1
