"""Sums over the tensor-parallel ranks of what they measured: float32, each over its own heads.

The model's own reductions are in its dtype. SGLang builds a kernel for the first all-reduce of each dtype, on a host
that may fail to: ``build_sums`` does it at start-up, so that it never happens in the middle of a pass, where the other
ranks would wait on their devices for the one that failed.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.runtime_context import get_parallel

from sglang_relay.engine.consensus import Consensus

_SIZES = (4, 5)
"""Kernels of SGLang's own take multiples of 16 bytes; the rest goes another way."""


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """float32 [n], the same on all ranks. A collective; ``values`` may be overwritten."""
    group = get_parallel().tp_group
    return values if group.world_size == 1 else group.all_reduce(values)


def build_sums(consensus: Consensus, device: str) -> Exception | None:
    """Do once what the first sums need. Returns on every rank why not all of them can sum, or None; every rank must
    call it."""
    group = get_parallel().tp_group
    if group.world_size == 1:
        return None
    failure: Exception | None = None
    values: list[torch.Tensor] = []
    try:
        values = [torch.zeros(size, dtype=torch.float32, device=device) for size in _SIZES]
        for value in values:
            _build(group, value)
    except Exception as error:
        failure = error
    if not consensus.agree(failure is None, 0):
        return failure or RuntimeError("another rank failed")
    for value in values:
        sum_over_ranks(value)
    torch.get_device_module(device).synchronize()
    return None


def _build(group: Any, value: torch.Tensor) -> None:
    """The kernel that would sum ``value``, without running it: a rank that fails here has left nobody waiting
    (distributed/device_communicators/custom_all_reduce_v2.py, ``should_custom_ar``)."""
    if group.ca_comm is not None and not group.ca_comm.disabled:
        group.ca_comm.should_custom_ar(value)
