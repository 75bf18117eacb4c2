"""Attention of an arbitrary sorted set of query positions over a request's KV, masked by absolute position."""

from sglang_relay.attention.carriers import choose_carrier
from sglang_relay.attention.carry_torch import TorchCarrier
from sglang_relay.attention.engines import AttentionEngine, Heads, StageAttention, TorchAttention, choose_engine
from sglang_relay.attention.influence import attention_mass
from sglang_relay.attention.interpolation import Interpolation, parts_of
from sglang_relay.attention.torch_sdpa import Sequence, attend, plan_attention

__all__ = [
    "AttentionEngine",
    "Heads",
    "Interpolation",
    "Sequence",
    "StageAttention",
    "TorchAttention",
    "TorchCarrier",
    "attend",
    "attention_mass",
    "choose_carrier",
    "choose_engine",
    "parts_of",
    "plan_attention",
]
