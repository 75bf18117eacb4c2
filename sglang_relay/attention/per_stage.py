"""FlashInfer where rows go together, the Triton kernel where they are scattered, by each stage's estimated cost.

For scattered rows a FlashInfer kernel reads a bit per score, and all keys of a sequence for each of its tiles
(`run_plan`). The Triton kernel compares positions and leaves out what lies above the diagonal, but computes a causal
run more slowly.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import TYPE_CHECKING

import numpy as np
import torch

from sglang_relay.attention.run_plan import plan_runs, tiles_cost
from sglang_relay.attention.torch_sdpa import Sequence, seen_keys

if TYPE_CHECKING:
    from sglang_relay.attention.engines import StageAttention
    from sglang_relay.attention.flashinfer import FlashInferAttention
    from sglang_relay.attention.triton import TritonAttention

SCATTERED = 1.3
"""What a row and key cost in the Triton kernel, of what they cost in a causal FlashInfer kernel. An estimate, not timed
on a GPU yet; `run_plan.MASKED` is its counterpart."""


class PerStageAttention:
    name = "flashinfer and triton"

    def __init__(self, flashinfer: FlashInferAttention, triton: TritonAttention) -> None:
        """Both for the same heads."""
        self.flashinfer = flashinfer
        self.triton = triton

    def plan(self, sequences: list[Sequence], *, dtype: torch.dtype, device: torch.device) -> StageAttention:
        """As `torch_sdpa.plan_attention`; what either raises."""
        group = self.flashinfer.heads.query // self.flashinfer.heads.kv
        runs = plan_runs(sequences, group=group)
        if scattered_cost([seen_keys(s) for s in sequences], group) < runs.costs[runs.form]:
            return self.triton.plan(sequences, dtype=dtype, device=device)
        return self.flashinfer.stage(sequences, runs, dtype=dtype, device=device)


def scattered_cost(seen: Items[np.ndarray], group: int) -> float:
    """Of the Triton kernel, in the unit of `RunPlan.costs`: each tile of a request's rows reads the keys up to those
    that its last row sees. seen: as of `seen_keys`."""
    return SCATTERED * sum(tiles_cost(rows, group) for rows in seen)
