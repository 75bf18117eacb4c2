"""Recompute policies: which reused tokens run again, and through which layers."""

from sglang_relay.config import LayerRange
from sglang_relay.policies.base import Policy, SelectionView
from sglang_relay.policies.full import Full
from sglang_relay.policies.relay import DeviationPolicy
from sglang_relay.policies.rotate import Rotate

__all__ = ["Policy", "SelectionView", "make_policy"]


def make_policy(name: str, *, num_layers: int, layers: LayerRange, tau_dev: float, suffix: int) -> Policy:
    """The policy called ``name`` (one of ``config.POLICIES``) for a model of ``num_layers`` layers."""
    if name == "rotate":
        return Rotate(num_layers)
    if name == "full":
        return Full(num_layers)
    return DeviationPolicy(num_layers, layers, tau_dev, suffix)
