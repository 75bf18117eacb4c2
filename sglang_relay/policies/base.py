"""The interface of a recompute policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class SelectionView:
    """What a policy sees of one segment when it selects.

    deviation: float32 [n], value deviation of each of the segment's tokens in this chunk, in [0, 2], already reduced
    over tensor-parallel ranks. positions: int64 [n], their positions in the prompt. end: position at which the whole
    segment ends. budget: the largest share of the n tokens that may be selected, or None.
    """

    deviation: torch.Tensor
    positions: torch.Tensor
    end: int
    budget: float | None


class Policy(ABC):
    """Which reused tokens are recomputed.

    Layers ``[0, whole)`` run over every reused token, layers ``[whole, until)`` over the selected ones, the rest over
    fresh tokens only. ``0 <= whole <= until <= num_layers``. Deviation is measured at layer ``whole - 1`` when
    ``selects`` is true. The work of a token that is not selected ends with layer ``whole - 1``.
    """

    name: str
    whole: int
    until: int
    selects: bool

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers

    @property
    def exact(self) -> bool:
        """Whether the repaired KV equals full prefill up to rounding."""
        return self.whole == self.num_layers

    @abstractmethod
    def select(self, view: SelectionView) -> torch.Tensor:
        """Bool [n]: the tokens of the segment that stay active from layer ``whole`` on."""

    @abstractmethod
    def expected_share(self) -> float:
        """Expected recomputed share of a reused token's layers, in [0, 1]; what the prefill budget charges."""
