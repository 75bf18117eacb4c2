"""RMSNorm, SiLU-and-mul and rotary embedding in few PyTorch calls, registered with SGLang's fused-op dispatch.

A decoded token of a small model spends a third of its time in element-wise ops, each call a few microseconds of
dispatch for almost no arithmetic; fewer calls is what counts. Rounding follows SGLang's CUDA kernels: fp32 inside,
one rounding at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / rms(x) * weight`` over the last dimension, computed in fp32, returned in x's dtype."""
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``(rms_norm(x + residual), x + residual)`` in x's dtype; the norm sees the sum before it is rounded."""
    if x.dtype == torch.float32:
        total = x + residual
        return F.rms_norm(total, (x.shape[-1],), weight, eps), total
    total = x.float().add_(residual)
    return F.rms_norm(total, (x.shape[-1],), weight.float(), eps).to(x.dtype), total.to(x.dtype)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` for ``x = [..., gate | up]``, both halves of equal width."""
    half = x.shape[-1] // 2
    if x.dtype == torch.float32:
        return F.silu(x[..., :half]).mul_(x[..., half:])
    return F.silu(x[..., :half].float()).mul_(x[..., half:]).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, neox: bool) -> torch.Tensor:
    """Rotary embedding of the first ``2 * cos.shape[-1]`` elements of each head; the others pass through.

    Args:
        x: ``[tokens, heads, head_dim]``, any strides.
        cos, sin: fp32 ``[tokens, 1, rotary_dim / 2]``.
        neox: pair element i with ``i + rotary_dim / 2``; otherwise 2i with 2i + 1 (GPT-J).

    Returns:
        A new contiguous tensor of x's shape and dtype.
    """
    half = cos.shape[-1]
    x32 = x if x.dtype == torch.float32 else x.float()
    out = torch.empty(x.shape, dtype=torch.float32)
    if neox:
        first, second = slice(0, half), slice(half, 2 * half)
    else:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    a, b = x32[..., first], x32[..., second]
    torch.mul(a, cos, out=out[..., first]).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out[..., second]).addcmul_(a, sin)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x32[..., 2 * half :]
    return out if x.dtype == torch.float32 else out.to(x.dtype)


def register(dispatch_key: str) -> None:
    """Make SGLang dispatch its ops to the functions above on the platform with this key."""
    from sglang.kernels.fused_op import BaseFusedOp
    from sglang.srt.layers.activation import SiluAndMul
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    BaseFusedOp.register_oot_forward(RMSNorm, _forward_rms_norm, dispatch_key)
    BaseFusedOp.register_oot_forward(SiluAndMul, _forward_silu_and_mul, dispatch_key)
    # Dispatch looks up the exact class. Every subclass that only changes the tables shares the base's forward.
    pending: list[type] = [RotaryEmbedding]
    while pending:
        cls = pending.pop()
        pending.extend(cls.__subclasses__())
        if cls.forward_native is RotaryEmbedding.forward_native:
            BaseFusedOp.register_oot_forward(cls, _forward_rotary, dispatch_key)


def _forward_rms_norm(self, x, residual=None, post_residual_addition=None, quant_linear=None):
    """`RMSNorm.forward`; the rarer options of the class are left to SGLang's own reference."""
    weight = self.weight
    if (
        post_residual_addition is not None
        or self.variance_size_override is not None
        or self.cast_x_before_out_mul
        or self.fp32_residual
        or self.override_orig_dtype is not None
        or weight.dtype != x.dtype
        or (residual is not None and residual.dtype != x.dtype)
    ):
        return self.forward_native(x, residual, post_residual_addition, quant_linear)
    if residual is None:
        return rms_norm(x, weight, self.variance_epsilon)
    return add_rms_norm(x, residual, weight, self.variance_epsilon)


def _forward_silu_and_mul(self, x):
    """`SiluAndMul.forward`."""
    return silu_and_mul(x)


def _forward_rotary(self, positions, query, key, offsets=None, fused_set_kv_buffer_arg=None):
    """`RotaryEmbedding.forward`; returns new tensors, as the reference does, in the shapes of `query` and `key`."""
    assert fused_set_kv_buffer_arg is None, "this platform writes the KV cache in the attention backend"
    if offsets is not None:
        positions = positions + offsets
    tokens = positions.numel()
    cos, sin = self.cos_sin_cache.index_select(0, positions.flatten()).float().unsqueeze(1).chunk(2, dim=-1)
    return tuple(
        rotate(x.view(tokens, -1, self.head_size), cos, sin, neox=self.is_neox_style).view(x.shape)
        for x in (query, key)
    )
