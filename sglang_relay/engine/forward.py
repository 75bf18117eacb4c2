"""The staged forward of a relayed batch: place donor KV, then run layer ranges over shrinking sets of rows.

Stages are calls of ``model.forward_split_prefill`` (models/llama.py and 12 more), not hooks on the layers. A hook that
swaps rows has to replace the positions of every later layer, needs a special case after the last layer, stays
installed while the server decodes, and when it does not fire nobody notices. A stage is a plain call with its own
ForwardBatch; the one that ends with the last layer also runs the final norm and the logits, which read the last row of
each request, fresh in every stage. Between two calls the rows move through the residual stream's own export and
hand-off, which complete an all-reduce that tensor parallelism may still owe. The price: models without the method are
served stock, by name (``model_without_layer_split``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.layers.layer_boundary.residual import batch as residual_batch
from sglang.srt.layers.layer_boundary.residual.add_norm import PLAIN_ADD
from sglang.srt.layers.layer_boundary.residual.stream import ResidualStream
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_executor.model_runner import ModelRunnerOutput
from sglang.srt.runtime_context import get_model, get_parallel
from sglang_relay_kernels.realign import realign  # pyright: ignore[reportMissingImports]

from sglang_relay.attention import Sequence, plan_attention
from sglang_relay.engine.backend import DeviationProbe, RelayAttentionBackend
from sglang_relay.plan import Decline
from sglang_relay.policies import SelectionView

if TYPE_CHECKING:
    from collections.abc import Callable

    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_relay.engine.manager import BatchPlan, RelayManager
    from sglang_relay.rotary import DeltaRotary


@dataclass(slots=True)
class _Reused:
    """Reused tokens of one segment, in rows of the batch. rows, source: int64 numpy [n]."""

    plan: int
    rows: np.ndarray
    positions: np.ndarray
    source: np.ndarray
    slots: torch.Tensor
    exact: bool
    end: int
    budget: float | None


class StagedForward:
    """One relay forward. ``prepare`` and ``place`` may fail on one rank alone, so the ranks agree after them; ``run``
    holds the model's collectives, and agrees wherever the relay's own code ran between them."""

    def __init__(self, runner: Any, batch: ForwardBatch, planned: BatchPlan, rotary: DeltaRotary) -> None:
        self.runner = runner
        self.batch = batch
        self.policy = planned.policy
        self.plans = planned.plans
        self.rotary = rotary
        self.layers = runner.model_config.num_hidden_layers
        self.device = batch.out_cache_loc.device

    # ------------------------------------------------------------------ prepare

    def prepare(self) -> None:
        """Lay out rows and plan the first stage. Raises Decline when the batch is not what was planned."""
        batch = self.batch
        if not batch.forward_mode.is_extend() or batch.extend_seq_lens_cpu is None:
            raise Decline("unexpected_forward_mode", str(batch.forward_mode))
        lens, prefixes = list(batch.extend_seq_lens_cpu), list(batch.extend_prefix_lens_cpu or ())
        if len(lens) != batch.batch_size or len(prefixes) != len(lens) or sum(lens) != batch.input_ids.shape[0]:
            raise Decline("unexpected_batch_shape", f"{lens} {prefixes} {tuple(batch.input_ids.shape)}")
        self.starts = np.concatenate(([0], np.cumsum(lens))).astype(np.int64)
        self.positions = np.concatenate([np.arange(p, p + n) for p, n in zip(prefixes, lens, strict=True)])
        self.owner = np.repeat(np.arange(len(lens)), lens)
        self.reused: list[_Reused] = []
        copied = np.zeros(len(self.positions), dtype=bool)
        exact = np.zeros(len(self.positions), dtype=bool)
        for number, plan in enumerate(self.plans):
            if prefixes[plan.row] != plan.prefix or lens[plan.row] != plan.stop - plan.prefix:
                raise Decline("unexpected_batch_shape", f"row {plan.row} extends {prefixes[plan.row]}+{lens[plan.row]}")
            for s in plan.segments:
                rows = np.arange(s.start, s.stop) - plan.prefix + self.starts[plan.row]
                copied[rows] = True
                exact[rows] = s.exact
                source = np.arange(s.source, s.source + s.length)
                positions = np.arange(s.start, s.stop)
                self.reused.append(_Reused(number, rows, positions, source, s.slots, s.exact, s.end, plan.budget))
        self.fresh = np.flatnonzero(~copied)
        self.whole = np.flatnonzero(~exact)
        table = self.runner.req_to_token_pool.req_to_token
        ends = [p + n for p, n in zip(prefixes, lens, strict=True)]
        self.slots = [table[row, :end].long() for row, end in zip(self._pool_rows(), ends, strict=True)]
        source = np.concatenate([r.source for r in self.reused])
        target = np.concatenate([r.positions for r in self.reused])
        if max(source.max(), target.max()) >= self.rotary.positions:
            raise Decline("rotary_table_short", f"position {max(source.max(), target.max())}")
        self.source, self.target = self._tensor(source), self._tensor(target)
        first = self.fresh if self.policy.whole == 0 else self.whole
        self.backend = RelayAttentionBackend(self.runner)
        self.first = first, self._attention(first)
        if self.policy.selects:
            self._prepare_probe()

    def _pool_rows(self) -> list[int]:
        """Rows of the requests in req_to_token; from the host's copy where it is complete, which spares a sync."""
        batch = self.batch
        known = batch.req_pool_indices_cpu
        complete = known is not None and len(known) == batch.batch_size
        return (known if complete else batch.req_pool_indices).tolist()  # type: ignore[union-attr]

    def _prepare_probe(self) -> None:
        repaired = [r for r in self.reused if not r.exact]
        if repaired:
            rows = np.searchsorted(self.whole, np.concatenate([r.rows for r in repaired]))
            slots = torch.cat([r.slots for r in repaired]).to(self.device)
            heads = self.runner.token_to_kv_pool.head_num
            self.backend.probe = DeviationProbe(self.policy.whole - 1, heads, self._tensor(rows), slots)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64)).to(self.device, non_blocking=True)

    def _attention(self, rows: np.ndarray) -> Any:
        cuts = np.searchsorted(rows, self.starts)
        sequences = []
        for i, slots in enumerate(self.slots):
            positions = self.positions[rows[cuts[i] : cuts[i + 1]]]
            if not len(positions):
                raise Decline("empty_stage", f"request {i} has no active row")
            sequences.append(Sequence(positions, slots[: int(positions[-1]) + 1]))
        return plan_attention(sequences, dtype=self.runner.dtype, device=self.device)

    # ------------------------------------------------------------------ run

    @torch.no_grad()
    def place(self) -> None:
        """Copy donor K and V to the requests' own slots, keys turned to their new positions, in all layers."""
        pool = self.runner.token_to_kv_pool
        source_slots = torch.cat([r.slots for r in self.reused]).to(self.device)
        rows = self._tensor(np.concatenate([r.rows for r in self.reused]))
        cos, sin = self.rotary.factors(self.source, self.target)
        realign(
            pool.k_buffer,
            pool.v_buffer,
            source_slots,
            self.batch.out_cache_loc.index_select(0, rows).long(),
            cos,
            sin,
            neox=self.rotary.neox,
            rotary_dim=self.rotary.rotary_dim,
        )

    def run(self, relay: RelayManager) -> tuple[Any, list[int]]:
        """Returns the logits output and, per plan, how many of its reused tokens the policy selected.

        Between the layers nothing of the relay raises, and after each stage the ranks agree, so that all of them leave
        at the same point. Raises Decline on every rank when one of them failed or selected other rows.
        """
        policy = self.policy
        counts = [0] * len(self.plans)
        stage = _Stage(self, self.first[0], self.first[1])
        done = policy.whole or self.layers
        output = stage.layers(0, done)
        if policy.selects and done < self.layers:
            deviation = self._deviation()
            stage = self._next(relay, stage, lambda: self._select(deviation, counts))
            if policy.until > done:
                output = stage.layers(done, policy.until)
                done = policy.until
                if done < self.layers:
                    stage = self._next(relay, stage, lambda: self.fresh)
        if done < self.layers:
            output = stage.layers(done, self.layers)
        self._agree(relay, None, len(counts))
        return output, counts

    def _next(self, relay: RelayManager, before: _Stage, rows: Callable[[], np.ndarray]) -> _Stage:
        """The stage that goes on with ``rows()``, a subset of the rows of ``before``; the same on every rank."""
        stage, failure, digest = before, None, 0
        if self.backend.failure is None:
            try:
                active = rows()
                stage = _Stage(self, active, self._attention(active))
                digest = int(np.dot(active, np.arange(1, len(active) + 1)) & ((1 << 62) - 1))
            except Exception as error:
                failure = relay.failure("select", error)
        self._agree(relay, failure, digest)
        state = before.export()
        try:
            stage.take_over(before, *state)
        except Exception as error:
            failure = relay.failure("hand_over", error)
        self._agree(relay, failure, digest)
        return stage

    def _agree(self, relay: RelayManager, failure: str | None, digest: int) -> None:
        """All ranks came this far with the same ``digest``; else Decline on all of them."""
        if self.backend.failure is not None:
            failure = relay.failure("attention", self.backend.failure)
        if not relay.consensus.agree(failure is None, digest):
            raise Decline(failure or "ranks_disagree", "one rank failed, or the selected rows differ")

    def _deviation(self) -> torch.Tensor | None:
        """float32 [n]: 1 - mean cosine over the KV heads of all ranks, equal on all of them; None without reused rows.

        A collective: a rank whose measurement failed takes part with zeros, and is found out by the agreement after it.
        """
        probe = self.backend.probe
        if probe is None:
            return None
        group = get_parallel().tp_group
        if group.world_size == 1:
            return 1.0 - probe.cosine_sum / probe.heads
        packed = torch.cat((probe.cosine_sum, probe.cosine_sum.new_tensor([float(probe.heads)])))
        packed = group.all_reduce(packed)
        return 1.0 - packed[:-1] / packed[-1]

    def _select(self, deviation: torch.Tensor | None, counts: list[int]) -> np.ndarray:
        """Rows active after the whole-segment stage: fresh ones and those the policy selects."""
        probe = self.backend.probe
        if probe is None or deviation is None:
            return self.fresh
        if not probe.measured:
            raise RuntimeError(f"layer {probe.layer} did not report its values")
        active = np.zeros(len(self.positions), dtype=bool)
        active[self.fresh] = True
        at = 0
        for r in (r for r in self.reused if not r.exact):
            part = deviation[at : at + len(r.rows)]
            at += len(r.rows)
            keep = self.policy.select(SelectionView(part, self._tensor(r.positions), r.end, r.budget))
            chosen = r.rows[keep.cpu().numpy()]
            active[chosen] = True
            counts[r.plan] += len(chosen)
        return np.flatnonzero(active)


