"""Attention of an arbitrary sorted set of query positions over a request's KV, masked by absolute position."""

from sglang_relay.attention.engines import AttentionEngine, Heads, StageAttention, TorchAttention, choose_engine
from sglang_relay.attention.influence import attention_mass
from sglang_relay.attention.interpolation import Interpolation, parts_of
from sglang_relay.attention.scores import ProbeRows, plan_probe, probe_scores
from sglang_relay.attention.torch_sdpa import Sequence, attend, plan_attention

__all__ = [
    "AttentionEngine",
    "Heads",
    "Interpolation",
    "ProbeRows",
    "Sequence",
    "StageAttention",
    "TorchAttention",
    "attend",
    "attention_mass",
    "choose_engine",
    "parts_of",
    "plan_attention",
    "plan_probe",
    "probe_scores",
]
