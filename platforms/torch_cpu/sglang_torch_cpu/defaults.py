"""Defaults for a CPU server. Whatever the user has set, on the command line or in the environment, wins."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from sglang_torch_cpu import processes

logger = logging.getLogger(__name__)

MAX_TOTAL_TOKENS = 32_768
"""KV slots if the user bounds the pool in no way: SGLang fills all free memory with zeros otherwise (12 s per 6 GB)."""

MAX_THREADS = 8
"""More OpenMP threads than this cost a small model more in barriers than they save in arithmetic."""

_THREADS_CHOSEN_HERE = "SGLANG_TORCH_CPU_THREADS_DEFAULTED"


def usable_cores() -> int:
    """Number of cores this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else (os.cpu_count() or 1)


def default_threads(cores: int, ranks: int) -> int:
    """OpenMP threads per rank.

    Half of the cores stay free for the tokenizer, the detokenizer and the client: a barrier waits for its slowest
    thread, so on two busy cores two threads decode several times slower than one.
    """
    return min(MAX_THREADS, max(1, cores // (2 * max(1, ranks))))


def thread_binding(cores: int, ranks: int) -> str:
    """``SGLANG_CPU_OMP_THREADS_BIND`` for `ranks` ranks, e.g. ``0-3|4-7``; ranks share cores where there are too few.

    SGLang refuses more ranks than NUMA nodes unless this is set (`srt/utils/numa_utils.py:init_threads_binding`).
    """
    share = max(1, cores // ranks)
    groups = []
    for rank in range(ranks):
        first = rank * share % cores
        last = min(first + share, cores) - 1
        groups.append(str(first) if first == last else f"{first}-{last}")
    return "|".join(groups)


def set_process_defaults() -> None:
    """Environment and thread count of the calling process; child processes inherit the environment.

    Runs when the platform is activated, before SGLang reads any of these variables.
    """
    processes.relax_collector()
    processes.register_hooks()
    os.environ.setdefault("SGLANG_ROPE_CACHE_FP32", "1")
    # SGLang compiles a few small functions; with the C++ backend of torch that takes seconds in the first requests and
    # a compiler on the machine, for nothing that a CPU would notice.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ[_THREADS_CHOSEN_HERE] = "1"
        _set_threads(default_threads(usable_cores(), ranks=1))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"].split(",")[0]))


def _set_threads(count: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)


def set_server_defaults(server_args: Any) -> None:
    """Fill in the fields of `server_args` (`sglang.srt.server_args.ServerArgs`) that the user left open.

    SGLang calls this once, in the launching process, through `Platform.apply_server_args_defaults`.

    Raises:
        RuntimeError: an accelerator is visible; SGLang would take its code paths for what this platform runs.
    """
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        raise RuntimeError(
            f"SGLANG_PLATFORM=relay_cpu, but this machine has a {kind} device: "
            "hide it (CUDA: CUDA_VISIBLE_DEVICES=), or unset SGLANG_PLATFORM to serve on it."
        )
    if server_args.max_total_tokens is None and server_args.mem_fraction_static is None:
        server_args.max_total_tokens = MAX_TOTAL_TOKENS
        logger.info("KV pool bounded to %d tokens; --max-total-tokens changes it.", MAX_TOTAL_TOKENS)
    # SGLang's own default for x86 CPUs needs the CPU kernel build that this platform does without.
    if server_args.attention_backend in (None, "intel_amx"):
        server_args.attention_backend = "torch_native"
    if server_args.dtype == "auto" and _checkpoint_dtype(server_args) == "float32":
        server_args.dtype = "float32"
    server_args.sampling_backend = "pytorch"
    server_args.disable_custom_all_reduce = True
    if os.environ.get("SGLANG_TORCH_CPU_SPIN", "0") != "1":
        server_args.sleep_on_idle = True

    ranks = server_args.tp_size * server_args.pp_size * server_args.dp_size
    if ranks > 1:
        os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", thread_binding(usable_cores(), ranks))
        if os.environ.get(_THREADS_CHOSEN_HERE) == "1":
            _set_threads(default_threads(usable_cores(), ranks))


def _checkpoint_dtype(server_args: Any) -> str | None:
    """The dtype that the checkpoint's ``config.json`` names, or None.

    SGLang serves fp32 checkpoints in fp16 by default (`configs/model_config.py:_get_and_verify_dtype`), which on a CPU
    is slower and loses digits.
    """
    from transformers import PretrainedConfig

    try:
        config, _ = PretrainedConfig.get_config_dict(server_args.model_path, revision=server_args.revision)
    except (OSError, ValueError):
        return None  # Not a Hugging Face checkpoint, or not to be had: SGLang finds out and says so itself.
    config = config.get("text_config") or config
    return config.get("dtype") or config.get("torch_dtype")
