"""Whole passes replayed from the prefill graphs that SGLang captured for itself (docs/graphs.md).

A breakable prefill graph (model_executor/runner_backend/breakable_cuda_graph_backend.py) holds the model's body in
segments and leaves the attention of every layer to Python. What attends there is looked up at each replay, so the same
graphs serve a pass of the relay: with its rows in the static buffers, and its backend in the breaks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import PrefillCudaGraphRunner
from sglang.srt.model_executor.runner_backend.breakable_cuda_graph_backend import BreakableCudaGraphBackend
from sglang.srt.runtime_context import get_exec

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_relay.engine.backend import RelayAttentionBackend


class PrefillGraphs:
    """The captured prefill graphs of ``runner``, a ModelRunner. passes: how many were replayed for the relay."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.passes = 0

    def fit(self, batch: ForwardBatch, start: int, stop: int) -> bool:
        """Whether layers ``[start, stop)`` of ``batch`` can be replayed: all of them, and a shape that was captured.
        The same on every rank: nothing but shapes and the server's settings decides.

        Graphs that hold the attention themselves (``full``), whose segments read what the server's own attention
        backend prepares, or that call a whole forward with the batch of the capture (``--debug-cuda-graph``), cannot
        be; nor those with LoRA kernels, which read per-token metadata of the batch as it was scheduled.
        """
        graphs = self._runner.prefill_cuda_graph_runner
        return (
            start == 0
            and stop == self._runner.model_config.num_hidden_layers
            and isinstance(graphs, PrefillCudaGraphRunner)
            and isinstance(graphs.backend, BreakableCudaGraphBackend)
            and not graphs.use_captured_attn_metadata
            and not graphs.enable_lora
            and not get_exec().graph.debug_cuda_graph
            and graphs.can_run_graph(batch)
        )

    def replay(self, batch: ForwardBatch, backend: RelayAttentionBackend) -> Any:
        """The logits output of all layers, where ``fit`` allows it; whatever ``backend`` raises in a break ends it.

        ``execute`` enters a forward context of its own, with the runner's backend: hence the exchange.
        """
        runner = self._runner
        own, runner.attn_backend = runner.attn_backend, backend
        self.passes += 1
        try:
            return runner.prefill_cuda_graph_runner.execute(batch)
        finally:
            runner.attn_backend = own
