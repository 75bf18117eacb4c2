"""What ``sglang-relay doctor`` looks at: this installation, and a running server's own account of its relay."""

from __future__ import annotations

import importlib.metadata
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any, NamedTuple

from sglang_relay.engine.plugin import SGLANG_VERSION

_PARAMETERS = {
    "sglang.srt.managers.scheduler.Scheduler._create_generation_req": ["self", "recv_req"],
    "sglang.srt.managers.scheduler.Scheduler.get_output_streamer_class": ["self"],
    "sglang.srt.managers.scheduler.Scheduler.get_prefill_adder_class": ["self"],
    "sglang.srt.managers.scheduler.Scheduler.run_batch": ["self", "batch"],
    "sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_extend": ["self"],
    "sglang.srt.model_executor.model_runner.ModelRunner.forward": ["self", "forward_batch"],
    "sglang.srt.models.llama.LlamaForCausalLM.forward_split_prefill": ["self", "input_ids", "positions"],
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.checkpoint_into_tree": ["self", "req"],
    "sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.path_device_indices": ["self", "node"],
    "sglang.srt.server_args.ServerArgs.check_server_args": ["self"],
    "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request": ["self", "obj"],
    "sglang.srt.managers.tokenizer_manager.TokenizerManager._send_one_request": ["self", "tokenized_obj"],
    "sglang.srt.managers.multi_tokenizer_mixin.write_data_for_multi_tokenizer": ["port_args", "server_args"],
}
"""SGLang's functions that the relay builds on, and the first parameters it relies on."""


class Finding(NamedTuple):
    ok: bool
    what: str
    detail: str


def installation() -> Iterator[Finding]:
    """Check versions, the plugin's entry point and the functions of SGLang that the relay hooks."""
    version = importlib.metadata.version("sglang")
    yield Finding(version == SGLANG_VERSION, "sglang version", f"{version} (made for {SGLANG_VERSION})")
    points = importlib.metadata.entry_points(group="sglang.srt.plugins", name="relay")
    yield Finding(len(points) == 1, "plugin entry point", ", ".join(p.value for p in points) or "not installed")
    platforms = [p.name for p in importlib.metadata.entry_points(group="sglang.srt.platforms")]
    yield Finding(True, "platform plugins", ", ".join(platforms) or "none (a GPU is needed)")
    for target, expected in _PARAMETERS.items():
        yield _signature(target, expected)


def _signature(target: str, expected: list[str]) -> Finding:
    owner, _, name = target.rpartition(".")
    try:
        found = list(inspect.signature(getattr(pkgutil.resolve_name(owner), name)).parameters)
    except Exception as error:  # an import of SGLang can fail in many ways, and each is a finding
        return Finding(False, target, f"{type(error).__name__}: {error}")
    return Finding(found[: len(expected)] == expected, target, f"({', '.join(found)})")


def server(info: dict[str, Any]) -> Iterator[Finding]:
    """Read ``/server_info`` of a running server: whether it relays, and if not, why."""
    states = [s.get("relay") for s in info.get("internal_states", [])]
    if not states or any(s is None for s in states):
        backend = info.get("radix_cache_backend")
        yield Finding(False, "relay", f"not selected (radix_cache_backend={backend!r}): start with 'relay'")
        return
    for rank, state in enumerate(states):
        reasons = ", ".join(state["unsupported"]) or "none"
        yield Finding(state["active"], f"relay, scheduler {rank}", f"active={state['active']}, reasons: {reasons}")
        absent = [name for name, present in state["hooks"].items() if not present]
        yield Finding(not absent, "hooks", f"{len(state['hooks'])} in force" if not absent else ", ".join(absent))
        yield _front_end(state.get("front_end", {}))
        settings = ", ".join(f"{k}={v}" for k, v in state["config"].items())
        yield Finding(True, "settings", f"{settings}; layers {state['layer_range']}")
        index = state["index"]
        yield Finding(True, "index", f"{index['donors']} donors, {index['bytes']} bytes, epoch {state['weight_epoch']}")
        stats = state["stats"]
        yield Finding(True, "tokens", ", ".join(f"{k} {v}" for k, v in stats["tokens"].items()) or "none yet")
        yield Finding(True, "declined", ", ".join(f"{k} {v}" for k, v in stats["declined"].items()) or "none")
        healthy = not stats["failures"] and not stats["fallbacks"]
        yield Finding(healthy, "host failures", f"{stats['failures']}, stock fall-backs {stats['fallbacks']}")


def _front_end(hooks: dict[str, bool]) -> Finding:
    """The process that answered says so itself: only there can it be known."""
    absent = [name for name, present in hooks.items() if not present]
    if not hooks:
        return Finding(False, "front end", "the plugin is not loaded in the process that answers: it brings no reports")
    return Finding(not absent, "front end", f"{len(hooks)} hooks in force" if not absent else ", ".join(absent))
