"""Which implementation does what: chosen once, at start-up, and compared with PyTorch before it serves."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from sglang_relay.attention import Heads, choose_carrier
from sglang_relay.ops.base import Copier, Deviation, Ops, ProbeQueries, ProbeScorer
from sglang_relay.ops.torch_ops import TorchCopier, TorchDeviation, TorchProbe
from sglang_relay.rotary import DeltaRotary

logger = logging.getLogger(__name__)

SLOTS = 4096
"""Of the scratch pools that implementations are compared on; enough that the keys of a prompt are split."""
ACCURACY = 1e-2
"""Largest difference of a score from PyTorch's in float32, as a share of the largest score."""

Work = TypeVar("Work", Copier, Deviation, ProbeScorer)


class Pool(NamedTuple):
    """keys, values: the buffers of a KV pool, per layer [slots, kv_heads, dim]."""

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]

    def scratch(self, layers: int) -> Pool:
        """A pool of a few slots with rows as in this one, filled at random, the same each time."""
        generator = torch.Generator().manual_seed(0)

        def kind(buffer: torch.Tensor) -> list[torch.Tensor]:
            shape = SLOTS, *buffer.shape[1:]
            return [torch.randn(shape, generator=generator).to(buffer.device, buffer.dtype) for _ in range(layers)]

        return Pool(kind(self.keys[0]), kind(self.values[0]))


def choose_ops(pool: Pool, rotary: DeltaRotary, heads: set[Heads], *, dtype: torch.dtype, queries: int) -> Ops:
    """On a CUDA device each of the project's Triton kernels that works there, PyTorch in the place of one that does
    not, and on any other device.

    heads: those of the model's layers. dtype: of queries and fresh values. queries: most probe queries of a prompt.
    """
    device = pool.keys[0].device
    if device.type != "cuda":
        chosen = Ops(TorchCopier(*pool, rotary), TorchDeviation(), TorchProbe(), choose_carrier(pool, rotary))
    else:
        properties = torch.cuda.get_device_properties(device)
        chosen = working_kernels(
            pool,
            rotary,
            heads,
            dtype=dtype,
            queries=queries,
            capability=10 * properties.major + properties.minor,
            multiprocessors=properties.multi_processor_count,
        )
    logger.info("relay: %s", ", ".join(f"{work} in {name}" for work, name in chosen.names().items()))
    return chosen


def working_kernels(
    pool: Pool,
    rotary: DeltaRotary,
    heads: set[Heads],
    *,
    dtype: torch.dtype,
    queries: int,
    capability: int,
    multiprocessors: int,
) -> Ops:
    """The Triton kernels, built and compared with PyTorch; PyTorch for those that cannot be built, or differ.

    capability, multiprocessors: of the device, the former as 80 for 8.0.
    """

    def copier() -> Copier:
        from sglang_relay.ops.triton_ops import TritonCopier

        check_copier(lambda scratch: TritonCopier(*scratch, rotary), pool, rotary)
        return TritonCopier(*pool, rotary)

    def deviation() -> Deviation:
        from sglang_relay.ops.triton_ops import TritonDeviation

        check_deviation(made := TritonDeviation(), pool, dtype)
        return made

    def probe() -> ProbeScorer:
        from sglang_relay.ops.triton_ops import TritonProbe

        if len(heads) != 1:
            raise ValueError(f"layers differ in their heads: {sorted(heads)}")
        (alike,) = heads
        made = TritonProbe(alike, capability=capability, multiprocessors=multiprocessors)
        check_probe(made, alike, pool, dtype, queries)
        return made

    return Ops(
        _or("copy", copier, lambda: TorchCopier(*pool, rotary)),
        _or("deviation", deviation, TorchDeviation),
        _or("probe", probe, TorchProbe),
        choose_carrier(pool, rotary),
    )


def _or(work: str, kernel: Callable[[], Work], plain: Callable[[], Work]) -> Work:
    try:
        return kernel()
    except Exception as error:
        logger.warning("relay: the Triton kernel of %s does not work here, PyTorch does it: %s", work, error)
        return plain()


