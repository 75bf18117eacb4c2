"""What a relay forward does on the device beside the model and its attention: one interface per piece of work."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np
import torch

from sglang_relay.attention.interpolation import Carrier


class Copier(Protocol):
    """Made once per server, for the buffers of its KV pool."""

    name: str

    def copy_turned(self, donors: torch.Tensor, own: torch.Tensor, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy K and V of slots ``donors`` to slots ``own``, keys turned from positions ``source`` to ``target``, in
        all layers; each int64 [n] on the pool's device. Launched on the current stream; does not wait for the device.

        No slot may be in both: in a forward, donors' slots are the tree's, which keeps them locked, and the others were
        allocated for the request. ``own`` are distinct.
        """
        ...


class Deviation(Protocol):
    name: str

    def distances(
        self, fresh: torch.Tensor, rows: torch.Tensor, cached: torch.Tensor, slots: torch.Tensor
    ) -> torch.Tensor:
        """float32 [n]: 1 - cosine between row ``rows[i]`` of ``fresh`` and row ``slots[i]`` of ``cached``, summed over
        the heads. Does not wait for the device.

        fresh: [rows, kv_heads, v_dim]; cached: [slots, kv_heads, v_dim], contiguous. rows, slots: int64 [n].
        """
        ...


class ProbeQueries(NamedTuple):
    """The probe queries of one prompt.

    rows: int64 numpy [q], rows of the stage. positions: int64 numpy [q], ascending. keys: int64 numpy [m], ascending
    positions of the keys that they may see, those up to their own; slots: int64 [m], where these lie. wanted: int64
    numpy [n], positions of the keys that are scored, all of them in ``keys``.
    """

    rows: np.ndarray
    positions: np.ndarray
    keys: np.ndarray
    slots: torch.Tensor
    wanted: np.ndarray


class ProbeScores(Protocol):
    """Scores of one stage, which has every prompt's probe queries among its rows."""

    def add(
        self,
        query: torch.Tensor,
        key_buffer: torch.Tensor,
        value_buffer: torch.Tensor,
        scaling: float,
        weight: float,
    ) -> None:
        """Add one layer's scores: per wanted key, its softmax mass under each probe query, over all keys that the query
        sees, times the norm of its value, summed over queries and heads, times ``weight``. Does not wait for the
        device.

        query: [rows, heads, head_dim], all rows of the stage; key_buffer, value_buffer: [slots, kv_heads, dim].
        """
        ...

    def totals(self) -> list[torch.Tensor]:
        """Per prompt, float32 [n], over this rank's heads."""
        ...


class ProbeScorer(Protocol):
    name: str

    def plan(self, prompts: list[ProbeQueries], *, dtype: torch.dtype, device: torch.device) -> ProbeScores:
        """Host work, once per stage. dtype: of the queries."""
        ...


class Ops(NamedTuple):
    """Chosen once, at start-up (`ops.choice`)."""

    copier: Copier
    deviation: Deviation
    probe: ProbeScorer
    carrier: Carrier

    def names(self) -> dict[str, str]:
        """Which implementation does what."""
        return {
            "copy": self.copier.name,
            "deviation": self.deviation.name,
            "probe": self.probe.name,
            "interpolation": self.carrier.name,
        }
