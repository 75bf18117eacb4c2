"""The profile file: what `sglang-relay profile` found on one model, for exactly the identity it was made for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from sglang_relay.config import LayerRange
from sglang_relay.identity import Identity, write_atomically
from sglang_relay.profile.ranges import find_ranges

EDGES = (0, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""First positions of the heat map's bins: deviation changes fastest at the start of a segment."""


class ProfileError(ValueError):
    """A profile cannot be read, made or drawn; the text says why."""


class Reasons(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Why the range is as it is, one sentence for each of its layers."""

    start: str
    detect: str
    end: str


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """start, detect, end: the layer range, 0-based, inclusive. similarity, rank_correlation, curvature: one value per
    layer, null where undefined (`ranges.Ranges`). edges: first position in its segment of each bin of ``heat``, the
    mean deviation by bin and layer, of the bins that hold tokens. texts, tokens: reused texts and their tokens
    measured. data: what the texts were, in words. made: date."""

    identity: Identity
    start: int
    detect: int
    end: int
    reasons: Reasons
    similarity: tuple[float, ...]
    rank_correlation: tuple[float | None, ...]
    curvature: tuple[float | None, ...]
    edges: tuple[int, ...]
    heat: tuple[tuple[float, ...], ...]
    texts: int
    tokens: int
    data: str
    made: str
    format: Literal["sglang-relay profile 1"] = "sglang-relay profile 1"

    @property
    def layers(self) -> LayerRange:
        return LayerRange(self.start, self.detect, self.end)

    def save(self, file: Path) -> None:
        """Write the file in one step."""
        write_atomically(file, msgspec.json.format(msgspec.json.encode(self)).decode() + "\n")


def make_profile(identity: Identity, fields: Sequence[np.ndarray], *, data: str, made: str) -> Profile:
    """fields: one deviation field, [tokens, layers], per reused text, its tokens in order from the text's start.

    Raises ProfileError without tokens or with values that are no numbers.
    """
    try:
        pooled = np.concatenate(fields) if fields else np.zeros((0, 0))
        found = find_ranges(pooled)
    except ValueError as error:
        raise ProfileError(f"nothing to profile: {error}") from error
    positions = np.concatenate([np.arange(len(field)) for field in fields])
    edges, heat = _binned(pooled, positions)
    return Profile(
        identity=identity,
        start=found.layers.start,
        detect=found.layers.detect,
        end=found.layers.end,
        reasons=Reasons(found.start, found.detect, found.end),
        similarity=tuple(found.similarity.tolist()),
        rank_correlation=_nullable(found.rho),
        curvature=_nullable(found.curvature),
        edges=edges,
        heat=heat,
        texts=len(fields),
        tokens=len(pooled),
        data=data,
        made=made,
    )


def read_profile(file: Path, identity: Identity | None = None) -> Profile:
    """Raises ProfileError when the file cannot be read, IdentityError, naming every field, when it was made for
    something else than ``identity``."""
    try:
        profile = msgspec.json.decode(file.read_bytes(), type=Profile)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ProfileError(f"{file}: no readable profile ({error})") from error
    if identity is not None:
        profile.identity.require(identity, f"the profile {file}")
    return profile


def _binned(pooled: np.ndarray, positions: np.ndarray) -> tuple[tuple[int, ...], tuple[tuple[float, ...], ...]]:
    """Mean deviation by bin of the position and by layer, for the bins that hold a token."""
    bins = np.digitize(positions, EDGES) - 1
    used = np.unique(bins)
    heat = tuple(tuple(pooled[bins == b].mean(axis=0, dtype=np.float64).tolist()) for b in used)
    return tuple(EDGES[b] for b in used), heat


def _nullable(values: np.ndarray) -> tuple[float | None, ...]:
    return tuple(None if np.isnan(v) else float(v) for v in values)
