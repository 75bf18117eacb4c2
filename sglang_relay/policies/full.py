"""Recompute every reused token through the relay path: the exactness reference."""

import torch

from sglang_relay.policies.base import Policy, SelectionView


class Full(Policy):
    name = "full"
    selects = False

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self.whole = self.until = num_layers

    def select(self, view: SelectionView) -> torch.Tensor:
        return torch.ones_like(view.deviation, dtype=torch.bool)

    def expected_share(self) -> float:
        return 1.0
