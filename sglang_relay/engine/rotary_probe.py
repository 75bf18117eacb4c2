"""Start-up check that every attention layer turns its keys as the model's rotary embedding says.

Some models leave single layers without rotation or normalise keys after it. Their modules look alike, so the check is
numerical: the same input at two positions must give keys that differ by exactly the delta rotation.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.runtime_context import get_model

from sglang_relay.rotary import DeltaRotary

ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}
"""Largest relative error of a key that is rounding, by dtype."""


class _Recorder(AttentionBackend):
    """Keeps the keys that reach attention and returns zeros."""

    def __init__(self, runner: Any) -> None:
        super().__init__()
        self.token_to_kv_pool = runner.token_to_kv_pool
        self.req_to_token_pool = runner.req_to_token_pool
        self.key: torch.Tensor | None = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        pass

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs) -> torch.Tensor:
        self.key = k
        return q.new_zeros(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)


@torch.no_grad()
def unrotated_layers(runner: Any, rotary: DeltaRotary) -> list[int]:
    """Layers whose keys do not follow ``rotary``. Every tensor-parallel rank must call it: projections may reduce.

    Slot 0, which SGLang keeps for padding, is the only one that a model with fused K/V writes can touch.
    """
    model, device = runner.model, runner.device
    parents = dict(model.named_modules())
    wrong = []
    source = torch.tensor([0, 1, 2, 3], device=device)
    target = source + min(1009, rotary.positions - len(source))
    hidden = torch.randn(len(source), runner.model_config.hidden_size, generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(device=device, dtype=runner.dtype)
    modules = {name: m for name, m in model.named_modules() if isinstance(m, RadixAttention)}
    # All layers run before anything of them is looked at: what fails on one rank fails behind the last collective.
    keys = {
        name: [_keys(runner, parents[name.rpartition(".")[0]], positions, hidden) for positions in (source, target)]
        for name in modules
    }
    cos, sin = rotary.factors(source, target)
    for name, module in modules.items():
        shaped = [_found(k).view(len(source), module.tp_k_head_num, module.qk_head_dim).float() for k in keys[name]]
        error = (rotary.rotate(shaped[0], cos, sin) - shaped[1]).norm() / shaped[1].norm()
        if not error <= ROUNDING[runner.dtype]:
            wrong.append(module.layer_id)
    return wrong


def _found(key: torch.Tensor | None) -> torch.Tensor:
    if key is None:
        raise RuntimeError("attention was not reached")
    return key


def _keys(runner: Any, owner: torch.nn.Module, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor | None:
    n, device = len(positions), positions.device
    batch = ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=1,
        input_ids=torch.zeros(n, dtype=torch.int64, device=device),
        req_pool_indices=torch.zeros(1, dtype=torch.int64, device=device),
        seq_lens=torch.tensor([n], device=device),
        out_cache_loc=torch.zeros(n, dtype=torch.int64, device=device),
        seq_lens_sum=n,
        positions=positions,
    )
    recorder = _Recorder(runner)
    with (
        get_model().override(shared_experts=runner.model.shared_experts_config),
        forward_context(ForwardContext(attn_backend=recorder), forward_batch=batch),
    ):
        owner(positions=positions, hidden_states=hidden.clone(), forward_batch=batch)
    return recorder.key
