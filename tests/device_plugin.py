"""An SGLang plugin that lets a server on a CPU do what one on a GPU does: the Triton kernels, interpreted, copy,
measure, score, interpolate and attend. Beside that it writes down, per relay forward, where the host would wait for the
device (sync_counter.py), and lets the kernel fail that the file of RELAY_TEST_FAULT names. Runs inside the server's
processes; must not import from the tests."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

_LOG = Path(os.environ["RELAY_TEST_FORWARDS"])
_FAULT = Path(os.environ["RELAY_TEST_FAULT"])
_OPEN = ExitStack()


def load() -> None:
    from sglang_relay.engine import backend, forward
    from sglang_relay.ops import choice, triton_ops

    choice.SLOTS = 512  # the interpreter is slow
    if os.environ.get("RELAY_TEST_TRITON"):
        from triton_interpreter import interpreted  # pyright: ignore[reportMissingImports]

        _OPEN.enter_context(interpreted())
        backend.choose_ops = _kernels
        backend.choose_engine = _attention
    _watch(forward.StagedForward)
    for name in ("realign_on_device", "value_deviation", "add_probe_scores"):
        _break(triton_ops, name)


def _kernels(*args: Any, **kwargs: Any) -> Any:
    from sglang_relay.attention.carry_triton import TritonCarrier
    from sglang_relay.ops import working_kernels

    made = working_kernels(*args, **kwargs, capability=90, multiprocessors=2)
    return made._replace(carrier=TritonCarrier())


def _attention(wanted: str, heads: set[Any], **kwargs: Any) -> Any:
    from sglang_relay.attention.triton import TritonAttention

    (alike,) = heads
    return TritonAttention(alike, capability=90, multiprocessors=2)


def _break(module: Any, name: str) -> None:
    original = getattr(module, name)

    def launch(*args: Any, **kwargs: Any) -> None:
        if _FAULT.exists() and _FAULT.read_text(encoding="utf-8") == name:
            raise RuntimeError("broken by a test")
        original(*args, **kwargs)

    setattr(module, name, launch)


def _watch(staged: Any) -> None:
    from sync_counter import SyncCounter

    for name in ("prepare", "place", "run"):
        setattr(staged, name, _counted(getattr(staged, name), name, SyncCounter))


def _counted(original: Any, name: str, counter: Any) -> Any:
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        host = [v for key, v in vars(self.batch).items() if key.endswith("_cpu") and torch.is_tensor(v)]
        with counter(host) as waits:
            result = original(self, *args, **kwargs)
        record = {"step": name, "policy": self.policy.name, "plans": len(self.plans), "waits": waits.found}
        with _LOG.open("a", encoding="utf-8") as log:
            log.write(json.dumps(record) + "\n")
        return result

    return counted
