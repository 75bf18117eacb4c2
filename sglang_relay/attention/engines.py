"""Which implementation attends: chosen once, at start-up, and compared with PyTorch before it serves."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from sglang_relay.attention.torch_sdpa import AttentionPlan, Sequence, attend, plan_attention
from sglang_relay.config import ConfigError

logger = logging.getLogger(__name__)

ERROR = {torch.bfloat16: 4e-2, torch.float16: 8e-3, torch.float32: 4e-3}
"""Largest difference of outputs of size 1 between two implementations; float32 is multiplied in TF32 by some."""


class Heads(NamedTuple):
    """Of one rank: query and KV heads, dimensions of K and V."""

    query: int
    kv: int
    dim: int
    v_dim: int


class StageAttention(Protocol):
    """Attention of one stage: valid for every layer that runs over the same rows."""

    def attend(
        self,
        query: torch.Tensor,
        key_buffer: torch.Tensor,
        value_buffer: torch.Tensor,
        scaling: float,
        out: torch.Tensor,
    ) -> None:
        """As `torch_sdpa.attend`: all rows of the stage in one layer, written to ``out``. Does not wait for the
        device."""
        ...


class AttentionEngine(Protocol):
    """One implementation: host work once per stage (plan), device work per layer (`StageAttention`)."""

    name: str

    def plan(self, sequences: list[Sequence], *, dtype: torch.dtype, device: torch.device) -> StageAttention:
        """As `torch_sdpa.plan_attention`. Raises where the stage cannot be served; the batch then runs stock."""
        ...


class _TorchStage(NamedTuple):
    planned: AttentionPlan

    def attend(
        self,
        query: torch.Tensor,
        key_buffer: torch.Tensor,
        value_buffer: torch.Tensor,
        scaling: float,
        out: torch.Tensor,
    ) -> None:
        attend(self.planned, query, key_buffer, value_buffer, scaling, out)


class TorchAttention:
    name = "torch"

    def plan(self, sequences: list[Sequence], *, dtype: torch.dtype, device: torch.device) -> _TorchStage:
        return _TorchStage(plan_attention(sequences, dtype=dtype, device=device))


def choose_engine(
    wanted: str, heads: set[Heads], *, dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device
) -> AttentionEngine:
    """The implementation ``wanted``. Under ``auto`` FlashInfer and Triton, whichever is cheaper for a stage, where both
    work here, the one that does where it is one, else PyTorch; on a device that is no CUDA device always PyTorch.

    heads: those of the model's layers. dtype, kv_dtype: of queries and of the pool.

    Raises ConfigError when the one that is named does not work here.
    """
    if wanted == "torch" or (wanted == "auto" and device.type != "cuda"):
        return TorchAttention()
    working: list[Any] = []
    for name in ("flashinfer", "triton") if wanted == "auto" else (wanted,):
        try:
            engine = _build(name, heads, dtype, kv_dtype, device)
            check_engine(engine, next(iter(heads)), dtype=dtype, kv_dtype=kv_dtype, device=device)
            working.append(engine)
        except Exception as error:
            if wanted != "auto":
                raise ConfigError(f"attention={wanted}: does not work here: {error}") from error
            logger.warning("relay: %s attention does not work here: %s", name, error)
    if len(working) == 2:
        from sglang_relay.attention.per_stage import PerStageAttention

        return PerStageAttention(*working)
    return working[0] if working else TorchAttention()


def _build(
    name: str, heads: set[Heads], dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device
) -> AttentionEngine:
    if device.type != "cuda":
        raise ValueError(f"needs a CUDA device, not {device.type}")
    if len(heads) != 1:
        raise ValueError(f"layers differ in their heads: {sorted(heads)}")
    (alike,) = heads
    if name == "flashinfer":
        from sglang_relay.attention.flashinfer import FlashInferAttention

        return FlashInferAttention(alike, dtype=dtype, kv_dtype=kv_dtype, device=device)
    from sglang_relay.attention.triton import TritonAttention

    properties = torch.cuda.get_device_properties(device)
    return TritonAttention(
        alike,
        capability=10 * properties.major + properties.minor,
        multiprocessors=properties.multi_processor_count,
    )


def check_engine(
    engine: AttentionEngine, heads: Heads, *, dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device
) -> None:
    """Build what ``engine`` compiles, and compare it with PyTorch on stages of several requests: prompts from their
    start, scattered rows, one row, rows behind keys that are not there.

    Raises RuntimeError where an output differs, and whatever building raises.
    """
    slots, scaling = 4096, heads.dim**-0.5
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    keys, values = (normal(slots, heads.kv, d, dtype=kv_dtype) for d in (heads.dim, heads.v_dim))
    order = torch.randperm(slots, generator=generator).to(device)
    for stage in _stages():
        firsts = np.cumsum([0, *(len(k) for _, k in stage)])
        sequences = [Sequence(p, order[a : a + len(k)], k) for (p, k), a in zip(stage, firsts, strict=False)]
        rows = sum(len(p) for p, _ in stage)
        query = normal(rows, heads.query, heads.dim, dtype=dtype)
        found, want = (
            torch.full((rows, heads.query, heads.v_dim), torch.nan, dtype=dtype, device=device) for _ in "ab"
        )
        for made, out in ((engine, found), (TorchAttention(), want)):
            made.plan(sequences, dtype=dtype, device=device).attend(query, keys, values, scaling, out)
        error = float((found.float() - want.float()).abs().max())
        if not error <= ERROR.get(dtype, 0.0):
            raise RuntimeError(f"{engine.name} attention differs from PyTorch's by {error}")


def _stages() -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """Per stage and request, positions of rows and of keys; of every size of tile, causal and masked."""
    everything, holes = np.arange(1200), np.delete(np.arange(700), np.arange(100, 150))
    return [
        [(np.arange(300), np.arange(300)), (np.arange(690, 700), holes)],
        [
            (np.arange(3, 1200, 7), everything),
            (np.append(np.arange(0, 90, 3), 699), holes),
            (everything[-1:], everything),
        ],
        [(np.arange(400, 430, 2), everything[:429])],
        [(everything[-1:], everything)],
    ]
