"""Which reused tokens of a batch run again: what the first layers or a probe pass measure about them, summed over the
ranks, what the policy selects from it, and what changes on the selected tokens, carried over to the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from sglang.srt.runtime_context import get_parallel

from sglang_relay.attention import Interpolation, parts_of
from sglang_relay.engine.backend import AttentionProbe, DeviationProbe, RelayAttentionBackend
from sglang_relay.engine.layout import Layout, Span
from sglang_relay.engine.probing import ProbePass
from sglang_relay.engine.tools import ForwardTools
from sglang_relay.policies import KEYS_AND_VALUES, Policy, PromptView, row_layers
from sglang_relay.transfer import read_back

if TYPE_CHECKING:
    from sglang_relay.engine.influence import Influence


class Work(NamedTuple):
    """What one plan's repair took. selected: reused tokens that the policy chose; layers: token-layers that ran on
    account of the repair, probe pass and rows of earlier chunks included, and `KEYS_AND_VALUES` of one for a row that
    ends with these; influence: reused tokens that have one; unselected: reused tokens that keep what was placed or
    interpolated, None where nobody asks for them; entered: whether reused tokens entered with stored hidden states."""

    selected: int
    layers: float
    influence: int
    unselected: Unselected | None
    entered: bool


class Unselected(NamedTuple):
    """positions: int64 numpy [n], ascending, in the prompt; slots: int64 [n], the request's own KV slots of them."""

    positions: np.ndarray
    slots: torch.Tensor


class _Asked(NamedTuple):
    """What the policy was asked about one plan: rows [n] of the layout; keep: bool [n], its answer, not read yet."""

    plan: int
    view: PromptView
    rows: np.ndarray
    keep: torch.Tensor


