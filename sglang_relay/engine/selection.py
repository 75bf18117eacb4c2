"""Which reused tokens of a batch run again: what the first layers or a probe pass measure about them, summed over the
ranks, what the policy selects from it, and what changes on the selected tokens, carried over to the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from sglang_relay.attention import Interpolation, parts_of
from sglang_relay.engine.backend import AttentionProbe, DeviationProbe, RelayAttentionBackend
from sglang_relay.engine.collectives import sum_over_ranks
from sglang_relay.engine.layout import Layout, Span
from sglang_relay.engine.probing import ProbePass
from sglang_relay.engine.tools import ForwardTools
from sglang_relay.policies import KEYS_AND_VALUES, Policy, PromptView, row_layers
from sglang_relay.transfer import read_back

if TYPE_CHECKING:
    from collections.abc import Callable

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


class _Sum:
    """Of what the ranks measure, float32 [n], in memory that was taken when all of them could still leave: until it is
    summed nothing may fail on one rank alone."""

    def __init__(self, length: int, device: torch.device) -> None:
        self.values = torch.zeros(length, dtype=torch.float32, device=device)
        self.failure: Exception | None = None

    def over_ranks(self, measured: Callable[[], torch.Tensor]) -> None:
        """A collective. A rank that fails to read what it ``measured`` takes part with what is there."""
        try:
            self.values.copy_(measured())
        except Exception as error:
            self.failure = error
        self.values = sum_over_ranks(self.values)

    def read(self) -> torch.Tensor:
        """Raises on the ranks that failed."""
        if self.failure is not None:
            raise self.failure
        return self.values


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
        self._signal: _Sum | None = None
        self._influence: _Sum | None = None
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
            self._signal = _Sum(len(index) + 1, layout.device)
            if self._tools.influence is not None and self._policy.reads_influence:
                self._influence = _Sum(len(index), layout.device)

    def measure_attention(self, probing: ProbePass) -> None:
        """Of the queries of ``probing`` to the reused tokens, in all layers."""
        tools, layers = self._tools, self._policy.num_layers
        asked = [queries for _, queries in probing.asked]
        scores = tools.ops.probe.plan(asked, dtype=tools.runner.dtype, device=self._layout.device)
        self._backend.probe = AttentionProbe(scores, layers)
        self._probing = probing
        if asked:
            self._signal = _Sum(sum(len(queries.wanted) for queries in asked), self._layout.device)
        for number, queries in probing.asked:
            self.charge(number, len(queries.rows) * row_layers(layers))
        for number, rows in enumerate(probing.repeated):
            self.charge(number, rows * layers)

    def collect(self) -> None:
        """Sum over the ranks what they measured. Collectives, and nothing else that could fail: a rank whose
        measurement failed takes part, and is found out by the agreement after it (``with_selected`` raises)."""
        probe, deviation = self._backend.probe, self._backend.deviation
        if self._signal is not None and probe is not None:
            self._signal.over_ranks(lambda: torch.cat(probe.scores.totals()))
        elif self._signal is not None and deviation is not None:
            self._signal.over_ranks(lambda: _with_heads(deviation))
        self._backend.probe = None
        if self._influence is not None and (collected := self._tools.influence) is not None:
            self._influence.over_ranks(lambda: self._own_influence(collected))

    def _own_influence(self, collected: Influence) -> torch.Tensor:
        """float32 [n]: what the donors' tokens received while they were decoded, over this rank's heads; NaN for those
        without."""
        return collected.of(self._layout.donor_slots(self._layout.approximate()))

    def _signals(self) -> list[torch.Tensor | None]:
        """Per plan, over the heads of all ranks and equal on all of them, float32 [n]: mean of 1 - cosine over the KV
        heads, or the probe's scores; None for plans without (that do not end here)."""
        signals: list[torch.Tensor | None] = [None] * len(self._spans)
        if self._signal is None:
            return signals
        summed = self._signal.read()
        if self._probing is None:
            return self._by_plan(summed[:-1] / summed[-1])
        parts = summed.split([len(queries.wanted) for _, queries in self._probing.asked])
        for (number, _), part in zip(self._probing.asked, parts, strict=True):
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
        asked, signals = [], self._signals()
        influences = [None] * len(signals) if self._influence is None else self._by_plan(self._influence.read())
        for number, (spans, plan) in enumerate(zip(self._spans, self._layout.plans, strict=True)):
            if spans and (signals[number] is not None or self._policy.signal == "none"):
                view = self._view(spans, signals[number], influences[number])
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


def _with_heads(probe: DeviationProbe) -> torch.Tensor:
    """float32 [n + 1]: this rank's sums, and over how many KV heads they go."""
    return torch.cat((probe.distance_sum, probe.distance_sum.new_full((1,), probe.heads)))
