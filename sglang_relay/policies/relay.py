"""RelayCaching as published (arXiv 2603.13289, section "selective recompute"; design: method.md, "When the consumer
prefills").

Layers up to and including ``detect`` run over the whole segment. It enters at layer ``start`` with the donor's hidden
states where the server keeps them (engine/hidden.py), else at the embedding; the K/V that this computes are written
back, as they are closer to full prefill than the donor's.

Selected at ``detect``: tokens of high deviation, tokens of high decode influence where it is collected, and the suffix.
Prompt tokens that a donor offers (``relay_donate: all``) have no influence: deviation alone selects them, and they are
no part of the mean.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from sglang_relay.budget import Budget
from sglang_relay.config import LayerRange
from sglang_relay.policies.base import Policy, PromptView, largest

_TINY = 1e-6
"""A threshold below counts as this one where thresholds are divided by."""
EXPECTED_SELECTED = 0.2
"""Share of tokens that the published thresholds select (method.md: 10-25 % across the measured models)."""


class DeviationPolicy(Policy):
    """Thresholds and budget hold per segment."""

    name = "relay"
    signal = "deviation"
    reads_influence = True
    budgets = ("share", "tokens")

    def __init__(self, num_layers: int, layers: LayerRange, tau_dev: float, tau_inf: float, suffix: int) -> None:
        super().__init__(num_layers)
        self.start = layers.start
        self.whole = layers.detect + 1
        self.until = layers.end + 1
        self.tau_dev = tau_dev
        self.tau_inf = tau_inf
        self.suffix = suffix

    @property
    def exact(self) -> bool:
        return False

    def select(self, view: PromptView, budget: Budget | None) -> torch.Tensor:
        deviation, influence = view.signal_or_raise(), view.influence
        parts = [slice(a, b) for a, b in pairwise(view.offsets)]
        return torch.cat(
            [
                self._of_segment(deviation[p], None if influence is None else influence[p], view.left[p], budget)
                for p in parts
            ]
        )

    def _of_segment(
        self, deviation: torch.Tensor, influence: torch.Tensor | None, left: torch.Tensor, budget: Budget | None
    ) -> torch.Tensor:
        """Tokens that deviate by ``tau_dev`` means or more, those whose influence is ``tau_inf`` means or more, and the
        segment's last ``suffix`` tokens.

        Under a budget the suffix is kept first, from its end, then what exceeds either threshold by the largest factor,
        ties by position.
        """
        tail = left <= self.suffix
        least = self.tau_dev * deviation.mean()
        keep, excess = tail | (deviation >= least), deviation / least.clamp_min(_TINY)
        if influence is not None:
            floor = self.tau_inf * influence.nanmean()
            keep |= (influence >= floor) & (influence > 0)  # NaN is not
            excess = torch.maximum(excess, (influence / floor.clamp_min(_TINY)).nan_to_num(0.0))
        if budget is None:
            return keep
        nearest = torch.arange(keep.numel(), device=keep.device).double()
        order = torch.where(tail, nearest + excess.double().max() + 1.0, excess.double())
        return largest(order, budget.limit(keep.numel(), 1)) & keep

    def expected_share(self, budget: Budget | None) -> float:
        return (self.whole - self.enters + EXPECTED_SELECTED * (self.until - self.whole)) / self.num_layers
