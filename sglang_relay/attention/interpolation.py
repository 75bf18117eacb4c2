"""What changed on recomputed tokens, interpolated to the tokens that keep their donor's K and V.

A segment's KV deviates because its tokens see another context than the donor did, and tokens that are alike deviate
alike. Recomputed tokens show their deviation; kernel ridge regression (kriging) carries it to the others, layer by
layer, before the layer attends: repaired and fresh rows see corrected neighbours. With cos(a, b) the mean cosine of two
tokens' donor K (turned back to position 0) and V in three layers, and i a token's place in its donor's text:

    k(a, b)   = exp(SHARPNESS (cos(a, b) - 1) - |log (i_a + 4) / (i_b + 4)|)    within one part of a segment
    change(u) = k(u, s) (k(s, s) + NOISE I)^-1 change(s)                        s recomputed, u kept; K and V alike

Deviation falls with the distance from a segment's start (policy-study.md), hence the logarithm. The study's correction
is the same idea with fixed factors (.25 for V, .40 for K) and eight neighbours; the regression finds its factors
itself, and gives nothing where no recomputed token is alike. What it brings: docs/fidelity.md.

Tensor-parallel ranks interpolate by their own heads' likeness: answers differ between degrees of parallelism by a part
of what the interpolation leaves.

FLOPs of a part of n tokens, m of them recomputed, with e elements of K and V per token and layer: ``2 n m e`` per
layer, and ``6 n m e`` once. Beside the pool it needs one layer's K and V of the recomputed tokens, and the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch

SHARPNESS = 4.0
NOISE = 0.2
OFFSET = 4
"""As in the probe's prior: the first tokens of a text are not infinitely far apart."""
PART = 512
"""Most tokens of a segment that are related to each other; bounds the work, which grows with the square."""
FIRST_LAYER = 1
"""K and V of layer 0 depend on no context."""


