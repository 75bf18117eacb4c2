"""Recompute policies: which reused tokens run again, and through which layers."""

from sglang_relay.config import RelayConfig
from sglang_relay.policies.base import KEYS_AND_VALUES, Policy, PromptView, row_layers
from sglang_relay.policies.cacheblend import CacheBlend
from sglang_relay.policies.full import Full
from sglang_relay.policies.legolink import LegoLink
from sglang_relay.policies.probe import Probe, ProbeOnly
from sglang_relay.policies.relay import DeviationPolicy
from sglang_relay.policies.rotate import Rotate

__all__ = ["KEYS_AND_VALUES", "Policy", "PromptView", "make_policies", "row_layers"]

_SIMPLE = (Probe, ProbeOnly, CacheBlend, LegoLink, Rotate, Full)


def make_policies(config: RelayConfig, num_layers: int) -> dict[str, Policy]:
    """Every policy, by name (``config.POLICIES``), for a model of ``num_layers`` layers."""
    layers = config.resolve_layer_range(num_layers)
    made: list[Policy] = [DeviationPolicy(num_layers, layers, config.tau_dev, config.tau_inf, config.suffix)]
    made += [policy(num_layers) for policy in _SIMPLE]
    return {policy.name: policy for policy in made}
