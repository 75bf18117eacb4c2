"""Which implementation interpolates: chosen once, at start-up, and compared with PyTorch before it serves."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from sglang_relay.attention.carry_torch import TorchCarrier
from sglang_relay.attention.interpolation import Carrier, Interpolation, parts_of
from sglang_relay.rotary import DeltaRotary

logger = logging.getLogger(__name__)


class Form(NamedTuple):
    """What kernels are compiled for. key, value: heads and dimension."""

    device: torch.device
    dtype: torch.dtype
    key: tuple[int, int]
    value: tuple[int, int]
    neox: bool
    rotary_dim: int


def choose_carrier(buffers: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]], rotary: DeltaRotary) -> Carrier:
    """The Triton kernels where the pool is on a CUDA device and they agree with PyTorch there, else PyTorch.

    buffers: K and V, per layer [slots, heads, dim].
    """
    forms = {
        Form(k.device, k.dtype, (k.shape[1], k.shape[2]), (v.shape[1], v.shape[2]), rotary.neox, rotary.rotary_dim)
        for k, v in zip(*buffers, strict=True)
    }
    form = forms.pop()
    if forms or form.device.type != "cuda":
        return TorchCarrier()
    try:
        from sglang_relay.attention.carry_triton import TritonCarrier

        carrier = TritonCarrier()
        check_carrier(carrier, form)
    except Exception as error:
        logger.warning("relay: interpolation kernels do not work here, PyTorch interpolates: %s", error)
        return TorchCarrier()
    return carrier


def check_carrier(carrier: Carrier, form: Form) -> None:
    """Build what ``carrier`` compiles, and compare it with PyTorch: parts of several sizes, one recomputed token, one
    kept, slots in no order.

    Raises RuntimeError where K or V differ anywhere in the buffers, and whatever building raises.
    """
    lengths, layers, slots = (200, 3, 70, 2), 3, 512
    generator = torch.Generator().manual_seed(0)
    offsets = np.cumsum([0, *lengths])
    n = int(offsets[-1])
    chosen = np.arange(n) % 3 == 0
    chosen[offsets[1] : offsets[3]] = False
    chosen[[offsets[1], offsets[1] + 1, offsets[2]]] = True
    own = torch.randperm(slots, generator=generator)[:n]
    position = torch.randint(0, 4096, (n,), generator=generator)
    index = torch.arange(n) - torch.from_numpy(np.repeat(offsets[:-1], lengths))
    angle = torch.outer(torch.arange(4096.0), 10000.0 ** -torch.linspace(0, 1, form.rotary_dim // 2))
    table = torch.cat((angle.cos(), angle.sin()), -1).to(form.device)
    rotary = DeltaRotary.from_table(table, neox=form.neox, rotary_dim=form.rotary_dim, head_dim=form.key[1])
    kinds = torch.randint(0, 3, (slots,), generator=generator)

    def normal(count: int, shape: tuple[int, int]) -> torch.Tensor:
        return torch.randn(count, *shape, generator=generator)

    # Tokens of a kind are alike, so that something is carried.
    donor = [[normal(3, s)[kinds] + 0.3 * normal(slots, s) for _ in range(layers)] for s in (form.key, form.value)]
    fresh = [[normal(int(chosen.sum()), s) for _ in range(layers)] for s in (form.key, form.value)]
    at = own[torch.from_numpy(chosen)].to(form.device)
    own, position, index = (x.to(form.device) for x in (own, position, index))
    results = []
    for made in (carrier, TorchCarrier()):
        keys, values = ([b.to(form.device, form.dtype, copy=True) for b in side] for side in donor)
        parts = parts_of(offsets.tolist(), chosen)
        interpolation = Interpolation(parts, own, position, index, (keys, values), rotary, made)
        for layer, pair in enumerate(zip(*fresh, strict=True)):
            for buffer, rows in zip((keys[layer], values[layer]), pair, strict=True):
                buffer.index_copy_(0, at, rows.to(buffer))
            interpolation.apply(layer, keys[layer], values[layer])
        results.append([b.float().cpu() for b in keys + values])
    # Values of size 1; weights, changes and sums are rounded to the pool's precision.
    allowed = 16 * torch.finfo(form.dtype).eps + 1e-4
    error = max(float((a - b).abs().max()) for a, b in zip(*results, strict=True))
    if not error <= allowed:
        raise RuntimeError(f"{carrier.name} interpolation differs from PyTorch's by {error}")
