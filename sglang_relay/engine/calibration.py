"""Start-up calibration of the cost model: real passes of the model, on slots borrowed from the KV pool.

SGLang builds the tree last of what a forward needs: pools, attention backends and graphs are there, and no request is.
A pass is a batch of one made-up request whose context is whatever the borrowed slots hold.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.managers.schedule_batch import ScheduleBatch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

from sglang_relay.cost import CALIBRATION_SECONDS, Shape, calibrate, calibration_shapes
from sglang_relay.engine.consensus import digest_of
from sglang_relay.engine.forward import StagedForward
from sglang_relay.engine.manager import BatchPlan, RelayManager
from sglang_relay.plan import Decline
from sglang_relay.policies.rotate import Rotate

if TYPE_CHECKING:
    from sglang_relay.engine.costing import Costs
    from sglang_relay.engine.tools import ForwardTools

logger = logging.getLogger(__name__)

_WARM = (Shape("stock", 16, 0), Shape("relay", 16, 0), Shape("relay", 0, 0, 16))
"""One pass of each kind pays for what later ones find warm."""


def calibrate_costs(relay: RelayManager, tools: ForwardTools, costs: Costs, chunk: int | None) -> None:
    """Give ``costs`` start values of this machine. A failure is logged and leaves the prior; all ranks must call it.

    chunk: most rows of a prefill forward: memory is not reserved for more.
    """
    began, consensus, model = time.perf_counter(), relay.consensus, None
    try:
        with _borrowed(relay, tools.runner) as (row, slots), _forward_stream(tools.runner), torch.no_grad():
            passes = _Passes(relay, tools, row, slots, chunk)
            for shape in _WARM:
                passes.measure(shape)
            warm: Any = consensus.broadcast(time.perf_counter() - began)
            model = calibrate(passes.measure, CALIBRATION_SECONDS - warm)
    except Exception as error:
        logger.warning("relay: the calibration of the cost model failed; it learns from the start", exc_info=error)
    if consensus.agree(model is not None, digest_of(None if model is None else model.state())) and model is not None:
        costs.model = model
        costs.calibration_seconds = round(time.perf_counter() - began, 3)


@contextmanager
def _borrowed(relay: RelayManager, runner: Any) -> Iterator[tuple[int, torch.Tensor]]:
    """A row of the request pool and slots for the largest shape, or for as much as there is."""
    allocator, rows = relay.tree.token_to_kv_pool_allocator, runner.req_to_token_pool
    page = allocator.page_size
    want = max(max(s.context + s.rows, 2 * s.placed) for s in calibration_shapes())
    count, taken, slots, error = 0, None, None, None
    try:
        try:
            count = min(-(-want // page) * page, allocator.available_size(), rows.max_context_len) // page * page
            taken = rows.alloc_rows(1)
            slots = allocator.alloc(count) if taken else None
            if taken and slots is not None:
                rows.write((taken[0], slice(0, count)), slots.to(torch.int32))
        except Exception as caught:
            error = caught
        if not relay.consensus.agree(error is None and slots is not None, count) or not taken or slots is None:
            raise RuntimeError(f"no row of the request pool, or no {count} KV slots") from error
        yield taken[0], slots.long()
    finally:
        if slots is not None:
            allocator.free(slots)
        if taken:
            rows.free_rows(taken)


@contextmanager
def _forward_stream(runner: Any) -> Iterator[None]:
    """The stream on which the scheduler runs forwards when it overlaps, so that memory of these passes is found again
    there. What was launched before is done by then, and all of this when it is left."""
    if torch.device(runner.device).type == "cpu":
        yield
        return
    device = torch.get_device_module(runner.device)
    runner.forward_stream.wait_stream(device.current_stream())
    try:
        with device.stream(runner.forward_stream):
            yield
    finally:
        device.synchronize()


class _Passes:
    """Passes over one borrowed row (of the request pool) and its slots, int64 [n]."""

    def __init__(
        self, relay: RelayManager, tools: ForwardTools, row: int, slots: torch.Tensor, chunk: int | None
    ) -> None:
        self._relay = relay
        self._tools = tools
        self._runner = runner = tools.runner
        self._row = row
        self._slots = slots
        self._rows = chunk or math.inf
        self._positions = min(runner.model_config.context_len, tools.rotary.positions)
        self._compiles = torch.device(runner.device).type != "cpu"
        self._seen: set[Shape] = set()

    def measure(self, shape: Shape) -> float:
        """Seconds on rank 0, on every rank; NaN where the shape does not fit. A collective."""
        need = max(shape.context + shape.rows, 2 * shape.placed)
        if need > min(len(self._slots), self._positions) or shape.rows > self._rows:
            return math.nan
        if self._compiles and shape not in self._seen:
            self._time(shape)
        self._seen.add(shape)
        seconds: Any = self._relay.consensus.broadcast(self._time(shape))
        return seconds

    def _time(self, shape: Shape) -> float:
        run, error = None, None
        try:
            run = self._prepared(shape)
        except Exception as caught:
            error = caught
        if not self._relay.consensus.agree(error is None, 0):
            raise RuntimeError(f"{shape} cannot be prepared") from error
        assert run is not None
        device = torch.get_device_module(self._runner.device)
        device.synchronize()
        began = time.perf_counter()
        try:
            run()
        except Decline:  # on all ranks; whoever failed has logged it
            return math.nan
        device.synchronize()
        return time.perf_counter() - began

    def _prepared(self, shape: Shape) -> Callable[[], object]:
        if shape.placed:
            return lambda: self._copy(shape.placed)
        batch = self._batch(shape.context, shape.rows)
        if shape.path == "stock":
            return lambda: self._runner.forward(batch)
        return lambda: self._relayed(batch)

    def _copy(self, count: int) -> None:
        positions = torch.arange(count, device=self._slots.device)
        donors, own = self._slots[:count], self._slots[count : 2 * count]
        self._tools.ops.copier.copy_turned(donors, own, positions, positions + count)

    def _relayed(self, batch: ForwardBatch) -> None:
        """As a served one that has nothing to copy; its host work belongs to its time."""
        planned = BatchPlan(Rotate(self._runner.model_config.num_hidden_layers), [], [], [])
        staged = StagedForward(self._tools, batch, planned)
        failure = None
        try:
            staged.prepare()
        except Exception as error:
            failure = self._relay.failure("prepare", error)
        if not self._relay.consensus.agree(failure is None, 0):
            raise Decline(failure or "ranks_disagree", "calibration")
        staged.run()

    def _batch(self, context: int, rows: int) -> ForwardBatch:
        """Tokens ``[context, context + rows)`` of the made-up request, through SGLang's own way to a ForwardBatch."""
        runner, device, stop = self._runner, self._slots.device, context + rows
        batch = ScheduleBatch.init_new(
            [],
            runner.req_to_token_pool,
            self._relay.tree.token_to_kv_pool_allocator,
            self._relay.tree,
            runner.model_config,
            False,
            runner.spec_algorithm,
        )
        batch.forward_mode = ForwardMode.EXTEND
        batch.input_ids = torch.arange(rows, device=device) % runner.model_config.vocab_size
        batch.req_pool_indices = torch.tensor([self._row], device=device)
        batch.req_pool_indices_cpu = torch.tensor([self._row])
        batch.seq_lens, batch.seq_lens_cpu = torch.tensor([stop], device=device), torch.tensor([stop])
        batch.orig_seq_lens = batch.seq_lens.to(torch.int32)
        batch.seq_lens_sum = stop
        batch.out_cache_loc = self._slots[context:stop]
        batch.prefix_lens, batch.extend_lens, batch.extend_num_tokens = [context], [rows], rows
        batch.extend_logprob_start_lens = [rows]
        return ForwardBatch.init_new(batch, runner, return_hidden_states_before_norm=False)
