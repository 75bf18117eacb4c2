"""The forward of a relayed batch: place donor KV, run layer ranges over sets of rows.

What runs again (``selection.py``), and what says so, is up to the policy (``policies/base.py``): the deviation that the
first layers show, a probe pass of the prompt's last tokens, or nothing that runs first. In the last layer only the rows
whose logits are read go beyond K and V.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sglang_relay.engine.backend import RelayAttentionBackend
from sglang_relay.engine.layout import Layout
from sglang_relay.engine.probing import ProbePass
from sglang_relay.engine.selection import Selection, Work
from sglang_relay.engine.stage import Stage, State
from sglang_relay.engine.tools import ForwardTools
from sglang_relay.plan import Decline
from sglang_relay.policies import KEYS_AND_VALUES

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_relay.engine.manager import BatchPlan


class StagedForward:
    """One relay forward. ``prepare`` and ``place`` may fail on one rank alone, so the ranks agree after them; ``run``
    holds the model's collectives, and agrees wherever the relay's own code ran between them."""

    def __init__(self, tools: ForwardTools, batch: ForwardBatch, planned: BatchPlan) -> None:
        self.tools = tools
        self.runner = tools.runner
        self.batch = batch
        self.policy = planned.policy
        self.plans = planned.plans
        self.states: torch.Tensor | None = None
        self.head: Stage | None = None
        """The fresh tokens, up to the layer that reused ones enter."""
        self.layers: int = tools.runner.model_config.num_hidden_layers

    # ------------------------------------------------------------------ prepare

    def prepare(self) -> None:
        """Lay out rows and plan the first stage. Raises Decline when the batch is not what was planned."""
        self.layout = layout = Layout(self.runner, self.batch, self.plans)
        self.backend = RelayAttentionBackend(self.runner, self.tools.ops)
        self.selection = Selection(self.tools, self.policy, layout, self.backend)
        self.fresh = np.flatnonzero(layout.fresh)
        self.ends = self._rows_with_logits()
        self.placing = [s for s in layout.spans if s.source is not None]
        if self.placing:
            source = np.concatenate([s.sources for s in self.placing])
            target = np.concatenate([s.positions for s in self.placing])
            if max(source.max(), target.max()) >= self.tools.rotary.positions:
                raise Decline("rotary_table_short", f"position {max(source.max(), target.max())}")
            self.source, self.target = layout.tensor(source), layout.tensor(target)
        if self.policy.probes:
            self.probing = probing = ProbePass(layout, self.tools.probe_queries)
            self.first = self._stage(probing.rows, probing.missing)
            self.selection.measure_attention(probing)
        else:
            self.first = self._stage(self._first_rows())
        if self.policy.signal == "deviation" and self.policy.whole < self.policy.until:
            self.selection.measure_deviation(self.first.rows)

    def _first_rows(self) -> np.ndarray:
        if self.policy.whole:
            exact = self.layout.rows_of([s for s in self.layout.spans if s.exact])
            self._enter()
            layers = self.policy.whole - self.entered + (KEYS_AND_VALUES if self._looks_ahead else 0.0)
            for span in self.layout.approximate():
                self.selection.charge(span.plan, span.length * layers)
            return np.setdiff1d(np.arange(len(self.layout.positions)), exact)
        if self.policy.signal == "none":
            return self.selection.with_selected(self.fresh)
        return self.fresh

    def _enter(self) -> None:
        """Reused tokens enter with their donors' hidden states, where all of them have one."""
        spans = self.layout.approximate()
        if self.tools.hidden is None or not self.policy.enters or not spans:
            return
        self.states = self.tools.hidden.of(self.layout.donor_slots(spans))
        if self.states is not None:
            self.head = self._stage(self.fresh)

    @property
    def _looks_ahead(self) -> bool:
        return self.policy.looks_ahead and self.policy.whole < self.policy.until

    @property
    def entered(self) -> int:
        """The layer that reused tokens enter."""
        return 0 if self.head is None else self.policy.enters

    def _stage(self, rows: np.ndarray, missing: np.ndarray | None = None) -> Stage:
        sequences = self.layout.sequences(rows, missing)
        attention = self.tools.attention.plan(sequences, dtype=self.runner.dtype, device=self.layout.device)
        return Stage(self.runner.model, self.layout, self.backend, rows, attention, self.tools.graphs)

    def _rows_with_logits(self) -> np.ndarray:
        """Each request's last row, and those whose prompt logprobs are asked for; fresh in every stage."""
        layout, batch = self.layout, self.batch
        counts = np.ones(len(layout.stops), dtype=np.int64)
        if batch.return_logprob and batch.extend_logprob_start_lens_cpu is not None:
            lens = np.array(batch.extend_seq_lens_cpu)
            counts = np.maximum(counts, lens - np.array(batch.extend_logprob_start_lens_cpu))
        ends = layout.starts[1:]
        rows = np.concatenate([np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)])
        if not layout.fresh[rows].all():
            raise Decline("input_logprobs", "prompt logprobs inside a reused segment")
        return rows

    # ------------------------------------------------------------------ run

    @torch.no_grad()
    def place(self) -> None:
        """Copy donor K and V to the requests' own slots, keys turned to their new positions, in all layers."""
        if not self.placing:
            return
        layout = self.layout
        slots = [s.slots for s in self.placing if s.slots is not None]
        donors = torch.cat(slots).to(layout.device)
        if layout.device.type == "cuda":
            # The scheduler's stream made them, this one reads them, and the plan that holds them ends before it does.
            for made in slots:
                made.record_stream(torch.cuda.current_stream(layout.device))
        own = layout.out_loc.index_select(0, layout.tensor(layout.rows_of(self.placing))).long()
        self.tools.ops.copier.copy_turned(donors, own, self.source, self.target)

    def run(self) -> tuple[Any, list[Work]]:
        """Returns the logits output and what each plan's repair took.

        Between the layers nothing of the relay raises, and after each stage the ranks agree, so that all of them leave
        at the same point. Raises Decline on every rank when one of them failed or selected other rows.
        """
        if self.policy.probes:
            output = self._run_probed()
        elif self.policy.signal == "deviation":
            output = self._run_deviating()
        else:
            output = self._finish(self.first, 0)
        failure, work = None, []
        try:
            work = self.selection.work(entered=self.head is not None)
        except Exception as error:
            failure = self.tools.failure("report", error)
        self._agree(failure, 0)
        return output, work

    def run_in_parts(self, parts: Sequence[tuple[int, np.ndarray]]) -> Any:
        """The logits output after stages of ever fewer rows: at which layer each begins, and its rows. The last layer
        is one more part, where there is another before it."""
        (stage,) = self._next(None, lambda: [parts[0][1]])
        done = 0
        for start, rows in parts[1:]:
            stage.layers(done, start)
            (stage,) = self._next(stage, lambda rows=rows: [rows])
            done = start
        output = self._finish(stage, done)
        self._agree(None, 0)
        return output

    def _run_deviating(self) -> Any:
        whole, until = self.policy.whole, self.policy.until
        self._run_head()
        if whole == self.layers:
            return self._finish(self.first, self.entered)
        self.first.layers(self.entered, whole)
        if until == whole:  # selected or not, no reused token goes on
            (stage,) = self._next(self.first, lambda: [self.fresh])
            return self._finish(stage, whole)
        state = self._look_ahead(whole) if self._looks_ahead else None
        self.selection.collect()
        (stage,) = self._next(self.first, lambda: [self.selection.with_selected(self.fresh)], state)
        if until < self.layers:
            stage.layers(whole, until)
            (stage,) = self._next(stage, lambda: [self.fresh])
            return self._finish(stage, until)
        return self._finish(stage, whole)

    def _look_ahead(self, layer: int) -> State:
        """K and V of ``layer`` of the first stage's rows, which end there; with what they entered it."""
        failure, state = None, self.first.export()
        try:
            self.first.take_over(self.first.rows, *state)
        except Exception as error:
            failure = self.tools.failure("hand_over", error)
        self._agree(failure, layer)
        self.first.keys_and_values(layer, layer)
        return state

    def _run_head(self) -> None:
        """Bring the fresh tokens to the layer that the reused ones enter, and join them."""
        if self.head is None or self.states is None:
            return
        failure = None
        self.head.layers(0, self.entered)
        state = self.head.export()
        try:
            self.first.join(self.fresh, state, self.layout.rows_of(self.layout.approximate()), self.states)
        except Exception as error:
            failure = self.tools.failure("hand_over", error)
        self.states = None
        self._agree(failure, self.entered)

    def _run_probed(self) -> Any:
        if len(self.first.rows):
            self.first.keys_and_values(0, self.layers - 1)
        self.selection.collect()
        (stage,) = self._next(None, lambda: [self.selection.with_selected(np.setdiff1d(self.fresh, self.probing.head))])
        return self._finish(stage, 0)

    def _finish(self, stage: Stage, done: int) -> Any:
        """Layers ``[done, layers)``; of the last one, K and V of all rows, and the rest of it where logits are read,
        unless a replay runs all of it anyway."""
        last = self.layers - 1
        if done >= last or len(self.ends) == len(stage.rows) or stage.replays(done, self.layers):
            return stage.layers(done, self.layers)
        stage.layers(done, last)
        ends, others = self._next(stage, lambda: self._last_layer(stage.rows))
        others.keys_and_values(last, last)
        return ends.layers(last, self.layers)

    def _last_layer(self, rows: np.ndarray) -> list[np.ndarray]:
        """Who runs all of it, and who K and V."""
        self.selection.ends_early(rows)
        return [self.ends, rows]

    def _next(
        self, before: Stage | None, rows: Callable[[], list[np.ndarray]], state: State | None = None
    ) -> list[Stage]:
        """The stages that go on with each of ``rows()``, subsets of the rows of ``before``, or start from their
        embeddings (None); the same on every rank. state: what ``before`` has exported already."""
        stages: list[Stage] = []
        failure, digest = None, 0
        if self.backend.failure is None:
            try:
                for active in rows():
                    stages.append(self._stage(active))
                    digest = (digest * 31 + int(np.dot(active, np.arange(1, len(active) + 1)))) % (1 << 61)
            except Exception as error:
                failure = self.tools.failure("select", error)
        self._agree(failure, digest)
        if before is not None:
            state = state or before.export()
            try:
                for stage in stages:
                    stage.take_over(before.rows, *state)
            except Exception as error:
                failure = self.tools.failure("hand_over", error)
            self._agree(failure, digest)
        return stages

    def _agree(self, failure: str | None, digest: int) -> None:
        """All ranks came this far with the same ``digest``; else Decline on all of them."""
        if self.backend.failure is not None:
            failure = self.tools.failure("attention", self.backend.failure)
            self.backend.failure.__traceback__ = None  # its frames hold the tensors of this pass
        if not self.tools.consensus.agree(failure is None, digest):
            raise Decline(failure or "ranks_disagree", "one rank failed, or the selected rows differ")
