"""Quick start: import SGLang once instead of once per process, and without the garbage collector in the way.

SGLang spawns the scheduler and the detokenizer as fresh interpreters, because CUDA does not survive a fork. Each then
imports for ten seconds what the launcher has just imported. Without a device a fork is safe as long as the launcher has
a single thread, which is the case when it starts them.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

logger = logging.getLogger(__name__)

START_METHOD_VARIABLE = "SGLANG_TORCH_CPU_START_METHOD"
_TARGET = "sglang.srt.entrypoints.engine._set_envs_and_config"
_registered = False


def relax_collector() -> None:
    """Collect less often: imports make millions of objects that stay; walking them again and again takes seconds."""
    gc.set_threshold(20_000, 50, 100)


def is_single_threaded() -> bool:
    """Whether the process has one thread, native ones counted; False where that cannot be told (not Linux)."""
    tasks = Path("/proc/self/task")
    return tasks.is_dir() and len(list(tasks.iterdir())) == 1


def choose_start_method() -> str:
    """``fork`` where it is safe, else ``spawn``; the variable `START_METHOD_VARIABLE` overrides."""
    asked = os.environ.get(START_METHOD_VARIABLE, "")
    if asked:
        if asked not in multiprocessing.get_all_start_methods():
            raise ValueError(f"{START_METHOD_VARIABLE}={asked!r} is none of {multiprocessing.get_all_start_methods()}")
        return asked
    return "fork" if sys.platform == "linux" and is_single_threaded() else "spawn"


def fork_workers() -> None:
    """Let SGLang start its worker processes by `choose_start_method`; to be called in the launching process."""
    global _registered
    if not _registered:
        _registered = True
        HookRegistry.register(_TARGET, _use_start_method, HookType.AFTER, source=HookSource("relay_cpu", None))
        HookRegistry.apply_hooks()


def _use_start_method(result: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs after SGLang has forced ``spawn``, right before it starts the first worker."""
    method = choose_start_method()
    multiprocessing.set_start_method(method, force=True)
    logger.info("Worker processes start by %s; %s changes it.", method, START_METHOD_VARIABLE)
    return result
