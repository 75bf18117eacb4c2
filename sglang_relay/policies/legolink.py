"""The first tokens of every segment, through all layers (EPIC / LegoLink, Hu et al., ICML 2025)."""

import torch

from sglang_relay.budget import Budget
from sglang_relay.policies.base import Policy, PromptView


class LegoLink(Policy):
    """A segment starts where its donor's text starts in the prompt: a run that goes on behind a few other tokens has no
    first tokens of its own."""

    name = "legolink"
    signal = "none"
    budgets = ("tokens",)
    default_budget: Budget = Budget("tokens", 16)
    whole = 0

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self.until = num_layers

    def select(self, view: PromptView, budget: Budget | None) -> torch.Tensor:
        return view.index < int((budget or self.default_budget).amount)

    def expected_share(self, budget: Budget | None) -> float:
        return 0.05
