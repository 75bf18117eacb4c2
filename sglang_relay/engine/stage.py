"""A set of rows that runs through a range of layers: one call of ``model.forward_split_prefill``.

Stages are calls (models/llama.py and 17 more have the method), not hooks on the layers. A hook that swaps rows has to
replace the positions of every later layer, needs a special case after the last layer, stays installed while the server
decodes, and when it does not fire nobody notices. A stage is a plain call with its own ForwardBatch; between two calls
the rows move through the residual stream's own export and hand-off, which complete an all-reduce that tensor
parallelism may still owe. The price: models without the method are served stock (``model_without_layer_split``), and
those whose method does something else (``split_check.py``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from sglang.srt.layers.layer_boundary.residual import batch as residual_batch
from sglang.srt.layers.layer_boundary.residual.add_norm import PLAIN_ADD
from sglang.srt.layers.layer_boundary.residual.stream import ResidualStream
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.runtime_context import get_model

from sglang_relay.attention import StageAttention
from sglang_relay.engine.backend import LayerDone, RelayAttentionBackend
from sglang_relay.engine.graphs import PrefillGraphs
from sglang_relay.engine.layout import Rows

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

State: TypeAlias = "tuple[torch.Tensor, torch.Tensor | None]"
"""Hidden states and residual of a stage's rows between two layers."""


class Stage:
    """rows: int64 numpy, ascending rows of the layout. attention: planned for these rows. graphs: replayed where they
    fit."""

    def __init__(
        self,
        model: Any,
        layout: Rows,
        backend: RelayAttentionBackend,
        rows: np.ndarray,
        attention: StageAttention,
        graphs: PrefillGraphs | None = None,
    ) -> None:
        self.rows = rows
        self._model = model
        self._layout = layout
        self._backend = backend
        self._attention = attention
        self._graphs = graphs
        self._batch = self._make_batch()

    def _make_batch(self) -> ForwardBatch:
        layout, full = self._layout, self._layout.batch
        whole = layout.is_batch and len(self.rows) == len(layout.positions)
        index = layout.tensor(self.rows)

        def pick(values: torch.Tensor) -> torch.Tensor:
            return values if whole else values.index_select(0, index)

        lens = layout.per_request(self.rows)
        lens_cpu = lens.tolist()
        starts = None
        if full.return_logprob and full.extend_logprob_start_lens_cpu is not None:
            # Logprob rows are counted from a chunk's end, and the rows they need are fresh in every stage.
            old = zip(full.extend_seq_lens_cpu or (), full.extend_logprob_start_lens_cpu, lens_cpu, strict=True)
            starts = [now - (n - start) for n, start, now in old]
        changes: dict[str, Any] = {
            "forward_mode": ForwardMode.EXTEND,
            "input_ids": pick(layout.input_ids),
            "positions": pick(layout.row_positions),
            "out_cache_loc": pick(layout.out_loc),
            "extend_num_tokens": len(self.rows),
            "extend_seq_lens_cpu": lens_cpu,
            "extend_logprob_start_lens_cpu": starts,
            "hidden_states": None,
            "residual_stream": None,
        }
        for name, values in (("extend_seq_lens", lens), ("extend_start_loc", np.cumsum(lens) - lens)):
            tensor = getattr(full, name)
            if tensor is not None:
                changes[name] = layout.tensor(values).to(tensor.dtype)
        if full.global_num_token_non_padded_cpu is not None:
            changes["global_num_token_non_padded_cpu"] = len(self.rows)
        for name in ("global_num_token_non_padded", "num_token_non_padded"):
            tensor = getattr(full, name)
            if tensor is not None:
                changes[name] = torch.full_like(tensor, len(self.rows))
        return replace(full, **changes)

    def export(self) -> State:
        """The rows' hidden states and residual (sglang/srt/layers/layer_boundary/residual/stream.py), once. A
        collective where an all-reduce is still owed. Raises NotImplementedError, on every rank, for a stream whose
        pending update is no plain addition."""
        stream = residual_batch.stream_of(self._batch)
        if stream.pending is None or stream.pending.update is None or not stream.pending.update.is_plain_add:
            raise NotImplementedError("residual stream is not a plain addition")
        hidden, residual = stream.export(self._batch.hidden_states)
        residual_batch.clear(self._batch)
        return hidden, residual  # type: ignore[return-value]

    def take_over(self, rows: np.ndarray, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Go on from what a stage of ``rows`` exported. Both tensors are copied: the fused add + norm of the next layer
        writes the residual in place."""
        index = self._layout.tensor(np.searchsorted(rows, self.rows))
        hidden = hidden.index_select(0, index)
        residual = None if residual is None else residual.index_select(0, index)
        handle, self._batch.residual_stream = ResidualStream.from_handoff(hidden, residual, PLAIN_ADD)
        self._batch.hidden_states = handle  # type: ignore[assignment]

    def join(
        self,
        rows: np.ndarray,
        state: State,
        others: np.ndarray,
        entering: torch.Tensor,
    ) -> None:
        """Go on from what a stage of ``rows``, a part of these rows, exported; ``others``, the rest of them in any
        order, enter with hidden states ``entering`` [others, hidden size], which contain their residual."""
        old, new = (self._layout.tensor(np.searchsorted(self.rows, part)) for part in (rows, others))
        hidden, residual = state
        joined = hidden.new_empty(len(self.rows), hidden.shape[1])
        joined[old], joined[new] = hidden, entering.to(hidden.dtype)
        rest = None
        if residual is not None:
            rest = residual.new_zeros(joined.shape)
            rest[old] = residual
        handle, self._batch.residual_stream = ResidualStream.from_handoff(joined, rest, PLAIN_ADD)
        self._batch.hidden_states = handle  # type: ignore[assignment]

    @property
    def failure(self) -> BaseException | None:
        """What went wrong in the attention of a layer; the layers go on without."""
        return self._backend.failure

    def replays(self, start: int, stop: int) -> bool:
        """Whether layers ``[start, stop)`` come from captured graphs."""
        return self._graphs is not None and self._graphs.fit(self._batch, start, stop)

    def layers(self, start: int, stop: int) -> Any:
        """Run layers ``[start, stop)``; the logits output when ``stop`` is the number of layers, else None."""
        self._backend.stage = self._attention
        batch = self._batch
        if self._graphs is not None and self.replays(start, stop):
            return self._graphs.replay(batch, self._backend)
        with (
            get_model().override(shared_experts=self._model.shared_experts_config),
            forward_context(ForwardContext(attn_backend=self._backend), forward_batch=batch),
        ):
            return self._model.forward_split_prefill(batch.input_ids, batch.positions, batch, (start, stop))

    def keys_and_values(self, start: int, layer: int) -> None:
        """Run layers ``[start, layer)`` whole and, of ``layer``, what makes K and V and what the probe measures: no
        attention, no feed-forward, no logits. The rows end here."""
        self._backend.last_of_rows = layer
        try:
            self.layers(start, layer + 1)
        except LayerDone:
            return
        finally:
            self._backend.last_of_rows = None
        raise RuntimeError(f"layer {layer} ran without the relay's attention")
