"""No repair: donor KV is re-rotated and used as it is."""

import torch

from sglang_relay.policies.base import Policy, SelectionView


class Rotate(Policy):
    name = "rotate"
    selects = False
    whole = 0
    until = 0

    def select(self, view: SelectionView) -> torch.Tensor:
        return torch.zeros_like(view.deviation, dtype=torch.bool)

    def expected_share(self) -> float:
        return 0.0
