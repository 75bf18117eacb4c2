"""The work of `ops.base` on the Triton kernels of `sglang_relay_kernels`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sglang_relay_kernels.deviation import value_deviation  # pyright: ignore[reportMissingImports]
from sglang_relay_kernels.kv_table import kv_table  # pyright: ignore[reportMissingImports]
from sglang_relay_kernels.probe_scores import add_probe_scores, plan_probe  # pyright: ignore[reportMissingImports]
from sglang_relay_kernels.realign_triton import realign_on_device  # pyright: ignore[reportMissingImports]
from sglang_relay_kernels.scattered_attention import (  # pyright: ignore[reportMissingImports]
    ScatteredSequence,
    attend_scattered,
    choose_tiling,
    plan_scattered,
)

from sglang_relay.attention import Heads
from sglang_relay.ops.base import ProbeQueries
from sglang_relay.rotary import DeltaRotary
from sglang_relay.transfer import on_device


class TritonCopier:
    """One launch copies all layers."""

    name = "triton"

    def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], rotary: DeltaRotary) -> None:
        """As `TorchCopier`. Waits for the device: the buffers' addresses are copied there. Raises ValueError for a pool
        that the kernel does not take: not contiguous [slots, kv_heads, dim], or layers that differ in shape."""
        self._table = kv_table(keys, values)
        self._rotary = rotary

    def copy_turned(self, donors: torch.Tensor, own: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        """As `Copier.copy_turned`."""
        rotary = self._rotary
        cos, sin = rotary.factors(source, target)
        realign_on_device(
            self._table, donors, own, cos, sin, neox=rotary.neox, rotary_dim=rotary.rotary_dim, disjoint=True
        )


class TritonDeviation:
    """The fresh rows are gathered first: one such copy per forward is not worth a row index in the kernel."""

    name = "triton"

    def distances(
        self, fresh: torch.Tensor, rows: torch.Tensor, cached: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """As `Deviation.distances`."""
        out = torch.empty(len(rows), dtype=torch.float32, device=fresh.device)
        value_deviation(fresh.index_select(0, rows), cached, slots, out)
        return out


class TritonProbe:
    """Mass and values of the scored keys are read by one kernel, which needs the log-sum-exp of each probe query over
    every key that the query sees. That comes from a pass of the scattered-attention kernel over these few queries,
    whose output nobody reads.

    The stage's own attention has it, too, but not where it would be needed: in the last layer nothing attends, and each
    attention engine gives it in another form or, like PyTorch, not at all. The queries are two dozen rows beside the
    stage's, so the second look costs one more read of K and V, and no row of the score matrix is kept.
    """

    name = "triton"

    def __init__(self, heads: Heads, *, capability: int, multiprocessors: int) -> None:
        """As `TritonAttention`."""
        self.heads = heads
        self.capability = capability
        self.multiprocessors = multiprocessors

    def plan(self, prompts: list[ProbeQueries], *, dtype: torch.dtype, device: torch.device) -> TritonProbeScores:
        """As `ProbeScorer.plan`."""
        return TritonProbeScores(self, prompts, dtype, device)


class TritonProbeScores:
    """The queries of all prompts stand one after another, and so do their keys."""

    def __init__(self, of: TritonProbe, prompts: list[ProbeQueries], dtype: torch.dtype, device: torch.device) -> None:
        heads, group = of.heads, of.heads.query // of.heads.kv
        queries = [len(p.rows) for p in prompts]
        self._wanted = [len(p.wanted) for p in prompts]
        if not prompts:
            return
        packed = group * max(queries)
        self._seen = plan_scattered(
            [ScatteredSequence(p.positions, p.keys) for p in prompts],
            group=group,
            kv_heads=heads.kv,
            tiling=choose_tiling(packed, heads.dim, heads.v_dim, dtype.itemsize, of.capability),
            multiprocessors=of.multiprocessors,
            device=device,
        )
        self._scored = plan_probe([(p.positions, p.wanted) for p in prompts], device=device)
        self._rows = on_device(np.concatenate([p.rows for p in prompts]), device)
        self._slots = torch.cat([p.slots for p in prompts])
        firsts = np.cumsum([0, *(len(p.keys) for p in prompts)])
        wanted = [first + np.searchsorted(p.keys, p.wanted) for first, p in zip(firsts, prompts, strict=False)]
        self._wanted_slots = self._slots.index_select(0, on_device(np.concatenate(wanted), device))
        self._unread = torch.empty(sum(queries), heads.query, heads.v_dim, dtype=dtype, device=device)
        self._mass = torch.empty(sum(queries), heads.query, dtype=torch.float32, device=device)
        self._scores = torch.zeros(heads.kv, sum(self._wanted), dtype=torch.float32, device=device)

    def add(
        self,
        query: torch.Tensor,
        key_buffer: torch.Tensor,
        value_buffer: torch.Tensor,
        scaling: float,
        weight: float,
    ) -> None:
        """As `ProbeScores.add`."""
        if not self._wanted:
            return
        asking = query.index_select(0, self._rows)
        attend_scattered(self._seen, asking, key_buffer, value_buffer, self._slots, scaling, self._unread, self._mass)
        add_probe_scores(
            self._scored,
            asking,
            self._mass,
            key_buffer,
            value_buffer,
            self._wanted_slots,
            scaling,
            weight,
            self._scores,
        )

    def totals(self) -> list[torch.Tensor]:
        """As `ProbeScores.totals`."""
        return list(self._scores.sum(0).split(self._wanted)) if self._wanted else []
