"""Tokens that the consumer itself looks at (design: policy-study.md, "The probe policy").

The prompt's last fresh tokens run once over the donors' KV; what they attend to, weighted by depth and by the norm of
the values, says which reused tokens matter for this prompt. These are recomputed from their embeddings, and what
changes on them is interpolated to the others (attention/interpolation.py).
"""

from __future__ import annotations

import torch

from sglang_relay.budget import NAMED, Budget
from sglang_relay.policies.base import Policy, PromptView, largest

SPREAD = 0.5
"""Power of the score where changes are interpolated: tokens are then wanted for what they show, too, and not only for
what they weigh. Chosen on the development chains of both models (docs/fidelity.md)."""
PRIOR_OFFSET = 4
PRIOR_EXPONENT = -0.35
"""Deviation falls with the distance from a segment's start (policy-study.md, "What else was learnt")."""


class Probe(Policy):
    name = "probe"
    signal = "probe"
    interpolates = True
    follows_quotes = True
    budgets = ("share", "tokens", "coverage")
    default_budget: Budget = Budget("share", NAMED["default"])
    whole = 0

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self.until = num_layers

    def select(self, view: PromptView, budget: Budget | None) -> torch.Tensor:
        """One ranking over all segments of the prompt."""
        signal, prior = view.signal_or_raise(), (view.index + PRIOR_OFFSET).float() ** PRIOR_EXPONENT
        score = signal ** (SPREAD if self.interpolates else 1.0) * prior
        budget = budget or self.default_budget
        keep = largest(score, budget.limit(score.numel(), view.segments))
        if budget.kind != "coverage":
            return keep
        ranked = torch.argsort(score, descending=True, stable=True)
        mass = (signal * prior)[ranked].double()
        keep[ranked] = torch.cumsum(mass, 0) - mass < budget.amount * mass.sum()
        return keep

    def expected_share(self, budget: Budget | None) -> float:
        return (budget or self.default_budget).expected_share()


class ProbeOnly(Probe):
    """As the study had it: what is not recomputed keeps the donor's KV."""

    name = "probe_only"
    interpolates = False
    follows_quotes = False