class _Stage:
    """A set of rows that runs through a range of layers; may take the rows' state over from the stage before it."""

    def __init__(self, forward: StagedForward, rows: np.ndarray, attention: Any) -> None:
        self.forward = forward
        self.rows = rows
        self.attention = attention
        self.batch = self._batch()

    def _batch(self) -> ForwardBatch:
        f, full = self.forward, self.forward.batch
        whole = len(self.rows) == len(f.positions)
        index = f._tensor(self.rows)

        def pick(values: torch.Tensor) -> torch.Tensor:
            return values if whole else values.index_select(0, index)

        lens = np.diff(np.searchsorted(self.rows, f.starts))
        lens_cpu = lens.tolist()
        starts = None
        if full.extend_logprob_start_lens_cpu is not None:
            # Logprob rows are counted from a chunk's end, and the rows they need are fresh in every stage.
            old = zip(full.extend_seq_lens_cpu or (), full.extend_logprob_start_lens_cpu, lens_cpu, strict=True)
            starts = [now - (n - start) for n, start, now in old]
            if min(starts) < 0:
                raise Decline("input_logprobs", "prompt logprobs inside a reused segment")
        changes: dict[str, Any] = {
            "forward_mode": ForwardMode.EXTEND,
            "input_ids": pick(full.input_ids),
            "positions": pick(full.positions),
            "out_cache_loc": pick(full.out_cache_loc),
            "extend_num_tokens": len(self.rows),
            "extend_seq_lens_cpu": lens_cpu,
            "extend_logprob_start_lens_cpu": starts,
            "hidden_states": None,
            "residual_stream": None,
        }
        for name, values in (("extend_seq_lens", lens), ("extend_start_loc", np.cumsum(lens) - lens)):
            tensor = getattr(full, name)
            if tensor is not None:
                changes[name] = f._tensor(values).to(tensor.dtype)
        if full.global_num_token_non_padded_cpu is not None:
            changes["global_num_token_non_padded_cpu"] = len(self.rows)
        for name in ("global_num_token_non_padded", "num_token_non_padded"):
            tensor = getattr(full, name)
            if tensor is not None:
                changes[name] = torch.full_like(tensor, len(self.rows))
        return replace(full, **changes)

    def export(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The rows' hidden states and residual (sglang/srt/layers/layer_boundary/residual/stream.py), once. A
        collective where an all-reduce is still owed. Raises NotImplementedError, on every rank, for a stream whose
        pending update is no plain addition."""
        stream = residual_batch.stream_of(self.batch)
        if stream.pending is None or stream.pending.update is None or not stream.pending.update.is_plain_add:
            raise NotImplementedError("residual stream is not a plain addition")
        hidden, residual = stream.export(self.batch.hidden_states)
        residual_batch.clear(self.batch)
        return hidden, residual  # type: ignore[return-value]

    def take_over(self, before: _Stage, hidden: torch.Tensor, residual: torch.Tensor | None) -> None:
        """Go on from what ``before`` exported. Both tensors are copied: the fused add + norm of the next layer writes
        the residual in place."""
        index = self.forward._tensor(np.searchsorted(before.rows, self.rows))
        hidden = hidden.index_select(0, index)
        residual = None if residual is None else residual.index_select(0, index)
        handle, self.batch.residual_stream = ResidualStream.from_handoff(hidden, residual, PLAIN_ADD)
        self.batch.hidden_states = handle  # type: ignore[assignment]

    def layers(self, start: int, stop: int) -> Any:
        """Run layers ``[start, stop)``; the logits output when ``stop`` is the number of layers, else None."""
        f, batch = self.forward, self.batch
        f.backend.stage = self.attention
        model = f.runner.model
        with (
            get_model().override(shared_experts=model.shared_experts_config),
            forward_context(ForwardContext(attn_backend=f.backend), forward_batch=batch),
        ):
            return model.forward_split_prefill(batch.input_ids, batch.positions, batch, (start, stop))


def relay_forward(
    original: Any,
    relay: RelayManager,
    rotary: DeltaRotary,
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
    staged = StagedForward(runner, batch, planned, rotary)
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
    if relay.consensus.agree(reason is None, len(planned.plans)):
        try:
            with torch.no_grad():
                logits, selected = staged.run(relay)
        except Decline as decline:
            reason = decline.reason
            relay.log_once(reason, str(decline))
        except Exception as error:
            reason = relay.failure("forward", error)
        else:
            runner.forward_pass_id += 1
            relay.count_selected(planned, selected)
            relay.stats.place_seconds += placed - began
            relay.stats.forward_seconds += time.perf_counter() - placed
            relay.stats.batch()
            return ModelRunnerOutput(logits_output=logits, can_run_graph=False)
    planned.fell_back = reason or "ranks_disagree"
    relay.stats.fallback()
    return original(runner, batch, *args, **kwargs)
