"""How SGLang's processes start: importing it once, without the garbage collector in the way, and without its kernels.

SGLang spawns the scheduler and the detokenizer as fresh interpreters, because CUDA does not survive a fork. Each then
imports for ten seconds what the launcher has just imported. Without a device a fork is safe as long as the launcher has
a single thread, which is the case when it starts them.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

START_METHOD_VARIABLE = "SGLANG_TORCH_CPU_START_METHOD"
_BEFORE_WORKERS = "sglang.srt.entrypoints.engine._set_envs_and_config"
_BIND_THREADS = "sglang.srt.distributed.bootstrap._init_cpu_threads_env"


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


def register_hooks() -> None:
    """Register this module's hooks; SGLang's `load_plugins` applies them, after every plugin has registered its own.

    Called while the platform is activated, which SGLang does in the first imports of every process.
    """
    # Not on top: SGLang, whose import activates the platform, would find this module half imported.
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

    source = HookSource("relay_cpu", "sglang-relay-torch-cpu")
    if multiprocessing.parent_process() is None:
        HookRegistry.register(_BEFORE_WORKERS, _use_start_method, HookType.AFTER, source=source)
    if platform.machine().lower() in ("aarch64", "arm64"):
        HookRegistry.register(_BIND_THREADS, _bind_threads, HookType.AROUND, source=source)


def _use_start_method(result: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs after SGLang has forced ``spawn``, right before it starts the first worker."""
    method = choose_start_method()
    multiprocessing.set_start_method(method, force=True)
    logger.info("Worker processes start by %s; %s changes it.", method, START_METHOD_VARIABLE)
    return result


def _bind_threads(original: Callable[..., None], **kwargs: Any) -> None:
    """On arm64 SGLang takes its CPU kernels for granted; without them there is nothing to bind threads with."""
    if hasattr(torch.ops.sgl_kernel, "init_cpu_threads_env"):
        original(**kwargs)
