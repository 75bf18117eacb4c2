"""An SGLang plugin that breaks the cost model (test_cost_engine.py). Runs inside the server's processes; must not
import from the tests. The file ``fault`` in the folder that RELAY_TEST_COST names says what is broken: a name from
``load``, on all ranks, or ``name@rank``. With ``synthetic`` the model's times are made up; with ``clock``
those of rank 0 are, and the other ranks take what their own clocks say, which all but stand still. What a rank
publishes is then written to ``published.<rank>``, a line each time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FOLDER = Path(os.environ["RELAY_TEST_COST"])


class Injected(RuntimeError):
    """What a broken step raises."""


def load() -> None:
    from sglang_relay.cost import CostModel
    from sglang_relay.engine import calibration, forward

    _wrap(calibration, "calibrate", {"calibrate": _raise})
    _wrap(calibration._Passes, "_time", {"synthetic": _calibration_time})
    _wrap(CostModel, "observe", {"observe": _raise, "synthetic": _observe_other_time, "clock": _observe_by_clock})
    _wrap(CostModel, "publish", {"publish": _raise})
    _wrap(CostModel, "load", {"load": _raise, "synthetic": _recorded, "clock": _recorded})
    _wrap(forward.StagedForward, "run", {"run": _raise})
    for name in ("time", "monotonic", "perf_counter"):
        _wrap(time, name, {"clock": _skewed if name == "perf_counter" else _ahead})


def _wrap(owner: Any, name: str, faults: dict[str, Callable[..., Any]]) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        fault = faults.get(_in_force())
        return original(*args, **kwargs) if fault is None else fault(original, *args, **kwargs)

    setattr(owner, name, wrapped)


def _in_force() -> str:
    name, _, rank = (_FOLDER / "fault").read_text(encoding="utf-8").partition("@")
    return name if rank in ("", str(_rank())) else ""


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _raise(*args: Any, **kwargs: Any) -> Any:
    raise Injected("broken by a test")


def _recorded(original: Callable[..., Any], model: Any, state: Any) -> None:
    original(model, state)
    with (_FOLDER / f"published.{_rank()}").open("a", encoding="utf-8") as file:
        file.write(f"{tuple(model.state())}\n")


def _calibration_time(original: Callable[..., float], passes: Any, shape: Any) -> float:
    """The pass runs; its time is the prior's, and on the second rank seven times as much on the relay path."""
    original(passes, shape)
    return _synthetic(shape.features())


def _observe_other_time(original: Callable[..., bool], model: Any, features: Any, seconds: float) -> bool:
    """Twice the time of the calibration."""
    return original(model, features, 2 * _synthetic(features))


def _observe_by_clock(original: Callable[..., bool], model: Any, features: Any, seconds: float) -> bool:
    return original(model, features, seconds if _rank() else _synthetic(features))


def _skewed(clock: Callable[[], float]) -> float:
    """What forwards are timed by."""
    return clock() / (1e6 if _rank() else 1)


def _ahead(clock: Callable[[], float]) -> float:
    return clock() + (3600 if _rank() else 0)


def _synthetic(features: Any) -> float:
    from sglang_relay.cost import PRIOR, CostModel

    return CostModel(PRIOR).predict(features) * (7 if _rank() and features.path == "relay" else 1)
