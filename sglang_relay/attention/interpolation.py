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

The arithmetic on K and V is a `Carrier`'s (``carriers.py`` chooses one at start-up). Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch

from sglang_relay.transfer import on_device

SHARPNESS = 4.0
NOISE = 0.2
OFFSET = 4
"""As in the probe's prior: the first tokens of a text are not infinitely far apart."""
PART = 512
"""Most tokens of a segment that are related to each other; bounds the work, which grows with the square."""
FAR = 1e6
"""Distance of what is no token from every token: ``exp(-FAR)`` is zero."""
FIRST_LAYER = 1
"""K and V of layer 0 depend on no context."""


Layer = tuple[torch.Tensor, torch.Tensor]
"""K and V buffers of a layer, [slots, heads, dim]; K carries positions."""


class Rotation(Protocol):
    """`sglang_relay.rotary.DeltaRotary`."""

    @property
    def neox(self) -> bool: ...
    @property
    def rotary_dim(self) -> int: ...
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


class Tokens(NamedTuple):
    """slots: int64 [t]. cos, sin: float32 [t, rotary_dim / 2], turn their keys from their positions to position 0."""

    slots: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


class Weights(NamedTuple):
    """From changes of chosen tokens to changes of kept ones, in parts that know nothing of each other.

    matrix: float32 [parts, most_kept, most_chosen]; zero in columns past a part's chosen tokens, finite in rows past
    its kept ones. sizes: kept and chosen tokens of each part. kept_at, chosen_at: int64 [u], [m], each token's place
    among ``parts * most_kept`` rows, ``parts * most_chosen`` columns.
    """

    matrix: torch.Tensor
    sizes: list[tuple[int, int]]
    kept_at: torch.Tensor
    chosen_at: torch.Tensor


class Carried(Protocol):
    """The layers of one prompt, in order."""

    def apply(self, layer: Layer, following: Layer | None) -> None:
        """Correct the kept tokens of ``layer`` in place; ``following``, the one after it, holds donor KV still."""
        ...


class Carrier(Protocol):
    """The work on K and V. Nothing waits for the device."""

    name: str

    def looks(self, layers: list[Layer], of: Tokens, rotation: Rotation) -> torch.Tensor:
        """float32 [t, ...]: products of two rows are the mean cosine of K, without positions, and V in ``layers``."""
        ...

    def carry(self, kept: Tokens, chosen: Tokens, weights: Weights, rotation: Rotation, first: Layer) -> Carried:
        """Get ready to correct from layer ``first`` on, which holds donor KV still."""
        ...


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
        carrier: Carrier,
    ) -> None:
        """parts: not empty. slots, positions, index: int64 [n], slot, prompt position and place in the donor's text of
        each reused token. buffers: K and V, per layer [slots, kv_heads, dim]; K carries positions."""
        self._layers: list[Layer] = list(zip(*buffers, strict=True))
        self._next = FIRST_LAYER
        self._carried: Carried | None = None
        if self._next >= len(self._layers):
            return
        sizes = [(len(part.kept), len(part.chosen)) for part in parts]
        most = [max(column) for column in zip(*sizes, strict=True)]
        places = [
            np.concatenate([np.arange(count) + i * widest for i, count in enumerate(column)])
            for column, widest in zip(zip(*sizes, strict=True), most, strict=True)
        ]
        rows = [np.concatenate(column) for column in zip(*parts, strict=True)]
        *rows, kept_at, chosen_at = _on_device([*rows, *places], slots.device)
        kept, chosen = (
            Tokens(slots.index_select(0, r), *rotary.factors(at, torch.zeros_like(at)))
            for r, at in ((r, positions.index_select(0, r)) for r in rows)
        )
        # FAR from every token is what fills the parts up to one size.
        far = index.new_full((len(parts) * sum(most),), FAR, dtype=torch.float32)
        place = torch.log(index.float() + OFFSET)
        near = far.split([len(parts) * count for count in most])
        for all_of, at, r in zip(near, (kept_at, chosen_at), rows, strict=True):
            all_of.index_copy_(0, at, place.index_select(0, r))
        looked = [self._layers[len(self._layers) * quarter // 4] for quarter in (1, 2, 3)]
        looks = [carrier.looks(looked, of, rotary) for of in (kept, chosen)]
        matrix = _regression(sizes, *looks, *(x.unflatten(0, (len(parts), -1)) for x in near))
        weights = Weights(matrix, sizes, kept_at, chosen_at)
        self._carried = carrier.carry(kept, chosen, weights, rotary, self._layers[self._next])

    def apply(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Correct kept tokens of ``layer`` in place, once; every chosen token's fresh K and V are written, and nothing
        of later layers. Layers come in order.

        keys, values: this layer's buffers, [slots, kv_heads, dim].
        """
        if layer != self._next or self._carried is None:
            return
        self._next += 1
        self._carried.apply((keys, values), self._layers[self._next] if self._next < len(self._layers) else None)


def _regression(
    sizes: list[tuple[int, int]],
    kept: torch.Tensor,
    chosen: torch.Tensor,
    near_kept: torch.Tensor,
    near_chosen: torch.Tensor,
) -> torch.Tensor:
    """`Weights.matrix`. kept, chosen: float32 [u, ...], [m, ...], looks. near_kept, near_chosen: float32
    [parts, most_kept], [parts, most_chosen], logarithms of places, `FAR` where a part has fewer tokens."""
    parts, most = near_chosen.shape
    gram, cross = near_chosen.new_zeros(parts, most, most), near_kept.new_zeros(parts, near_kept.shape[1], most)
    by_part = zip(kept.split([u for u, _ in sizes]), chosen.split([m for _, m in sizes]), strict=True)
    for i, (u, m) in enumerate(by_part):
        gram[i, : len(m), : len(m)] = m @ m.T
        cross[i, : len(u), : len(m)] = u @ m.T
    gram, cross = _kernel(gram, near_chosen, near_chosen), _kernel(cross, near_kept, near_chosen)
    gram.diagonal(dim1=1, dim2=2).add_(NOISE)
    # Neither of these waits for the device; `cholesky_inverse` would, to check what it was given.
    factor, _ = torch.linalg.cholesky_ex(gram)
    half = torch.linalg.solve_triangular(factor.mT, cross, upper=True, left=False)
    return torch.linalg.solve_triangular(factor, half, upper=False, left=False)


def _on_device(columns: list[np.ndarray], device: torch.device) -> tuple[torch.Tensor, ...]:
    """int64 tensors, in one copy."""
    return on_device(np.concatenate(columns, dtype=np.int64), device).split([len(column) for column in columns])


def _kernel(cosine: torch.Tensor, some: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """cosine: [parts, a, b]. some, others: [parts, a], [parts, b], logarithms of the places."""
    return torch.exp(SHARPNESS * (cosine - 1.0) - (some[:, :, None] - others[:, None, :]).abs())
