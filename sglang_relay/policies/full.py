"""Recompute every reused token through the relay path: the exactness reference."""

import torch

from sglang_relay.budget import Budget
from sglang_relay.policies.base import Policy, PromptView


class Full(Policy):
    name = "full"
    signal = "none"

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self.whole = self.until = num_layers

    def select(self, view: PromptView, budget: Budget | None) -> torch.Tensor:
        return torch.ones_like(view.index, dtype=torch.bool)

    def expected_share(self, budget: Budget | None) -> float:
        return 1.0
