"""RMSNorm, SiLU-and-mul and rotary embedding in few PyTorch calls, registered with SGLang's fused-op dispatch.

A decoded token of a small model spends a third of its time in element-wise ops, each call a few microseconds of
dispatch for almost no arithmetic; fewer calls is what counts. Norms and rotations compute in fp32 and round once, like
SGLang's CUDA kernels; SiLU-and-mul rounds where SGLang's PyTorch reference does.
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
    return F.silu(x[..., :half]).mul_(x[..., half:])


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


def rotate_pair(
    query: torch.Tensor, key: torch.Tensor, head_dim: int, cos: torch.Tensor, sin: torch.Tensor, *, neox: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rotate` for query and key, in one go where they lie side by side, as the two parts of a QKV projection do.

    Args:
        query, key: ``[tokens, heads * head_dim]`` (or with heads and head_dim apart), heads of their own number.

    Returns:
        New tensors in the shapes of `query` and `key`; their rows may be slices of common wider rows.
    """
    tokens, width = cos.shape[0], query.shape[-1]
    if (
        query.dim() == 2
        and key.dim() == 2
        and query.stride() == key.stride()
        and query.stride(1) == 1
        and query.untyped_storage().data_ptr() == key.untyped_storage().data_ptr()
        and query.storage_offset() + width == key.storage_offset()
    ):
        heads = (width + key.shape[1]) // head_dim
        both = query.as_strided((tokens, heads, head_dim), (query.stride(0), head_dim, 1))
        out = rotate(both, cos, sin, neox=neox).view(tokens, heads * head_dim)
        return out[:, :width], out[:, width:]
    # With the number of heads, and not -1: there may be no tokens.
    apart = (x.reshape(tokens, x.shape[1:].numel() // head_dim, head_dim) for x in (query, key))
    q, k = (
        rotate(x, cos, sin, neox=neox).view(shape) for x, shape in zip(apart, (query.shape, key.shape), strict=True)
    )
    return q, k


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
    """`RotaryEmbedding.forward`; new tensors in the shapes of `query` and `key`, as the reference returns."""
    assert fused_set_kv_buffer_arg is None, "this platform writes the KV cache in the attention backend"
    if offsets is not None:
        positions = positions + offsets
    cos, sin = self.cos_sin_cache.index_select(0, positions.flatten()).float().unsqueeze(1).chunk(2, dim=-1)
    return rotate_pair(query, key, self.head_size, cos, sin, neox=self.is_neox_style)
