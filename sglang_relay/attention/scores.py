"""What a prompt's probe queries look at, per key (design: policy-study.md, "The probe policy", step 2)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


class ProbeRows(NamedTuple):
    """The probe queries of one request.

    rows: int64 [q], rows of the stage. slots: int64 [m], the KV slots of the keys that they may see. hidden: bool
    [q, m], keys that a query must not see. wanted: int64 [n], which of the m keys are scored.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    hidden: torch.Tensor
    wanted: torch.Tensor


def plan_probe(
    rows: np.ndarray, positions: np.ndarray, keys: np.ndarray, slots: torch.Tensor, wanted: np.ndarray
) -> ProbeRows:
    """positions: int64 [q], of the queries; keys: int64 [m], ascending positions of the keys; wanted: positions [n]."""
    device = slots.device
    hidden = torch.from_numpy(keys[None, :] > positions[:, None])
    index = torch.from_numpy(np.searchsorted(keys, wanted))
    return ProbeRows(torch.from_numpy(rows).to(device), slots, hidden.to(device), index.to(device))


def probe_scores(
    probe: ProbeRows, query: torch.Tensor, key_buffer: torch.Tensor, value_buffer: torch.Tensor, scaling: float
) -> torch.Tensor:
    """float32 [n]: attention mass that the probe queries put on each wanted key, times the norm of its value, summed
    over queries and heads.

    query: [rows, heads, head_dim], all rows of the stage; key_buffer, value_buffer: [slots, kv_heads, dim].
    """
    kv_heads = key_buffer.shape[1]
    q = query.index_select(0, probe.rows).unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    key = key_buffer.index_select(0, probe.slots).to(q.dtype).permute(1, 2, 0)
    logits = torch.matmul(q, key[:, None]).float() * scaling  # [kv_heads, group, q, m]
    logits.masked_fill_(probe.hidden, float("-inf"))
    mass = torch.softmax(logits, -1).index_select(-1, probe.wanted).sum((1, 2))  # [kv_heads, n]
    value = value_buffer.index_select(0, probe.slots.index_select(0, probe.wanted))
    return (mass * value.float().norm(dim=-1).T).sum(0)
