"""RelayCaching as published (arXiv 2603.13289, section "selective recompute"), entered from embeddings.

Layers up to and including ``detect`` run over the whole segment: without stored hidden states the segment enters at
the embedding, and the K/V that this computes are written back, as they are closer to full prefill than the donor's.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from sglang_relay.budget import Budget
from sglang_relay.config import LayerRange
from sglang_relay.policies.base import Policy, PromptView, largest

EXPECTED_SELECTED = 0.2
"""Share of tokens that the published thresholds select (method.md: 10-25 % across the measured models)."""


class DeviationPolicy(Policy):
    """Thresholds and budget hold per segment."""

    name = "relay"
    signal = "deviation"
    budgets = ("share", "tokens")

    def __init__(self, num_layers: int, layers: LayerRange, tau_dev: float, suffix: int) -> None:
        super().__init__(num_layers)
        self.whole = layers.detect + 1
        self.until = layers.end + 1
        self.tau_dev = tau_dev
        self.suffix = suffix

    @property
    def exact(self) -> bool:
        return False

    def select(self, view: PromptView, budget: Budget | None) -> torch.Tensor:
        deviation = view.signal_or_raise()
        parts = [slice(a, b) for a, b in pairwise(view.offsets)]
        return torch.cat([self._of_segment(deviation[p], view.left[p], budget) for p in parts])

    def _of_segment(self, deviation: torch.Tensor, left: torch.Tensor, budget: Budget | None) -> torch.Tensor:
        """Tokens that deviate by ``tau_dev`` means or more, and the segment's last ``suffix`` tokens.

        Under a budget the suffix is kept first, from its end, then the largest deviations, ties by position.
        """
        tail = left <= self.suffix
        keep = tail | (deviation >= self.tau_dev * deviation.mean())
        if budget is None:
            return keep
        nearest = 3.0 + torch.arange(keep.numel(), device=keep.device) / keep.numel()  # above every deviation
        return largest(torch.where(tail, nearest, deviation), budget.limit(keep.numel(), 1)) & keep

    def expected_share(self, budget: Budget | None) -> float:
        return (self.whole + EXPECTED_SELECTED * (self.until - self.whole)) / self.num_layers
