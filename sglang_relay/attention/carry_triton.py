"""Interpolation on the Triton kernels of `sglang_relay_kernels.interpolation_*`: two launches per layer."""

from __future__ import annotations

import torch
from sglang_relay_kernels.interpolation_carry import carry_rows  # pyright: ignore[reportMissingImports]
from sglang_relay_kernels.interpolation_changes import change_rows, save_rows  # pyright: ignore[reportMissingImports]
from sglang_relay_kernels.interpolation_looks import look_rows  # pyright: ignore[reportMissingImports]
from sglang_relay_kernels.interpolation_plan import (  # pyright: ignore[reportMissingImports]
    Plan,
    Rows,
    launch_options,
    padded_width,
    plan_items,
)

from sglang_relay.attention.interpolation import Carried, Layer, Rotation, Tokens, Weights
from sglang_relay.transfer import on_device


class TritonCarrier:
    name = "triton"

    def looks(self, layers: list[Layer], of: Tokens, rotation: Rotation) -> torch.Tensor:
        return look_rows(layers, Rows(*of), neox=rotation.neox, rotary_dim=rotation.rotary_dim)

    def carry(self, kept: Tokens, chosen: Tokens, weights: Weights, rotation: Rotation, first: Layer) -> Carried:
        return _Carried(kept, chosen, weights, rotation, first)


class _Carried:
    def __init__(self, kept: Tokens, chosen: Tokens, weights: Weights, rotation: Rotation, first: Layer) -> None:
        options = launch_options(*first, neox=rotation.neox, rotary_dim=rotation.rotary_dim)
        most_chosen = weights.matrix.shape[2]
        by_token = first[0].new_zeros(len(kept.slots), padded_width(most_chosen))
        by_token[:, :most_chosen] = weights.matrix.flatten(0, 1).index_select(0, weights.kept_at)
        items = on_device(plan_items(weights.sizes, options["carry"]["BLOCK_KEPT"]), by_token.device)
        self._plan = Plan(Rows(*kept), Rows(*chosen), by_token, items, options)
        self._before = save_rows(self._plan, *first)

    def apply(self, layer: Layer, following: Layer | None) -> None:
        change, after = change_rows(self._plan, *layer, self._before, following)
        carry_rows(self._plan, *layer, change)
        if after is not None:
            self._before = after
