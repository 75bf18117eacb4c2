"""Interpolation on the Triton kernels against PyTorch's, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction
from triton_interpreter import interpreted

from sglang_relay.attention import Interpolation, TorchCarrier, carry_triton, choose_carrier, parts_of
from sglang_relay.attention.carriers import Form, check_carrier
from sglang_relay.attention.carry_triton import TritonCarrier
from sglang_relay.rotary import DeltaRotary

CPU = torch.device("cpu")
SLOTS, POSITIONS, LAYERS = 200, 500, 3


def form(dtype: torch.dtype, *, neox: bool = True) -> Form:
    return Form(CPU, dtype, (2, 24), (1, 40), neox, 16)


FORMS = st.builds(
    Form,
    st.just(CPU),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.tuples(st.integers(1, 3), st.sampled_from([16, 24, 64])),
    st.tuples(st.integers(1, 3), st.sampled_from([8, 40])),
    st.booleans(),
    st.sampled_from([2, 10, 16]),
)


def table(of: Form) -> DeltaRotary:
    angle = torch.outer(torch.arange(float(POSITIONS)), 10000.0 ** -torch.linspace(0, 1, of.rotary_dim // 2))
    factors = torch.cat((angle.cos(), angle.sin()), -1)
    return DeltaRotary.from_table(factors, neox=of.neox, rotary_dim=of.rotary_dim, head_dim=of.key[1])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=3), FORMS, st.floats(0.05, 0.95), st.integers(0, 99))
def test_random_parts(lengths: list[int], of: Form, share: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    offsets = np.cumsum([0, *lengths]).tolist()
    n = offsets[-1]
    chosen = np.random.default_rng(seed).random(n) < share
    parts = parts_of(offsets, chosen)
    if not parts:
        return
    slots = torch.randperm(SLOTS, generator=g)[:n]
    positions, index = (torch.randint(0, POSITIONS, (n,), generator=g) for _ in "pi")
    kinds = torch.randint(0, 3, (SLOTS,), generator=g)  # tokens of one kind are alike

    def side(shape: tuple[int, int]) -> list[torch.Tensor]:
        """What nobody may read is NaN."""
        found = torch.full((LAYERS, SLOTS, *shape), torch.nan, dtype=of.dtype)
        kind, own = (torch.randn(LAYERS, count, *shape, generator=g) for count in (3, SLOTS))
        found[:, slots] = (kind[:, kinds] + 0.3 * own)[:, slots].to(of.dtype)
        return list(found.unbind())

    donor, fresh = ([side(of.key), side(of.value)] for _ in "df")
    at, results = slots[torch.from_numpy(chosen)], []
    for carrier in (TorchCarrier(), TritonCarrier()):
        keys, values = ([b.clone() for b in buffers] for buffers in donor)
        with interpreted():
            made = Interpolation(parts, slots, positions, index, (keys, values), table(of), carrier)
            for layer in range(LAYERS):
                keys[layer][at], values[layer][at] = (buffers[layer][at] for buffers in fresh)
                made.apply(layer, keys[layer], values[layer])
        results.append(torch.cat([b.float().flatten() for b in keys + values]))
    # Weights and changes are rounded to the pool's precision (those of float16 not by PyTorch here), K and V once.
    eps = torch.finfo(of.dtype).eps
    torch.testing.assert_close(results[1], results[0], rtol=2 * eps, atol=8 * eps + 1e-5, equal_nan=True)


@pytest.mark.parametrize(("dtype", "neox"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, True)])
def test_the_check_passes_what_is_right(dtype: torch.dtype, neox: bool) -> None:
    with interpreted():
        check_carrier(TritonCarrier(), form(dtype, neox=neox))


def _other_parts(sizes: list[tuple[int, int]], block: int) -> np.ndarray:
    items = _PLANNED(sizes, block)
    items[:, 3] = items[:, 2] + 1
    return items


_PLANNED, _LAUNCH, _CHANGE = carry_triton.plan_items, carry_triton.launch_options, carry_triton.change_rows


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("plan_items", _other_parts),
        ("launch_options", lambda *of, neox, rotary_dim: _LAUNCH(*of, neox=not neox, rotary_dim=rotary_dim)),
        ("carry_rows", lambda *_: None),
        ("change_rows", lambda plan, k, v, before, _: (_CHANGE(plan, k, v, before, None)[0], before)),
    ],
)
def test_the_check_sees_what_is_wrong(name: str, wrong: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carry_triton, name, wrong)
    with interpreted(), pytest.raises(RuntimeError, match="differs"):
        check_carrier(TritonCarrier(), form(torch.bfloat16))


def test_pytorch_interpolates_on_the_cpu() -> None:
    of = form(torch.bfloat16)
    keys, values = ([torch.zeros(4, *shape, dtype=of.dtype)] * LAYERS for shape in (of.key, of.value))
    assert choose_carrier((keys, values), table(of)).name == "torch"


WAITS = {"_local_scalar_dense", "_linalg_check_errors", "cholesky_inverse", "nonzero", "masked_select", "_unique2"}
"""Operations that wait for the device, as these do: the copies that `_Waits` sees."""


class _Waits(TorchDispatchMode):
    def __init__(self, pinned: list[torch.Tensor]) -> None:
        super().__init__()
        self.pinned, self.found, self.uploads = pinned, [], 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        # A copy in place names the target first.
        source = args[1] if name == "copy_" else args[0] if name == "_to_copy" else None
        if source is not None and source.device != out.device:
            self.uploads += 1
            if not (kwargs or {}).get("non_blocking") or not any(source is p for p in self.pinned):
                self.found.append(f"{name} from {source.device} to {out.device}")
        if name in WAITS:
            self.found.append(name)
        return out


@pytest.mark.parametrize("carrier", [TorchCarrier(), TritonCarrier()], ids=lambda carrier: carrier.name)
def test_nothing_waits_for_the_device(carrier: TorchCarrier | TritonCarrier, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CUDA device that is not there: tensors without data, kernels that do not run."""
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    launched: list[str] = []
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *_, **__: launched.append(kernel.__name__))
    of, chosen = form(torch.bfloat16), np.arange(90) % 4 == 0
    parts = parts_of((0, 60, 90), chosen)
    with FakeTensorMode(), torch.device("cuda"):
        keys, values = ([torch.zeros(SLOTS, *s, dtype=of.dtype) for _ in range(LAYERS)] for s in (of.key, of.value))
        slots, rows = torch.zeros(90, dtype=torch.int64), torch.zeros(POSITIONS, of.rotary_dim)
        rotary = DeltaRotary.from_table(rows, neox=True, rotary_dim=of.rotary_dim, head_dim=of.key[1])
        with _Waits(pinned) as waits:
            made = Interpolation(parts, slots, slots, slots, (keys, values), rotary, carrier)
            for layer in range(LAYERS):
                made.apply(layer, keys[layer], values[layer])
    assert waits.uploads == len(pinned) > 0 and waits.found == []
    # Two launches per layer from the second on, two looks at each of three, and the first snapshot.
    assert len(launched) == (2 * (LAYERS - 1) + 2 * 3 + 1 if carrier.name == "triton" else 0)
