"""Turn keys that already carry a rotary position to another position.

A key cached at position s is ``R(s) k``. At position t the model would have cached ``R(t) k = R(t) R(s)^-1 (R(s) k)``,
so the correction is a rotation by the difference of the two angles. Both angles are read from the engine's own fp32
table instead of being derived from a base and a scaling rule: every scaling that is a fixed angle per position (linear,
llama3, YaRN, NTK) is then right by construction, and the table's own rounding at s cancels: the result carries the
rounding of the directly computed key at t and no more, at any distance.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True, slots=True)
class DeltaRotary:
    """Rotation between positions of one model's rotary embedding.

    Attributes:
        table: fp32 ``[positions, rotary_dim]``, cosines then sines, one column per frequency. Held by reference.
        neox: pairs are (i, i + rotary_dim / 2) if true (NeoX), (2i, 2i + 1) if false (GPT-J).
        rotary_dim: leading elements of a head that are rotated.
        head_dim: elements of a head.
    """

    table: Tensor
    neox: bool
    rotary_dim: int
    head_dim: int

    @classmethod
    def from_table(cls, cos_sin: Tensor, *, neox: bool, rotary_dim: int, head_dim: int) -> "DeltaRotary":
        """Wrap a table as SGLang lays it out (`layers/rotary_embedding/base.py`, `_compute_cos_sin_cache`).

        The rows may be scaled by a constant (YaRN's mscale): only their angles are used.

        Raises:
            ValueError: a table that is not fp32 ``[positions, rotary_dim]`` (the engine's `cos_sin_cache` is rounded to
                the model's dtype off CUDA and is refused here), or dimensions that do not fit.
        """
        if cos_sin.dtype != torch.float32:
            raise ValueError(f"rotary table must be float32, got {cos_sin.dtype}")
        if cos_sin.ndim != 2 or cos_sin.shape[1] != rotary_dim or rotary_dim % 2:
            raise ValueError(f"rotary table must be [positions, {rotary_dim}], got {tuple(cos_sin.shape)}")
        if not 0 < rotary_dim <= head_dim:
            raise ValueError(f"rotary_dim {rotary_dim} does not fit head_dim {head_dim}")
        return cls(cos_sin, neox, rotary_dim, head_dim)

    @property
    def positions(self) -> int:
        """Number of positions the table covers; sources and targets must lie below."""
        return self.table.shape[0]

    def factors(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), fp32 ``[n, rotary_dim // 2]``, that turn keys from positions `source` to `target`, int64 ``[n]``.

        Unit norm; exactly (1, 0) where source equals target. Positions are checked by PyTorch only on CPU
        (IndexError); elsewhere the caller must keep them below `positions`.
        """
        cos_s, sin_s = self.table.index_select(0, source).chunk(2, dim=-1)
        cos_t, sin_t = self.table.index_select(0, target).chunk(2, dim=-1)
        cos = cos_t * cos_s + sin_t * sin_s
        sin = sin_t * cos_s - cos_t * sin_s
        # Norm of both rows at once: removes their scale, else it would be applied a second time.
        norm = torch.hypot(cos, sin)
        still = (source == target).unsqueeze(-1)
        return torch.where(still, 1.0, cos / norm), torch.where(still, 0.0, sin / norm)

    def rotate(self, key: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
        """Keys ``[..., n, heads, head_dim]`` turned by `factors`; computed in fp32, returned in the key's dtype.

        Elements past `rotary_dim` are copied. `out` may be `key` itself.
        """
        if key.shape[-1] != self.head_dim:
            raise ValueError(f"keys have head_dim {key.shape[-1]}, the rotary embedding {self.head_dim}")
        rotary = key[..., : self.rotary_dim].float()
        a, b = rotary.chunk(2, dim=-1) if self.neox else (rotary[..., ::2], rotary[..., 1::2])
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
        turned = (a * cos - b * sin, b * cos + a * sin)
        turned = torch.cat(turned, -1) if self.neox else torch.stack(turned, -1).flatten(-2)
        if out is None:
            out = torch.empty_like(key)
        if out is not key:
            out[..., self.rotary_dim :] = key[..., self.rotary_dim :]
        out[..., : self.rotary_dim] = turned
        return out


def additive_error(table: Tensor) -> float:
    """How far a table is from one rotation per position, in units of the angle's fp32 rounding; below 2 for a true one.

    Delta rotation needs ``R(p) R(q) = R(p + q)`` times a constant scale. Tables stitched together from several
    scalings (longrope's short and long factors, several linear factors), tables that start at another position, and
    Fourier tables break this by orders of magnitude. A table computed in fp32 rounds angle p to within ``p * eps``,
    and that is the unit here.

    Args:
        table: fp32 ``[positions, rotary_dim]``, cosines then sines.

    Returns:
        Largest error over a fixed set of position pairs that reaches the last row; inf if the table is not
        two-dimensional, or holds zeros or non-finite values.
    """
    if table.ndim != 2 or table.shape[0] < 2 or table.shape[1] % 2:
        return float("inf")
    last = table.shape[0] - 1
    # A denser grid near both ends and an even one between: seams lie at original context lengths, often powers of 2.
    total = torch.cat((torch.linspace(1, last, 257), last * torch.logspace(-5, 0, 64)))
    total = total.round().clamp(1, last).long().unique().to(table.device)
    worst = 0.0
    for share in (0.0, 0.5, 0.9):
        p = (total * share).long()
        worst = max(worst, _pair_error(table, p, total - p))
    return worst


def is_static_table(table: Tensor, tolerance: float = 8.0) -> bool:
    """Whether `table` is one fixed rotation per position, so that `DeltaRotary` may be built on it."""
    return additive_error(table) <= tolerance


def _pair_error(table: Tensor, p: Tensor, q: Tensor) -> float:
    cos_p, sin_p = _unit(table, p)
    cos_q, sin_q = _unit(table, q)
    cos_t, sin_t = _unit(table, p + q)
    # Sine of the angle between R(p) R(q) and R(p + q), and 1 - cosine, so that opposite rotations count as far apart.
    cos = cos_p * cos_q - sin_p * sin_q
    sin = sin_p * cos_q + cos_p * sin_q
    angle = torch.atan2(sin * cos_t - cos * sin_t, cos * cos_t + sin * sin_t).abs()
    first = torch.hypot(*table[0].double().chunk(2))
    scale = torch.hypot(*table[p + q].double().chunk(2, dim=-1)) / first - 1
    unit = _EPS * (1 + p + q).unsqueeze(-1)
    error = torch.maximum(angle / unit, scale.abs() / (4 * _EPS)).nan_to_num(nan=float("inf"))
    return float(error.max())


def _unit(table: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = table[rows].double().chunk(2, dim=-1)
    norm = torch.hypot(cos, sin)
    return cos / norm, sin / norm
