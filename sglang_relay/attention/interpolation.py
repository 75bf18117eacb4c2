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

FLOPs of a part of n tokens, m of them recomputed, with e elements of K and V per token and layer: ``2 n m e`` per
layer, and ``8 n m e`` once.
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


class _Prepared(NamedTuple):
    """weights: [u, m] in the pool's dtype, changes of chosen tokens to changes of kept ones. before: per layer, donor K
    (turned back) and V of the chosen tokens, float32 [m, e_k + e_v]."""

    kept: _Tokens
    chosen: _Tokens
    weights: torch.Tensor
    before: list[torch.Tensor]


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
        """slots, positions, index: int64 [n], slot, prompt position and place in the donor's text of each reused token.
        buffers: K and V, per layer [slots, kv_heads, dim]; K carries positions."""
        self._rotary = rotary
        self._applied = FIRST_LAYER - 1
        self._layers = list(zip(*buffers, strict=True))
        self._parts = [self._prepare(part, slots, positions, torch.log(index.float() + OFFSET)) for part in parts]

    def _prepare(self, part: Part, slots: torch.Tensor, positions: torch.Tensor, place: torch.Tensor) -> _Prepared:
        kept, chosen = (torch.from_numpy(rows).to(slots.device) for rows in part)
        tokens = [self._tokens(slots, positions, rows) for rows in (kept, chosen)]
        before = [self._read(keys, values, tokens[1]) for keys, values in self._layers]
        near = [(place.index_select(0, rows)[:, None] - place.index_select(0, chosen)).abs() for rows in (kept, chosen)]
        likeness, gram = (_kernel(self._cosine(t, tokens[1]), n) for t, n in zip(tokens, near, strict=True))
        gram.diagonal().add_(NOISE)
        factor, _ = torch.linalg.cholesky_ex(gram)  # does not wait for the device, as cholesky does
        weights = likeness @ torch.cholesky_inverse(factor)
        # In the pool's precision, whose rounding is far below the regression's error.
        dtype = self._layers[0][0].dtype
        fast = dtype if dtype in (torch.bfloat16, torch.float16) else torch.float32
        return _Prepared(tokens[0], tokens[1], weights.to(fast), before)

    def _tokens(self, slots: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> _Tokens:
        at = positions.index_select(0, rows)
        cos, sin = self._rotary.factors(at, torch.zeros_like(at))
        return _Tokens(slots.index_select(0, rows), (cos, sin), (cos, -sin))

    def _read(self, keys: torch.Tensor, values: torch.Tensor, of: _Tokens) -> torch.Tensor:
        """float32 [t, e_k + e_v]."""
        key = self._rotary.rotate(keys.index_select(0, of.slots).float(), *of.back)
        return torch.cat((key.flatten(1), values.index_select(0, of.slots).float().flatten(1)), 1)

    def _cosine(self, some: _Tokens, others: _Tokens) -> torch.Tensor:
        """float32 [some, others]."""
        count = len(self._layers)
        layers = [self._layers[count * quarter // 4] for quarter in (1, 2, 3)]
        width = layers[0][0][0].numel()
        total = torch.zeros((), device=some.slots.device)
        for keys, values in layers:
            a, b = (self._read(keys, values, of).tensor_split([width], 1) for of in (some, others))
            for x, y in zip(a, b, strict=True):
                total = total + torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(y).T
        return total / (2 * len(layers))

    def apply(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Correct kept tokens of ``layer`` in place, once; every chosen token's fresh K and V are written.

        keys, values: this layer's buffers, [slots, kv_heads, dim].
        """
        if layer <= self._applied:
            return
        self._applied = layer
        for kept, chosen, weights, before in self._parts:
            change = self._read(keys, values, chosen).sub_(before[layer])
            step = (weights @ change.to(weights.dtype)).float()
            by_k, by_v = step.tensor_split([keys[0].numel()], 1)
            by_k = self._rotary.rotate(by_k.unflatten(-1, keys.shape[1:]), *kept.forth)
            for buffer, by in ((keys, by_k), (values, by_v.unflatten(-1, values.shape[1:]))):
                now = buffer.index_select(0, kept.slots).float().add_(by)
                buffer.index_copy_(0, kept.slots, now.to(buffer.dtype))


def _kernel(cosine: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    return torch.exp(SHARPNESS * (cosine - 1.0) - distance)
