"""The tokens that deviate most at layer 1 (CacheBlend, Yao et al., EuroSys 2025), one ranking per prompt.

Layer 0 runs over every reused token, and of layer 1 what makes K and V; from its attention on only selected tokens go
on. That is the one dense layer of the published costs (.1736 at a share of .15 in 36 layers: (1 + .15 * 35) / 36); what
K and V of layer 1 take is counted on top (`KEYS_AND_VALUES`)."""

import torch

from sglang_relay.budget import Budget
from sglang_relay.policies.base import KEYS_AND_VALUES, Policy, PromptView, largest


class CacheBlend(Policy):
    name = "cacheblend"
    signal = "deviation"
    looks_ahead = True
    whole = 1
    budgets = ("share", "tokens")
    default_budget: Budget = Budget("share", 0.15)

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self.until = num_layers

    def select(self, view: PromptView, budget: Budget | None) -> torch.Tensor:
        deviation = view.signal_or_raise()
        return largest(deviation, (budget or self.default_budget).limit(deviation.numel(), view.segments))

    def expected_share(self, budget: Budget | None) -> float:
        share = (budget or self.default_budget).expected_share()
        looked = KEYS_AND_VALUES if self.until > self.whole else 0.0
        return (self.whole + looked + share * (self.until - self.whole)) / self.num_layers
