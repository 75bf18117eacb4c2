"""SGLang's breakable prefill graphs on a machine without a GPU, as a plugin of the server's processes.

Only the graph itself is stood in for: a `RecordedGraph` keeps the operators that ran between the begin and the end of
a capture, with the tensors they read and wrote, and runs them again at replay, on the same tensors. What is SGLang's
(runner, buckets, padding, static buffers, breaks, logits behind the graph) runs as it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from torch.distributed import Work
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BUCKETS = [8, 32, 64, 96, 256]
"""Token counts that are captured."""

LOGITS: list[int] = []
"""Rows of every prefill's hidden states that came before the language-model head."""

AUDITS: list[float] = []
"""What every live audit found, in nats."""


class RecordedGraph(TorchDispatchMode):
    """Stands for ``torch.cuda.CUDAGraph``: addresses are fixed by the capture, values are those of the replay, and no
    Python of the captured code runs again."""

    def __init__(self, keep_graph: bool = False) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []

    def capture_begin(self, **kwargs: Any) -> None:
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, _tensors(result)))
        return result

    def replay(self) -> None:
        for func, args, kwargs, outputs in self._calls:
            result = func(*args, **kwargs)
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.ScriptObject):  # of a collective
                    Work.unbox(leaf).wait()
            for old, new in zip(outputs, _tensors(result), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


def _tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def load() -> None:
    runner = "sglang.srt.model_executor.model_runner.ModelRunner"
    HookRegistry.register(f"{runner}.init_cuda_graphs", capture, HookType.AFTER)
    HookRegistry.register("sglang.srt.layers.logits_processor.LogitsProcessor.forward", count, HookType.BEFORE)
    HookRegistry.register("sglang_relay.breaker.Breaker.record", judged, HookType.BEFORE)
    import relay_test_inspector  # pyright: ignore[reportMissingImports]

    questions = (logits, audits, replay, stock_attention)
    relay_test_inspector.QUESTIONS |= {question.__name__: question for question in questions}


def capture(result: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
    from sglang.srt.distributed import parallel_state
    from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput
    from sglang.srt.runtime_context import get_exec

    torch.cuda.CUDAGraph = RecordedGraph
    parallel_state.get_current_device_stream_fast = torch.cpu.current_stream  # asks a CUDA build of PyTorch for a GPU
    torch.cpu.graph_pool_handle = object  # pyright: ignore[reportAttributeAccessIssue]
    # Shared with decode graphs where there are some: a later replay overwrites an earlier one's logits.
    runner.graph_shared_output = GraphSharedOutput(device=torch.device("cpu"), max_rows=8)
    config = get_exec().graph.cuda_graph_config.prefill
    config.backend, config.bs = "breakable", list(BUCKETS)
    runner.init_prefill_cuda_graph()


def count(processor: Any, input_ids: Any, hidden: Any, head: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    if batch.forward_mode.is_extend():
        LOGITS.append(hidden.shape[0])


def judged(breaker: Any, kl: float, *args: Any, **kwargs: Any) -> None:
    AUDITS.append(kl)


# ---------------------------------------------------------------------- questions


def logits(scheduler: Any) -> list[int]:
    """What `LOGITS` has held since this was last asked."""
    found = list(LOGITS)
    LOGITS.clear()
    return found


def audits(scheduler: Any, every: int) -> list[float]:
    """What `AUDITS` has held since this was last asked; from now on one relayed request in ``every`` is audited, 0 for
    none."""
    auditor = scheduler.tree_cache.relay.auditor
    auditor._every = every
    found = list(AUDITS)
    AUDITS.clear()
    return found


def stock_attention(scheduler: Any) -> str:
    return type(scheduler.tp_worker.model_runner.attn_backend).__name__


def replay(scheduler: Any, context: int, rows: int, ends_early: bool = False) -> dict[str, Any]:
    """One pass over ``rows`` tokens behind ``context`` others, eager and replayed, on the same made-up KV.

    Returns whether logits and K and V are the same bits, how far they are apart, whether the rows' slots were all
    written and any other was, and of each pass the (layer, rows) of every call of the attention. ends_early: with the
    last layer's K and V, as a probe pass does.
    """
    from sglang_relay.engine.made_up import borrowed, prepared

    relay, runner = scheduler.tree_cache.relay, scheduler.tp_worker.model_runner
    tools, layers = relay.tools, runner.model_config.num_hidden_layers
    pool = (*runner.token_to_kv_pool.k_buffer, *runner.token_to_kv_pool.v_buffer)
    found, after, calls = [], [], []
    with borrowed(relay.tree, relay.consensus, runner, requests=1, tokens=2048) as made, torch.no_grad():
        slots = made.slots[0]
        for buffer in pool:
            buffer[slots] = torch.randn(len(slots), *buffer.shape[1:], generator=torch.Generator().manual_seed(7))
        batch = made.batch(context, rows)
        before = [buffer.clone() for buffer in pool]
        for graphs in (None, tools.graphs):
            for buffer, old in zip(pool, before, strict=True):
                buffer.copy_(old)
            staged = prepared(replace(tools, graphs=graphs), batch)
            calls.append(_watch(staged.backend))
            if ends_early:
                staged.first.keys_and_values(0, layers - 1)
            else:
                found.append(staged.first.layers(0, layers).next_token_logits.clone())
            assert staged.backend.failure is None, staged.backend.failure
            after.append([buffer.clone() for buffer in pool])
        own = slots[context : context + rows]
        changed = [[(new != old).flatten(1).any(1) for new, old in zip(kv, before, strict=True)] for kv in after]
    return {
        "same_logits": not found or torch.equal(*found),
        "same_kv": all(torch.equal(a, b) for a, b in zip(*after, strict=True)),
        "apart": max(float((a - b).abs().max()) for a, b in [*zip(*after, strict=True), *([found] if found else [])]),
        "written": all(bool(rows[own].all()) for kv in changed for rows in kv),
        "outside": any(int(rows.sum()) > len(own) for kv in changed for rows in kv),
        "calls": calls,
    }


def _watch(backend: Any) -> list[tuple[int, int]]:
    calls, original = [], backend.forward_extend

    def forward_extend(q: torch.Tensor, k: Any, v: Any, layer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append((layer.layer_id, q.shape[0]))
        return original(q, k, v, layer, *args, **kwargs)

    backend.forward_extend = forward_extend
    return calls
