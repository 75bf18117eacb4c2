"""How long a piece of the device's work took, without stopping the host for it."""

from __future__ import annotations

import math
import time
from typing import Any

import torch


class Stopwatch:
    """Started and stopped on the current stream of ``device``: events on an accelerator, the host's clock on a CPU."""

    def __init__(self, device: str | torch.device) -> None:
        self._events: tuple[Any, Any] | None = None
        self._began = self._ended = math.nan
        if torch.device(device).type == "cpu":
            self._began = time.perf_counter()
            return
        event = torch.get_device_module(device).Event
        self._events = event(enable_timing=True), event(enable_timing=True)
        self._events[0].record()

    def stop(self) -> None:
        if self._events is None:
            self._ended = time.perf_counter()
        else:
            self._events[1].record()

    def seconds(self) -> float:
        """NaN while the device has not come so far."""
        if self._events is None:
            return self._ended - self._began
        start, end = self._events
        return start.elapsed_time(end) / 1e3 if end.query() else math.nan
