"""Interpolation on PyTorch: serves every device, and is what other carriers are compared with."""

from __future__ import annotations

import torch

from sglang_relay.attention.interpolation import Carried, Layer, Rotation, Tokens, Weights


class TorchCarrier:
    name = "torch"

    def looks(self, layers: list[Layer], of: Tokens, rotation: Rotation) -> torch.Tensor:
        found = []
        for layer in layers:
            sides = _read(layer, of, rotation).tensor_split([layer[0][0].numel()], 1)
            found += [torch.nn.functional.normalize(side) for side in sides]
        return torch.cat(found, 1) * len(found) ** -0.5

    def carry(self, kept: Tokens, chosen: Tokens, weights: Weights, rotation: Rotation, first: Layer) -> Carried:
        return _Carried(kept, chosen, weights, rotation, first)


class _Carried:
    def __init__(self, kept: Tokens, chosen: Tokens, weights: Weights, rotation: Rotation, first: Layer) -> None:
        self._kept, self._chosen, self._rotation = kept, chosen, rotation
        self._kept_at, self._chosen_at = weights.kept_at, weights.chosen_at
        dtype = first[0].dtype
        # Half precision, whose rounding is far below the regression's error, where there are instructions for it.
        half = dtype is torch.bfloat16 or (dtype is torch.float16 and kept.slots.is_cuda)
        self._weights = weights.matrix.to(dtype) if half else weights.matrix
        self._before = _read(first, chosen, rotation)

    def apply(self, layer: Layer, following: Layer | None) -> None:
        keys, values = layer
        change = _read(layer, self._chosen, self._rotation).sub_(self._before)
        # All parts in one product: one launch for a prompt, however many segments it has.
        parts, _, most_chosen = self._weights.shape
        padded = self._weights.new_zeros(parts * most_chosen, change.shape[1])
        padded.index_copy_(0, self._chosen_at, change.to(padded.dtype))
        step = torch.bmm(self._weights, padded.unflatten(0, (parts, most_chosen))).flatten(0, 1)
        by_k, by_v = step.index_select(0, self._kept_at).float().tensor_split([keys[0].numel()], 1)
        by_k = self._rotation.rotate(by_k.unflatten(-1, keys.shape[1:]), self._kept.cos, -self._kept.sin)
        for buffer, by in ((keys, by_k), (values, by_v.unflatten(-1, values.shape[1:]))):
            now = buffer.index_select(0, self._kept.slots).float().add_(by)
            buffer.index_copy_(0, self._kept.slots, now.to(buffer.dtype))
        if following is not None:
            self._before = _read(following, self._chosen, self._rotation)


def _read(layer: Layer, of: Tokens, rotation: Rotation) -> torch.Tensor:
    """float32 [t, e_k + e_v], keys turned back to position 0."""
    keys, values = (buffer.index_select(0, of.slots).float() for buffer in layer)
    return torch.cat((rotation.rotate(keys, of.cos, of.sin).flatten(1), values.flatten(1)), 1)
