"""Attention of scattered rows on FlashInfer's paged prefill (0.7.2): pages of one token, NHD, FA2 kernels.

What is decided on the host is `run_plan.py`. The FA2 kernels are those that SGLang itself takes for prefill over
token slots, and the only ones with a mask of bits.

Nothing waits for the device. ``plan`` of the wrapper copies indptr and last-page lengths to the host, so they are made
there; slots stay where they are. It plans into page-locked memory of the wrapper, which the device reads later: each of
`WRAPPERS` takes its turn, and is planned again once its last copy is over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from sglang_relay.attention.run_plan import RunPlan, plan_runs
from sglang_relay.attention.torch_sdpa import Sequence

if TYPE_CHECKING:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    from sglang_relay.attention.engines import Heads

WORKSPACE = 128 << 20
"""Bytes, as FlashInfer recommends; partial results of split keys."""
WRAPPERS = 3
"""Most stages of a forward that are planned with no wait of the host between them; 8 MiB each, here and there."""


class FlashInferAttention:
    """One per process and device; its stages run on one stream, one after another."""

    name = "flashinfer"

    def __init__(self, heads: Heads, *, dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device) -> None:
        """dtype, kv_dtype: of queries and of the pool. Raises ImportError without FlashInfer, ValueError for what its
        kernels do not take."""
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"FlashInfer attends in bfloat16 or float16, not in {dtype}")
        self.heads = heads
        self.dtype = dtype
        self.kv_dtype = kv_dtype
        self.device = device
        workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
        self._wrappers = [
            _Wrapper(BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="fa2")) for _ in range(WRAPPERS)
        ]

    def plan(self, sequences: list[Sequence], *, dtype: torch.dtype, device: torch.device) -> FlashInferStage:
        """As `torch_sdpa.plan_attention`. Raises ValueError for another dtype than the one it was made for."""
        runs = plan_runs(sequences, group=self.heads.query // self.heads.kv)
        return self.stage(sequences, runs, dtype=dtype, device=device)

    def stage(
        self, sequences: list[Sequence], runs: RunPlan, *, dtype: torch.dtype, device: torch.device
    ) -> FlashInferStage:
        """runs: of ``sequences``."""
        if dtype != self.dtype:
            raise ValueError(f"planned for queries in {self.dtype}, not in {dtype}")
        slots = [s.slots.to(torch.int32) for s in sequences]
        keys = np.diff(runs.kv_indptr).tolist()
        parts = [slots[owner][:count] for owner, count in zip(runs.owner.tolist(), keys, strict=True)]
        indices = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32, device=device)
        return FlashInferStage(self, runs, indices)

    def take(self, stage: FlashInferStage, scaling: float) -> _Wrapper:
        """A wrapper that is planned for ``stage``."""
        wrapper = self._wrappers.pop(0)
        self._wrappers.append(wrapper)
        wrapper.load(stage, scaling)
        return wrapper


class FlashInferStage:
    """One stage: valid for every layer that runs over the same rows. indices: int32 [keys], slot of each key of each
    sequence."""

    def __init__(self, engine: FlashInferAttention, runs: RunPlan, indices: torch.Tensor) -> None:
        self.engine = engine
        self.runs = runs
        self.indices = indices
        self._wrapper: _Wrapper | None = None

    def attend(
        self,
        query: torch.Tensor,
        key_buffer: torch.Tensor,
        value_buffer: torch.Tensor,
        scaling: float,
        out: torch.Tensor,
    ) -> None:
        """As `torch_sdpa.attend`. The wrapper is planned in the first layer, for a stage may end before it attends."""
        if not len(self.runs.owner):
            return
        if self._wrapper is None or not self._wrapper.holds(self, scaling):
            self._wrapper = self.engine.take(self, scaling)
        self._wrapper.run(query, key_buffer, value_buffer, out)


class _Wrapper:
    def __init__(self, wrapper: BatchPrefillWithPagedKVCacheWrapper) -> None:
        self._wrapper = wrapper
        self._loaded: tuple[FlashInferStage, float] | None = None
        self._copied: torch.cuda.Event | None = None

    def holds(self, stage: FlashInferStage, scaling: float) -> bool:
        return self._loaded == (stage, scaling)

    def load(self, stage: FlashInferStage, scaling: float) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        engine, runs = stage.engine, stage.runs
        self._loaded = None
        self._wrapper.plan(
            _host(runs.qo_indptr, engine.device),
            _host(runs.kv_indptr, engine.device),
            stage.indices,
            _host(np.ones(len(runs.owner), np.int32), engine.device),
            engine.heads.query,
            engine.heads.kv,
            engine.heads.dim,
            1,
            head_dim_vo=engine.heads.v_dim,
            packed_custom_mask=None if runs.mask is None else _host(runs.mask, engine.device),
            causal=runs.mask is None,
            sm_scale=scaling,
            q_data_type=engine.dtype,
            kv_data_type=engine.kv_dtype,
            o_data_type=engine.dtype,
            non_blocking=True,
        )
        if runs.mask is not None:
            # The kernels count bytes here. With a packed mask, 0.7.2 leaves the number of unpacked entries
            # (FlashInfer's pull request 2201): every sequence but the first would read bits of others.
            if not torch.is_tensor(self._wrapper._mask_indptr_buf):
                raise RuntimeError("this FlashInfer keeps its mask indptr elsewhere")
            offsets = _host(runs.mask_indptr, engine.device)
            self._wrapper._mask_indptr_buf = offsets.to(engine.device, non_blocking=True)
        if engine.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()
        self._loaded = stage, scaling

    def run(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
        self._wrapper.run(query, (keys.unsqueeze(1), values.unsqueeze(1)), out=out)


def _host(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """On the host, page-locked where a device copies from it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory() if device.type == "cuda" else tensor