class Rotation(Protocol):
    """`sglang_relay.rotary.DeltaRotary`."""

    def factors(self, source: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]: ...
    def rotate(self, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor: ...


class Part(NamedTuple):
    """Tokens of one segment. kept, chosen: int64 [u], [m], indices into the prompt's reused tokens, both not empty."""

    kept: np.ndarray
    chosen: np.ndarray


def parts_of(offsets: Sequence[int], chosen: np.ndarray) -> list[Part]:
    """Split each segment into parts of nearly equal length, at most `PART`; those with nothing to learn from, or
    nothing to correct, are left out.

    offsets: [segments + 1], where each segment starts in the n reused tokens. chosen: bool [n], recomputed.
    """
    found = []
    for start, stop in pairwise(offsets):
        for tokens in np.array_split(np.arange(start, stop), -(-(stop - start) // PART) or 1):
            mine = chosen[tokens]
            if mine.any() and not mine.all():
                found.append(Part(tokens[~mine], tokens[mine]))
    return found


class _Tokens(NamedTuple):
    """slots: int64 [t]. back, forth: (cos, sin) that turn keys to position 0 and to their own."""

    slots: torch.Tensor
    back: tuple[torch.Tensor, torch.Tensor]
    forth: tuple[torch.Tensor, torch.Tensor]


class Interpolation:
    """Of one prompt. Made when donor KV is placed and before anything of it is recomputed."""

    def __init__(
        self,
        parts: list[Part],
        slots: torch.Tensor,
        positions: torch.Tensor,
        index: torch.Tensor,
        buffers: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]],
        rotary: Rotation,
    ) -> None:
        """parts: not empty. slots, positions, index: int64 [n], slot, prompt position and place in the donor's text of
        each reused token. buffers: K and V, per layer [slots, kv_heads, dim]; K carries positions."""
        self._rotary = rotary
        self._layers = list(zip(*buffers, strict=True))
        self._next = FIRST_LAYER
        rows = [_at(np.concatenate(rows), slots.device) for rows in zip(*parts, strict=True)]
        self._kept, self._chosen = (self._tokens(slots, positions, r) for r in rows)
        sizes = [(len(part.kept), len(part.chosen)) for part in parts]
        place = torch.log(index.float() + OFFSET)
        weights = self._weights(sizes, [place.index_select(0, r) for r in rows])
        # All parts in one product: one launch for a prompt, however many segments it has.
        self._kept_at, self._chosen_at = (
            _at(np.concatenate([np.arange(n) + i * max(column) for i, n in enumerate(column)]), slots.device)
            for column in zip(*sizes, strict=True)
        )
        self._padded = weights[0].new_zeros(len(parts), *(max(column) for column in zip(*sizes, strict=True)))
        for padded, part in zip(self._padded, weights, strict=True):
            padded[: part.shape[0], : part.shape[1]] = part
        self._before = self._snapshot()

    def _tokens(self, slots: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> _Tokens:
        at = positions.index_select(0, rows)
        cos, sin = self._rotary.factors(at, torch.zeros_like(at))
        return _Tokens(slots.index_select(0, rows), (cos, sin), (cos, -sin))

    def _read(self, keys: torch.Tensor, values: torch.Tensor, of: _Tokens) -> torch.Tensor:
        """float32 [t, e_k + e_v], keys turned back to position 0."""
        key = self._rotary.rotate(keys.index_select(0, of.slots).float(), *of.back)
        return torch.cat((key.flatten(1), values.index_select(0, of.slots).float().flatten(1)), 1)

    def _weights(self, sizes: list[tuple[int, int]], places: list[torch.Tensor]) -> list[torch.Tensor]:
        """Per part [u, m]: changes of chosen tokens to changes of kept ones."""
        kept, chosen = self._looks(self._kept), self._looks(self._chosen)
        dtype = self._layers[0][0].dtype
        # Half precision, whose rounding is far below the regression's error, where there are instructions for it.
        half = dtype is torch.bfloat16 or (dtype is torch.float16 and kept.is_cuda)
        found = []
        for u, m, near_u, near_m in zip(
            kept.split([u for u, _ in sizes]),
            chosen.split([m for _, m in sizes]),
            places[0].split([u for u, _ in sizes]),
            places[1].split([m for _, m in sizes]),
            strict=True,
        ):
            gram = _kernel(m @ m.T, near_m, near_m)
            gram.diagonal().add_(NOISE)
            factor, _ = torch.linalg.cholesky_ex(gram)  # does not wait for the device
            weights = _kernel(u @ m.T, near_u, near_m) @ torch.cholesky_inverse(factor)
            found.append(weights.to(dtype) if half else weights)
        return found

    def _looks(self, of: _Tokens) -> torch.Tensor:
        """float32 [t, ...]: products of two rows are the mean cosine."""
        found = []
        for quarter in (1, 2, 3):
            keys, values = self._layers[len(self._layers) * quarter // 4]
            sides = self._read(keys, values, of).tensor_split([keys[0].numel()], 1)
            found += [torch.nn.functional.normalize(side) for side in sides]
        return torch.cat(found, 1) * len(found) ** -0.5

    def _snapshot(self) -> torch.Tensor | None:
        """Donor K and V of the chosen tokens in the layer that comes next."""
        return self._read(*self._layers[self._next], self._chosen) if self._next < len(self._layers) else None

    def apply(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Correct kept tokens of ``layer`` in place, once; every chosen token's fresh K and V are written, and nothing
        of later layers. Layers come in order.

        keys, values: this layer's buffers, [slots, kv_heads, dim].
        """
        if layer != self._next or self._before is None:
            return
        change = self._read(keys, values, self._chosen).sub_(self._before)
        parts, _, most_chosen = self._padded.shape
        padded = self._padded.new_zeros(parts * most_chosen, change.shape[1])
        padded.index_copy_(0, self._chosen_at, change.to(padded.dtype))
        step = torch.bmm(self._padded, padded.unflatten(0, (parts, most_chosen))).flatten(0, 1)
        by_k, by_v = step.index_select(0, self._kept_at).float().tensor_split([keys[0].numel()], 1)
        by_k = self._rotary.rotate(by_k.unflatten(-1, keys.shape[1:]), *self._kept.forth)
        for buffer, by in ((keys, by_k), (values, by_v.unflatten(-1, values.shape[1:]))):
            now = buffer.index_select(0, self._kept.slots).float().add_(by)
            buffer.index_copy_(0, self._kept.slots, now.to(buffer.dtype))
        self._next += 1
        self._before = self._snapshot()


def _at(rows: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int64)).to(device, non_blocking=True)


def _kernel(cosine: torch.Tensor, some: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """some, others: logarithms of the rows' and the columns' places."""
    return torch.exp(SHARPNESS * (cosine - 1.0) - (some[:, None] - others).abs())
