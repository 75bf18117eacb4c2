"""Start-up calibration of the cost model: real passes of the model over a made-up request (``made_up.py``)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from sglang_relay.cost import CALIBRATION_SECONDS, Shape, calibrate, calibration_shapes
from sglang_relay.engine.consensus import digest_of
from sglang_relay.engine.made_up import MadeUp, borrowed, forward_stream, prepared

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_relay.engine.costing import Costs
    from sglang_relay.engine.manager import RelayManager
    from sglang_relay.engine.tools import ForwardTools

logger = logging.getLogger(__name__)

_WARM = (Shape("stock", 16, 0), Shape("relay", 16, 0), Shape("relay", 0, 0, 16))
"""One pass of each kind pays for what later ones find warm."""


class _RelayPassFailed(RuntimeError):
    """On every rank."""


def calibrate_costs(relay: RelayManager, tools: ForwardTools, costs: Costs, chunk: int | None) -> str | None:
    """Give ``costs`` start values of this machine. A failure is logged and leaves the prior; all ranks must call it.

    chunk: most rows of a prefill forward: memory is not reserved for more. Returns why this server cannot relay, the
    same on every rank: a relay pass that fails here would fail in service, each time, and be paid for in vain.
    """
    began, consensus, model, reason = time.perf_counter(), relay.consensus, None, None
    tokens = max(max(s.context + s.rows, 2 * s.placed) for s in calibration_shapes())
    try:
        with (
            borrowed(relay.tree, consensus, tools.runner, requests=1, tokens=tokens) as made,
            forward_stream(tools.runner),
            torch.no_grad(),
        ):
            passes = _Passes(relay, tools, made, chunk)
            for shape in _WARM:
                passes.measure(shape)
            warm: Any = consensus.broadcast(time.perf_counter() - began)
            model = calibrate(passes.measure, CALIBRATION_SECONDS - warm)
    except _RelayPassFailed as error:
        logger.warning("relay: a pass of the calibration failed", exc_info=error)
        reason = "relay_pass_failed"
    except Exception as error:
        logger.warning("relay: the calibration of the cost model failed; it learns from the start", exc_info=error)
    if consensus.agree(model is not None, digest_of(None if model is None else model.state())) and model is not None:
        costs.model = model
        costs.calibration_seconds = round(time.perf_counter() - began, 3)
    return reason


class _Passes:
    """Passes over the one request of ``made``."""

    def __init__(self, relay: RelayManager, tools: ForwardTools, made: MadeUp, chunk: int | None) -> None:
        self._relay = relay
        self._tools = tools
        self._runner = runner = tools.runner
        self._made = made
        self._slots = made.slots[0]
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
            device.synchronize()
        except Exception as caught:
            error = caught
        seconds = time.perf_counter() - began
        if not self._relay.consensus.agree(error is None, 0):
            raise (_RelayPassFailed if shape.path == "relay" else RuntimeError)(f"{shape} failed") from error
        return seconds

    def _prepared(self, shape: Shape) -> Callable[[], object]:
        if shape.placed:
            return lambda: self._copy(shape.placed)
        batch = self._made.batch(shape.context, shape.rows)
        if shape.path == "stock":
            return lambda: self._runner.forward(batch)
        return lambda: self._relayed(batch)

    def _copy(self, count: int) -> None:
        positions = torch.arange(count, device=self._slots.device)
        donors, own = self._slots[:count], self._slots[count : 2 * count]
        self._tools.ops.copier.copy_turned(donors, own, positions, positions + count)

    def _relayed(self, batch: ForwardBatch) -> None:
        """As a served one that has nothing to copy; its host work belongs to its time."""
        prepared(self._tools, batch).run()
