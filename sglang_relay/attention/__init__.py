"""Attention of an arbitrary sorted set of query positions over a request's KV, masked by absolute position."""

from sglang_relay.attention.torch_sdpa import AttentionPlan, Sequence, attend, plan_attention

__all__ = ["AttentionPlan", "Sequence", "attend", "plan_attention"]
