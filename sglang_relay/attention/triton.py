"""Attention of scattered rows on the Triton kernel `sglang_relay_kernels.scattered_attention`."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from sglang_relay_kernels.scattered_attention import (  # pyright: ignore[reportMissingImports]
    ScatteredPlan,
    ScatteredSequence,
    attend_scattered,
    choose_tiling,
    plan_scattered,
)

from sglang_relay.attention.torch_sdpa import Sequence, seen_keys

if TYPE_CHECKING:
    from sglang_relay.attention.engines import Heads


class TritonStage(NamedTuple):
    """One stage: valid for every layer that runs over the same rows. slots: int64 [keys]. mass: float32 [rows, heads],
    which the kernel writes and nobody reads."""

    planned: ScatteredPlan
    slots: torch.Tensor
    mass: torch.Tensor

    def attend(
        self,
        query: torch.Tensor,
        key_buffer: torch.Tensor,
        value_buffer: torch.Tensor,
        scaling: float,
        out: torch.Tensor,
    ) -> None:
        """As `torch_sdpa.attend`."""
        attend_scattered(self.planned, query, key_buffer, value_buffer, self.slots, scaling, out, self.mass)


class TritonAttention:
    name = "triton"

    def __init__(self, heads: Heads, *, capability: int, multiprocessors: int) -> None:
        """capability: of the device, as 80 for 8.0."""
        self.heads = heads
        self._capability = capability
        self._multiprocessors = multiprocessors

    def plan(self, sequences: list[Sequence], *, dtype: torch.dtype, device: torch.device) -> TritonStage:
        """As `torch_sdpa.plan_attention`. Nothing waits for the device."""
        heads, group = self.heads, self.heads.query // self.heads.kv
        for sequence in sequences:
            seen_keys(sequence)
        rows = [len(s.positions) for s in sequences]
        tiling = choose_tiling(group * max(rows, default=0), heads.dim, heads.v_dim, dtype.itemsize, self._capability)
        planned = plan_scattered(
            [ScatteredSequence(s.positions, np.arange(len(s.slots)) if s.keys is None else s.keys) for s in sequences],
            group=group,
            kv_heads=heads.kv,
            tiling=tiling,
            multiprocessors=self._multiprocessors,
            device=device,
        )
        slots = torch.cat([s.slots for s in sequences]) if sequences else torch.empty(0, dtype=torch.int64)
        mass = torch.empty(sum(rows), heads.query, dtype=torch.float32, device=device)
        return TritonStage(planned, slots, mass)
