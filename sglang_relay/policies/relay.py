"""RelayCaching as published (arXiv 2603.13289, section "selective recompute"), entered from embeddings.

Layers up to and including ``detect`` run over the whole segment: without stored hidden states the segment enters at
the embedding, and the K/V that this computes are written back, as they are closer to full prefill than the donor's.
"""

from __future__ import annotations

import torch

from sglang_relay.config import LayerRange
from sglang_relay.policies.base import Policy, SelectionView

EXPECTED_SELECTED = 0.2
"""Share of tokens that the published thresholds select (method.md: 10-25 % across the measured models)."""


class DeviationPolicy(Policy):
    name = "relay"
    selects = True

    def __init__(self, num_layers: int, layers: LayerRange, tau_dev: float, suffix: int) -> None:
        super().__init__(num_layers)
        self.whole = layers.detect + 1
        self.until = layers.end + 1
        self.tau_dev = tau_dev
        self.suffix = suffix

    @property
    def exact(self) -> bool:
        return False

    def select(self, view: SelectionView) -> torch.Tensor:
        """Tokens that deviate by ``tau_dev`` means or more, and the segment's last ``suffix`` tokens.

        Under a budget the suffix is kept first, from its end, then the largest deviations, ties by position.
        """
        tail = view.positions >= view.end - self.suffix
        keep = tail | (view.deviation >= self.tau_dev * view.deviation.mean())
        if view.budget is None:
            return keep
        limit = max(1, int(view.budget * keep.numel()))
        if int(keep.sum()) <= limit:
            return keep
        nearest = 3.0 + torch.arange(keep.numel(), device=keep.device) / keep.numel()  # above every deviation
        ranked = torch.argsort(torch.where(tail, nearest, view.deviation), descending=True, stable=True)
        capped = torch.zeros_like(keep)
        capped[ranked[:limit]] = True
        return capped & keep

    def expected_share(self) -> float:
        return (self.whole + EXPECTED_SELECTED * (self.until - self.whole)) / self.num_layers
