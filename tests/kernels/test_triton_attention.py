"""The Triton attention engine against PyTorch's, in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from triton_interpreter import interpreted

from sglang_relay.attention import Heads, Sequence, TorchAttention
from sglang_relay.attention.triton import TritonAttention

CPU = torch.device("cpu")
SCALE = 0.3


def attend(engine: TritonAttention | TorchAttention, sequences: list[Sequence], heads: Heads) -> torch.Tensor:
    """What no row may see is NaN, and so is the output at first."""
    generator = torch.Generator().manual_seed(0)
    taken = torch.cat([s.slots for s in sequences])
    buffers = [torch.full((int(taken.max()) + 2, heads.kv, dim), torch.nan) for dim in (heads.dim, heads.v_dim)]
    for buffer in buffers:
        buffer[taken] = torch.randn(len(taken), *buffer.shape[1:], generator=generator)
    rows = sum(len(s.positions) for s in sequences)
    query = torch.randn(rows, heads.query + 1, heads.dim, generator=generator)[:, 1:]
    out = torch.full((rows, heads.query, heads.v_dim), torch.nan)
    keys, values = buffers
    engine.plan(sequences, dtype=torch.float32, device=CPU).attend(query, keys, values, SCALE, out)
    return out


@pytest.mark.parametrize("heads", [Heads(4, 2, 16, 16), Heads(3, 1, 24, 8)])
@pytest.mark.parametrize("multiprocessors", [1, 10**6])
def test_rows_of_several_requests(heads: Heads, multiprocessors: int) -> None:
    """Scattered rows, holes in the keys, no row, one row, a whole prompt; whole tiles and split ones."""
    slots = torch.randperm(700, generator=torch.Generator().manual_seed(1))
    holes = np.delete(np.arange(300), np.arange(40, 60))
    sequences = [
        Sequence(np.array([0, 5, 39, 60, 61, 299]), slots[:280], holes),
        Sequence(np.empty(0, np.int64), slots[:0], np.empty(0, np.int64)),
        Sequence(np.array([310]), slots[280:591]),
        Sequence(np.arange(50), slots[600:650]),
    ]
    with interpreted():
        found = attend(TritonAttention(heads, capability=90, multiprocessors=multiprocessors), sequences, heads)
    assert torch.allclose(found, attend(TorchAttention(), sequences, heads), atol=1e-5)


def test_a_row_without_its_own_key_is_refused() -> None:
    engine = TritonAttention(Heads(2, 1, 16, 16), capability=90, multiprocessors=1)
    with pytest.raises(ValueError, match="own key"):
        engine.plan([Sequence(np.array([2]), torch.arange(2), np.array([0, 3]))], dtype=torch.float32, device=CPU)
