"""No repair: donor KV is re-rotated and used as it is."""

import torch

from sglang_relay.budget import Budget
from sglang_relay.policies.base import Policy, PromptView


class Rotate(Policy):
    name = "rotate"
    signal = "none"
    whole = 0
    until = 0

    def select(self, view: PromptView, budget: Budget | None) -> torch.Tensor:
        return torch.zeros_like(view.index, dtype=torch.bool)

    def expected_share(self, budget: Budget | None) -> float:
        return 0.0