class Selection:
    """One forward's. First what will be measured is asked for (``measure_*``), then, behind the layers that measure it,
    ``collect`` and ``with_selected``; a policy without a signal needs the last one only."""

    def __init__(self, tools: ForwardTools, policy: Policy, layout: Layout, backend: RelayAttentionBackend) -> None:
        self._tools = tools
        self._policy = policy
        self._layout = layout
        self._backend = backend
        plans = len(layout.plans)
        self._spans = [layout.approximate(number) for number in range(plans)]
        self._signals: list[torch.Tensor | None] = [None] * plans
        self._influence: list[torch.Tensor | None] = [None] * plans
        self._probing: ProbePass | None = None
        self._selected = [0] * plans
        self._layers = [0.0] * plans
        self._known = [0] * plans
        self._unselected: list[Unselected | None] = [None] * plans

    def charge(self, number: int, layers: float) -> None:
        """Plan ``number`` runs that many token-layers on account of its repair."""
        self._layers[number] += layers

    def ends_early(self, rows: np.ndarray) -> None:
        """Of the last layer, only K and V of ``rows`` are computed; those of a repair are charged with all of it."""
        layout = self._layout
        charged = layout.fresh & (layout.positions < layout.prefixes[layout.owner])
        charged[layout.rows_of(layout.approximate())] = True
        ended = np.bincount(layout.owner[rows[charged[rows]]], minlength=len(layout.starts) - 1)
        for number, plan in enumerate(layout.plans):
            self.charge(number, -(1 - KEYS_AND_VALUES) * int(ended[plan.row]))

    def work(self, *, entered: bool) -> list[Work]:
        """Per plan."""
        counts = zip(self._selected, self._layers, self._known, self._unselected, strict=True)
        return [Work(*of_plan, entered) for of_plan in counts]

    # ------------------------------------------------------------------ measure

    def measure_deviation(self, rows: np.ndarray) -> None:
        """Of the reused tokens, in the last layer of a stage of ``rows`` that runs over all of them."""
        layout, spans = self._layout, self._layout.approximate()
        if spans:
            index = layout.tensor(np.searchsorted(rows, layout.rows_of(spans)))
            heads, donors = self._tools.runner.token_to_kv_pool.head_num, layout.donor_slots(spans)
            self._backend.deviation = DeviationProbe(self._policy.detect, heads, index, donors)

    def measure_attention(self, probing: ProbePass) -> None:
        """Of the queries of ``probing`` to the reused tokens, in all layers."""
        tools, layers = self._tools, self._policy.num_layers
        asked = [queries for _, queries in probing.asked]
        scores = tools.ops.probe.plan(asked, dtype=tools.runner.dtype, device=self._layout.device)
        self._backend.probe = AttentionProbe(scores, layers)
        self._probing = probing
        for number, queries in probing.asked:
            self.charge(number, len(queries.rows) * row_layers(layers))
        for number, rows in enumerate(probing.repeated):
            self.charge(number, rows * layers)

    def collect(self) -> None:
        """Sum over the ranks what they measured. Collectives: a rank whose measurement failed takes part with zeros,
        and is found out by the agreement after it."""
        if self._policy.probes:
            self._signals = self._attention_scores()
            self._backend.probe = None
            return
        self._signals = self._deviations()
        if self._tools.influence is not None and self._policy.reads_influence:
            self._influence = self._influences(self._tools.influence)

    def _deviations(self) -> list[torch.Tensor | None]:
        """Per plan, float32 [n]: mean of 1 - cosine over the KV heads of all ranks, equal on all of them."""
        probe = self._backend.deviation
        if probe is None:
            return [None] * len(self._spans)
        heads = probe.distance_sum.new_full((1,), probe.heads)
        packed = _sum_over_ranks(torch.cat((probe.distance_sum, heads)))
        return self._by_plan(packed[:-1] / packed[-1])

    def _influences(self, collected: Influence) -> list[torch.Tensor | None]:
        """Per plan, float32 [n]: what the donors' tokens received while they were decoded, over the heads of all ranks;
        NaN for those without."""
        spans = self._layout.approximate()
        if not spans:
            return [None] * len(self._spans)
        return self._by_plan(_sum_over_ranks(collected.of(self._layout.donor_slots(spans))))

    def _attention_scores(self) -> list[torch.Tensor | None]:
        """Per plan, float32 [n]: the probe's scores over the heads of all ranks; None for plans that do not end
        here."""
        signals: list[torch.Tensor | None] = [None] * len(self._spans)
        probe, probing = self._backend.probe, self._probing
        scores = [] if probe is None else probe.scores.totals()
        if scores and probing is not None:
            parts = _sum_over_ranks(torch.cat(scores)).split([s.numel() for s in scores])
            for (number, _), part in zip(probing.asked, parts, strict=True):
                signals[number] = part
        return signals

    def _by_plan(self, values: torch.Tensor) -> list[torch.Tensor | None]:
        return list(values.split([sum(s.length for s in spans) for spans in self._spans]))

    # ------------------------------------------------------------------ select

    def with_selected(self, rows: np.ndarray) -> np.ndarray:
        """``rows`` and the rows that the policy selects, ascending; what those will run is counted. Here, and nowhere
        else in a pass, the host waits for the device, once for all plans."""
        policy = self._policy
        probe = self._backend.deviation
        if probe is not None and not probe.measured:
            raise RuntimeError(f"layer {probe.layer} did not report its values")
        asked = self._ask()
        known = [~a.view.influence.isnan() for a in asked if a.view.influence is not None]
        masks = read_back([a.keep for a in asked] + known)
        for a, has_influence in zip(asked, masks[len(asked) :], strict=False):
            self._known[a.plan] = int(has_influence.sum())
        active = np.zeros(len(self._layout.positions), dtype=bool)
        active[rows] = True
        for a, keep in zip(asked, masks, strict=False):
            chosen = a.rows[keep]
            if policy.interpolates:
                self._interpolate(a.view, a.rows, keep)
            active[chosen] = True
            if policy.follows_quotes:
                rest = a.rows[~keep]
                slots = self._layout.out_loc.index_select(0, self._layout.tensor(rest)).long()
                self._unselected[a.plan] = Unselected(self._layout.positions[rest], slots)
            self._selected[a.plan] = len(chosen)
            self.charge(a.plan, len(chosen) * (policy.until - policy.whole))
        return np.flatnonzero(active)

    def _ask(self) -> list[_Asked]:
        asked = []
        for number, (spans, plan) in enumerate(zip(self._spans, self._layout.plans, strict=True)):
            if spans and (self._signals[number] is not None or self._policy.signal == "none"):
                view = self._view(spans, self._signals[number], self._influence[number])
                keep = self._policy.select(view, plan.budget)
                asked.append(_Asked(number, view, self._layout.rows_of(spans), keep))
        return asked

    def _view(self, spans: list[Span], signal: torch.Tensor | None, influence: torch.Tensor | None) -> PromptView:
        offsets = np.concatenate(([0], np.cumsum([s.length for s in spans])))
        index = np.concatenate([s.index + np.arange(s.length) for s in spans])
        left = np.concatenate([s.end - s.positions for s in spans])
        # What is chosen beforehand is chosen on the host.
        tensor = torch.from_numpy if signal is None else self._layout.tensor
        return PromptView(tuple(offsets.tolist()), tensor(index), tensor(left), signal, influence)

    def _interpolate(self, view: PromptView, rows: np.ndarray, keep: np.ndarray) -> None:
        """Carry what changes on the tokens of ``rows`` [n] that ``keep`` [n] selects over to the others of them."""
        layout, tools = self._layout, self._tools
        if parts := parts_of(view.offsets, keep):
            at, pool = layout.tensor(rows), tools.runner.token_to_kv_pool
            slots, positions = (t.index_select(0, at).long() for t in (layout.out_loc, layout.row_positions))
            buffers = pool.k_buffer, pool.v_buffer
            index = view.index.to(layout.device)
            self._backend.interpolations.append(
                Interpolation(parts, slots, positions, index, buffers, tools.rotary, tools.ops.carrier)
            )


def _sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    group = get_parallel().tp_group
    return values if group.world_size == 1 else group.all_reduce(values)
