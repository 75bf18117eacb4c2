"""The work of `ops.base` in PyTorch: on any device, and the reference of the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from sglang_relay_kernels.realign import realign  # pyright: ignore[reportMissingImports]

from sglang_relay.ops.base import ProbeQueries
from sglang_relay.rotary import DeltaRotary
from sglang_relay.transfer import on_device


class TorchCopier:
    name = "torch"

    def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], rotary: DeltaRotary) -> None:
        """keys, values: the pool's buffers, per layer [slots, kv_heads, dim]."""
        self._buffers = keys, values
        self._rotary = rotary

    def copy_turned(self, donors: torch.Tensor, own: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        """As `Copier.copy_turned`."""
        rotary = self._rotary
        cos, sin = rotary.factors(source, target)
        realign(*self._buffers, donors, own, cos, sin, neox=rotary.neox, rotary_dim=rotary.rotary_dim)


class TorchDeviation:
    name = "torch"

    def distances(
        self, fresh: torch.Tensor, rows: torch.Tensor, cached: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """As `Deviation.distances`."""
        one, other = fresh.index_select(0, rows).float(), cached.index_select(0, slots).float()
        return (1.0 - torch.cosine_similarity(one, other, dim=-1)).sum(-1)


class _Prompt(NamedTuple):
    """rows: int64 [q]. slots: int64 [m]. seen: every query sees as many of the first keys. hidden: bool [q, m - seen],
    which of the others a query must not see. wanted: int64 [n], which of the m keys are scored."""

    rows: torch.Tensor
    slots: torch.Tensor
    seen: int
    hidden: torch.Tensor
    wanted: torch.Tensor


def _planned(prompt: ProbeQueries, device: torch.device) -> _Prompt:
    hidden = prompt.keys[None, :] > prompt.positions[:, None]
    seen = hidden.shape[1] - int(np.count_nonzero(hidden.any(0)))  # keys ascend
    wanted = np.searchsorted(prompt.keys, prompt.wanted)
    rows, hidden, wanted = (on_device(values, device) for values in (prompt.rows, hidden[:, seen:], wanted))
    return _Prompt(rows, prompt.slots, seen, hidden, wanted)


class TorchProbeScores:
    def __init__(self, prompts: list[ProbeQueries], device: torch.device) -> None:
        self._prompts = [_planned(p, device) for p in prompts]
        self._totals = [torch.zeros(len(p.wanted), dtype=torch.float32, device=device) for p in prompts]

    def add(
        self,
        query: torch.Tensor,
        key_buffer: torch.Tensor,
        value_buffer: torch.Tensor,
        scaling: float,
        weight: float,
    ) -> None:
        """As `ProbeScores.add`."""
        for prompt, total in zip(self._prompts, self._totals, strict=True):
            total.add_(_scores(prompt, query, key_buffer, value_buffer, scaling), alpha=weight)

    def totals(self) -> list[torch.Tensor]:
        return self._totals


def _scores(
    prompt: _Prompt, query: torch.Tensor, key_buffer: torch.Tensor, value_buffer: torch.Tensor, scaling: float
) -> torch.Tensor:
    kv_heads, queries = key_buffer.shape[1], len(prompt.rows)
    group = query.shape[1] // kv_heads
    # The heads of a group are rows of one product: as a batch they would each get a copy of the keys.
    q = query.index_select(0, prompt.rows).unflatten(1, (kv_heads, group)).permute(1, 2, 0, 3).flatten(1, 2)
    key = key_buffer.index_select(0, prompt.slots).to(q.dtype).permute(1, 2, 0)
    logits = torch.bmm(q, key).float().mul_(scaling).unflatten(1, (group, queries))  # [kv_heads, group, q, m]
    logits[..., prompt.seen :].masked_fill_(prompt.hidden, float("-inf"))
    mass = torch.softmax(logits, -1).sum((1, 2)).index_select(-1, prompt.wanted)  # [kv_heads, n]
    value = value_buffer.index_select(0, prompt.slots.index_select(0, prompt.wanted))
    return (mass * value.float().norm(dim=-1).T).sum(0)


class TorchProbe:
    name = "torch"

    def plan(self, prompts: list[ProbeQueries], *, dtype: torch.dtype, device: torch.device) -> TorchProbeScores:
        """As `ProbeScorer.plan`."""
        return TorchProbeScores(prompts, device)
