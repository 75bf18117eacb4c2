"""The tokens that deviate most at layer 1 (CacheBlend, Yao et al., EuroSys 2025), one ranking per prompt."""

import torch

from sglang_relay.budget import Budget
from sglang_relay.policies.base import Policy, PromptView, largest


class CacheBlend(Policy):
    name = "cacheblend"
    signal = "deviation"
    budgets = ("share", "tokens")
    default_budget: Budget = Budget("share", 0.15)

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self.whole = min(2, num_layers)
        self.until = num_layers

    def select(self, view: PromptView, budget: Budget | None) -> torch.Tensor:
        deviation = view.signal_or_raise()
        return largest(deviation, (budget or self.default_budget).limit(deviation.numel(), view.segments))

    def expected_share(self, budget: Budget | None) -> float:
        share = (budget or self.default_budget).expected_share()
        return (self.whole + share * (self.until - self.whole)) / self.num_layers
