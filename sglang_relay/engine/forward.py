"""The forward of a relayed batch: place donor KV, choose what to repair, run layer ranges over sets of rows.

What is chosen, and from what, is the policy's (``policies/base.py``): by the deviation that the first layers show, by a
probe pass of the prompt's last tokens, or beforehand. In the last layer only the rows whose logits are read go beyond
K and V.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from sglang.srt.model_executor.model_runner import ModelRunnerOutput
from sglang.srt.runtime_context import get_parallel

from sglang_relay.attention import Interpolation, parts_of
from sglang_relay.engine.audit import AUDITED, divergence
from sglang_relay.engine.backend import AttentionProbe, DeviationProbe, RelayAttentionBackend
from sglang_relay.engine.consensus import digest_of
from sglang_relay.engine.layout import Layout, Span
from sglang_relay.engine.probing import ProbePass
from sglang_relay.engine.stage import Stage
from sglang_relay.engine.tools import ForwardTools
from sglang_relay.plan import Decline
from sglang_relay.policies import PromptView
from sglang_relay.transfer import on_device, read_back

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_relay.engine.influence import Influence
    from sglang_relay.engine.manager import BatchPlan, RelayManager


class Work(NamedTuple):
    """What one plan's repair took. selected: reused tokens that the policy chose; layers: token-layers that ran on
    account of the repair, probe pass and rows of earlier chunks included; influence: reused tokens that have one;
    entered: whether reused tokens entered with stored hidden states."""

    selected: int
    layers: int
    influence: int
    entered: bool


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
        self.selected = [0] * len(self.plans)
        self.work = [0] * len(self.plans)
        self.influence: list[torch.Tensor | None] = [None] * len(self.plans)
        self.known = [0] * len(self.plans)
        """Reused tokens that have an influence."""

    # ------------------------------------------------------------------ prepare

    def prepare(self) -> None:
        """Lay out rows and plan the first stage. Raises Decline when the batch is not what was planned."""
        self.layout = layout = Layout(self.runner, self.batch, self.plans)
        self.backend = RelayAttentionBackend(self.runner, self.tools.ops)
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
            asked = [queries for _, queries in probing.asked]
            scores = self.tools.ops.probe.plan(asked, dtype=self.runner.dtype, device=layout.device)
            self.backend.probe = AttentionProbe(scores, self.layers)
            for number, rows in enumerate(probing.repeated):
                self.work[number] += rows * self.layers
        else:
            self.first = self._stage(self._first_rows())
        if self.policy.signal == "deviation" and self.policy.whole < self.policy.until:
            self._prepare_deviation()

    def _first_rows(self) -> np.ndarray:
        if self.policy.whole:
            exact = self.layout.rows_of([s for s in self.layout.spans if s.exact])
            self._enter()
            for span in self.layout.approximate():
                self.work[span.plan] += span.length * (self.policy.whole - self.entered)
            return np.setdiff1d(np.arange(len(self.layout.positions)), exact)
        if self.policy.signal == "none":
            return self._with_selected(self.fresh, [None] * len(self.plans))
        return self.fresh

    def _enter(self) -> None:
        """Reused tokens enter with their donors' hidden states, where all of them have one."""
        spans = self.layout.approximate()
        slots = [s.slots for s in spans if s.slots is not None]
        if self.tools.hidden is None or not self.policy.enters or not slots:
            return
        self.states = self.tools.hidden.of(torch.cat(slots).to(self.layout.device))
        if self.states is not None:
            self.head = self._stage(self.fresh)

    @property
    def entered(self) -> int:
        """The layer that reused tokens enter."""
        return 0 if self.head is None else self.policy.enters

    def _prepare_deviation(self) -> None:
        spans = self.layout.approximate()
        if spans:
            rows = np.searchsorted(self.first.rows, self.layout.rows_of(spans))
            slots = torch.cat([s.slots for s in spans if s.slots is not None]).to(self.layout.device)
            heads = self.runner.token_to_kv_pool.head_num
            self.backend.deviation = DeviationProbe(self.policy.whole - 1, heads, self.layout.tensor(rows), slots)

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
        self._agree(None, 0)
        counts = zip(self.selected, self.work, self.known, strict=True)
        return output, [Work(*of_plan, self.head is not None) for of_plan in counts]

    def _run_deviating(self) -> Any:
        whole, until = self.policy.whole, self.policy.until
        self._run_head()
        if whole == self.layers:
            return self._finish(self.first, self.entered)
        self.first.layers(self.entered, whole)
        if until == whole:  # selected or not, no reused token goes on
            (stage,) = self._next(self.first, lambda: [self.fresh])
            return self._finish(stage, whole)
        signals = self._deviations()
        if self.tools.influence is not None and self.policy.reads_influence:
            self.influence = self._influence(self.tools.influence)
        (stage,) = self._next(self.first, lambda: [self._with_selected(self.fresh, signals)])
        if until < self.layers:
            stage.layers(whole, until)
            (stage,) = self._next(stage, lambda: [self.fresh])
            return self._finish(stage, until)
        return self._finish(stage, whole)

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
        signals = self._attention_scores()
        self.backend.probe = None
        rest = np.setdiff1d(self.fresh, self.probing.head)
        (stage,) = self._next(None, lambda: [self._with_selected(rest, signals)])
        return self._finish(stage, 0)

    def _finish(self, stage: Stage, done: int) -> Any:
        """Layers ``[done, layers)``; of the last one, K and V of all rows, and the rest of it where logits are read,
        unless a replay runs all of it anyway."""
        last = self.layers - 1
        if done >= last or len(self.ends) == len(stage.rows) or stage.replays(done, self.layers):
            return stage.layers(done, self.layers)
        stage.layers(done, last)
        ends, others = self._next(stage, lambda: [self.ends, stage.rows])
        others.keys_and_values(last, last)
        return ends.layers(last, self.layers)

    def _next(self, before: Stage | None, rows: Callable[[], list[np.ndarray]]) -> list[Stage]:
        """The stages that go on with each of ``rows()``, subsets of the rows of ``before``, or start from their
        embeddings (None); the same on every rank."""
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
            state = before.export()
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

    # ------------------------------------------------------------------ select

    def _deviations(self) -> list[torch.Tensor | None]:
        """Per plan, float32 [n]: mean of 1 - cosine over the KV heads of all ranks, equal on all of them.

        A collective: a rank whose measurement failed takes part with zeros, and is found out by the agreement after it.
        """
        probe = self.backend.deviation
        if probe is None:
            return [None] * len(self.plans)
        heads = probe.distance_sum.new_full((1,), probe.heads)
        packed = _sum_over_ranks(torch.cat((probe.distance_sum, heads)))
        deviation = packed[:-1] / packed[-1]
        counts = [sum(s.length for s in self.layout.approximate(i)) for i in range(len(self.plans))]
        return list(deviation.split(counts))

    def _influence(self, collected: Influence) -> list[torch.Tensor | None]:
        """Per plan, float32 [n]: what the donors' tokens received while they were decoded, over the heads of all ranks;
        NaN for those without. A collective."""
        spans = [self.layout.approximate(i) for i in range(len(self.plans))]
        slots = [s.slots for of_plan in spans for s in of_plan if s.slots is not None]
        if not slots:
            return [None] * len(self.plans)
        scores = _sum_over_ranks(collected.of(torch.cat(slots).to(self.layout.device)))
        return list(scores.split([sum(s.length for s in of_plan) for of_plan in spans]))

    def _attention_scores(self) -> list[torch.Tensor | None]:
        """Per plan, float32 [n]: the probe's scores over the heads of all ranks; None for plans that do not end here.

        A collective, as ``_deviations``."""
        signals: list[torch.Tensor | None] = [None] * len(self.plans)
        scores = [] if self.backend.probe is None else self.backend.probe.scores.totals()
        if scores:
            parts = _sum_over_ranks(torch.cat(scores)).split([s.numel() for s in scores])
            for (number, _), part in zip(self.probing.asked, parts, strict=True):
                signals[number] = part
        return signals

    def _with_selected(self, rows: np.ndarray, signals: list[torch.Tensor | None]) -> np.ndarray:
        """``rows`` and the rows that the policy selects; its work is counted. Here, and nowhere else, the host waits
        for the device, once for all plans."""
        policy, layout = self.policy, self.layout
        probe = self.backend.deviation
        if probe is not None and not probe.measured:
            raise RuntimeError(f"layer {probe.layer} did not report its values")
        active = np.zeros(len(layout.positions), dtype=bool)
        active[rows] = True
        asked = []
        for number, (plan, signal) in enumerate(zip(self.plans, signals, strict=True)):
            spans = layout.approximate(number)
            if not spans or (signal is None and policy.signal != "none"):
                continue
            view = replace(self._view(spans, signal), influence=self.influence[number])
            asked.append((number, view, layout.rows_of(spans), policy.select(view, plan.budget)))
        known = [~view.influence.isnan() for _, view, *_ in asked if view.influence is not None]
        masks = read_back([keep for *_, keep in asked] + known)
        for (number, *_), has_influence in zip(asked, masks[len(asked) :], strict=False):
            self.known[number] = int(has_influence.sum())
        for (number, view, reused, _), keep in zip(asked, masks, strict=False):
            chosen = reused[keep]
            if policy.interpolates:
                self._interpolate(view, reused, keep)
            active[chosen] = True
            self.selected[number] = len(chosen)
            self.work[number] += len(chosen) * (policy.until - policy.whole)
        return np.flatnonzero(active)

    def _interpolate(self, view: PromptView, rows: np.ndarray, keep: np.ndarray) -> None:
        """Carry what changes on the tokens of ``rows`` [n] that ``keep`` [n] selects over to the others of them."""
        layout, pool = self.layout, self.runner.token_to_kv_pool
        if parts := parts_of(view.offsets, keep):
            at = layout.tensor(rows)
            slots, positions = (t.index_select(0, at).long() for t in (layout.out_loc, layout.row_positions))
            buffers = pool.k_buffer, pool.v_buffer
            index = view.index.to(layout.device)
            self.backend.interpolations.append(
                Interpolation(parts, slots, positions, index, buffers, self.tools.rotary, self.tools.ops.carrier)
            )

    def _view(self, spans: list[Span], signal: torch.Tensor | None) -> PromptView:
        offsets = np.concatenate(([0], np.cumsum([s.length for s in spans])))
        index = np.concatenate([s.index + np.arange(s.length) for s in spans])
        left = np.concatenate([s.end - s.positions for s in spans])
        # What is chosen beforehand is chosen on the host.
        tensor = torch.from_numpy if signal is None else self.layout.tensor
        return PromptView(tuple(offsets.tolist()), tensor(index), tensor(left), signal)