def check_copier(make: Callable[[Pool], Copier], pool: Pool, rotary: DeltaRotary) -> None:
    """Compare the copier that ``make`` makes for a scratch pool with PyTorch. Raises RuntimeError where a bit of V
    differs, or of K more than rounding, and whatever building raises."""
    found, want = pool.scratch(2), pool.scratch(2)
    device, generator = found.keys[0].device, torch.Generator().manual_seed(1)
    slots = torch.randperm(SLOTS, generator=generator).to(device)
    donors, own = slots[: SLOTS // 2 - 3], slots[SLOTS // 2 :][: SLOTS // 2 - 3]
    source, target = torch.randint(rotary.positions, (2, len(own)), generator=generator).to(device)
    target[::5] = source[::5]
    for scratch, made in ((found, make(found)), (want, TorchCopier(*want, rotary))):
        for buffer in (*scratch.keys, *scratch.values):
            buffer[own] = torch.nan
        made.copy_turned(donors, own, source, target)
    rounding = 8 * torch.finfo(found.keys[0].dtype).eps
    for kind, tolerance in (("keys", rounding), ("values", 0.0)):
        for one, other in zip(getattr(found, kind), getattr(want, kind), strict=True):
            error, size = (one.float() - other.float()).abs(), other.float().abs()
            if not bool((error <= tolerance * (1.0 + size)).all()):
                raise RuntimeError(f"copied {kind} differ from PyTorch's by {float(error.max())}")


def check_deviation(made: Deviation, pool: Pool, dtype: torch.dtype) -> None:
    """Compare with PyTorch. Raises RuntimeError where a distance differs, and whatever building raises."""
    cached = pool.scratch(1).values[0]
    generator = torch.Generator().manual_seed(1)
    fresh = torch.randn(300, *cached.shape[1:], generator=generator).to(cached.device, dtype)
    rows = torch.randperm(300, generator=generator)[:211].to(cached.device)
    slots = torch.randperm(SLOTS, generator=generator)[:211].to(cached.device)
    fresh[rows[:50]] = cached[slots[:50]].to(dtype)
    found, want = (each.distances(fresh, rows, cached, slots) for each in (made, TorchDeviation()))
    error = float((found - want).abs().max())
    if not error <= 1e-5 * cached.shape[1]:
        raise RuntimeError(f"value deviations differ from PyTorch's by {error}")


def check_probe(made: ProbeScorer, heads: Heads, pool: Pool, dtype: torch.dtype, queries: int) -> None:
    """Compare with PyTorch in float32, at both ends of a prompt's number of queries. Raises RuntimeError where a score
    differs, and whatever building raises."""
    scratch = pool.scratch(1)
    keys, values, device = scratch.keys[0], scratch.values[0], scratch.keys[0].device
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2 * queries + 3, heads.query, heads.dim, generator=generator).to(device, dtype)
    order = torch.randperm(SLOTS, generator=generator).to(device)
    scaling = heads.dim**-0.5
    for asked in {1, queries}:
        prompts = [_prompt(asked, order[: SLOTS // 2], 2), _prompt(1, order[SLOTS // 2 :], asked + 2)]
        totals = []
        for each, exact in ((made, False), (TorchProbe(), True)):
            q, k, v = (t.float() if exact else t for t in (query, keys, values))
            planned = each.plan(prompts, dtype=q.dtype, device=device)
            for weight in (0.5, 1.0):
                planned.add(q, k, v, scaling, weight)
            totals.append(torch.cat(planned.totals()))
        found, want = totals
        error = float((found - want).abs().max() / want.max())
        if not error <= ACCURACY:
            raise RuntimeError(f"probe scores differ from PyTorch's by {error} of the largest")


def _prompt(queries: int, slots: torch.Tensor, row: int) -> ProbeQueries:
    """A prompt whose last ``queries`` tokens ask about two segments, with a gap behind the second whose keys are
    missing."""
    positions = np.arange(len(slots) + 20)
    keys = np.delete(positions, np.arange(len(slots) - queries, len(slots) - queries + 20))
    wanted = np.concatenate((np.arange(7, 150), np.arange(200, len(slots) - queries - 9)))
    return ProbeQueries(np.arange(row, row + queries), positions[-queries:], keys, slots, wanted)