def _sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    group = get_parallel().tp_group
    return values if group.world_size == 1 else group.all_reduce(values)


def _audited(
    original: Any, relay: RelayManager, planned: BatchPlan, relayed: Any, runner: Any, batch: Any, *args, **kwargs
) -> ModelRunnerOutput:
    """The stock forward of the whole batch, after the relayed one, whose distributions it judges."""
    rows = on_device(np.array([planned.plans[i].row for i in planned.audits]), batch.out_cache_loc.device)
    guess = relayed.next_token_logits.index_select(0, rows)
    planned.fell_back = AUDITED
    output = original(runner, batch, *args, **kwargs)

    def measured() -> list[float]:
        return divergence(guess, output.logits_output.next_token_logits.index_select(0, rows))

    relay.record_audits(planned, measured)
    return output


def relay_forward(
    original: Any,
    relay: RelayManager,
    tools: ForwardTools,
    planned: BatchPlan,
    runner: Any,
    batch: Any,
    *args,
    **kwargs,
) -> ModelRunnerOutput:
    """ModelRunner.forward of a planned batch; the stock forward of the whole batch after any host failure.

    The stock forward writes K and V of every extended row itself, so whatever was placed before is overwritten.
    """
    began = time.perf_counter()
    watch = None if relay.costs is None else relay.costs.start(runner.device)
    staged = StagedForward(tools, batch, planned)
    reason, step = None, "prepare"
    try:
        staged.prepare()
        step = "place"
        staged.place()
    except Decline as decline:
        reason = decline.reason
        relay.log_once(reason, str(decline))
    except Exception as error:
        reason = relay.failure(step, error)
    placed = time.perf_counter()
    if relay.consensus.agree(reason is None, digest_of(len(planned.plans), staged.entered)):
        try:
            with torch.no_grad():
                logits, work = staged.run()
        except Decline as decline:
            reason = decline.reason
            relay.log_once(reason, str(decline))
        except Exception as error:
            reason = relay.failure("forward", error)
        else:
            if planned.audits:
                del staged  # the stock forward needs its memory
                return _audited(original, relay, planned, logits, runner, batch, *args, **kwargs)
            runner.forward_pass_id += 1
            relay.count_work(planned, work)
            relay.stats.place_seconds += placed - began
            relay.stats.forward_seconds += time.perf_counter() - placed
            relay.stats.batch()
            if relay.costs is not None:
                relay.costs.take_relayed(watch, batch, planned.policy, planned.plans, work)
            return ModelRunnerOutput(logits_output=logits, can_run_graph=False)
    del staged  # the stock forward needs its memory, the more so if that was what failed
    planned.fell_back = reason or "ranks_disagree"
    relay.stats.fallback()
    return original(runner, batch, *args, **kwargs)
