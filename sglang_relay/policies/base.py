"""The interface of a recompute policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from sglang_relay.budget import Budget, Kind

Signal = Literal["none", "deviation", "probe"]

KEYS_AND_VALUES = 0.1
"""Of a layer, what a row takes that needs no more of it than K and V: no attention, no feed-forward. Counted as the
policy study counts it (design: policy-study.md, 19.4 and 38.8 % for .2 and .4 of the tokens in 30 layers)."""


def row_layers(layers: int) -> float:
    """Token-layers of a row that runs through all ``layers`` and ends with K and V of the last one."""
    return layers - 1 + KEYS_AND_VALUES


@dataclass(frozen=True, slots=True)
class PromptView:
    """What a policy sees of one prompt when it selects: its approximate reused tokens, segment after segment, n in all.

    offsets: [segments + 1], where each segment starts in the n tokens; the last one is n.
    index: int64 [n], how many tokens of the same donor's text stand before the token in the prompt.
    left: int64 [n], tokens from this one to the end of its segment, itself included; a segment that a chunk cuts ends
    beyond the n tokens.
    signal: float32 [n], reduced over tensor-parallel ranks. ``deviation``: value deviation in [0, 2]. ``probe``:
    attention mass of the probe queries times the norm of the value, not negative. None for policies without a signal.
    influence: float32 [n], attention that the token received while its donor decoded (engine/influence.py), summed over
    ranks; NaN for tokens without. None where it is not collected.
    """

    offsets: tuple[int, ...]
    index: torch.Tensor
    left: torch.Tensor
    signal: torch.Tensor | None
    influence: torch.Tensor | None = None

    @property
    def segments(self) -> int:
        return len(self.offsets) - 1

    def signal_or_raise(self) -> torch.Tensor:
        if self.signal is None:
            raise ValueError("the policy needs a signal")
        return self.signal


class Policy(ABC):
    """Which reused tokens are recomputed.

    Layers ``[enters, whole)`` run over every reused token, layers ``[whole, until)`` over the selected ones, the rest
    over fresh tokens only; ``0 <= enters <= whole <= until <= num_layers``. ``signal`` is what is measured before the
    selection: ``deviation`` at layer ``detect``, or ``probe``, a pass of the prompt's last fresh tokens through all
    layers over the donors' KV, behind which the selected tokens start from their embeddings. With ``none`` the
    selection is known beforehand, and ``whole`` is 0 or the number of layers. The work of a token that is not selected
    ends with layer ``whole - 1``, or, with ``looks_ahead``, with K and V of layer ``whole``.
    """

    name: ClassVar[str]
    signal: ClassVar[Signal]
    budgets: ClassVar[tuple[Kind, ...]] = ()
    """Kinds of budget the policy takes."""
    interpolates: ClassVar[bool] = False
    """Whether what changes on the selected tokens is carried over to the others (attention/interpolation.py)."""
    follows_quotes: ClassVar[bool] = False
    """Whether what the answer quotes of a reused segment is recomputed while it decodes (quotes.py)."""
    reads_influence: ClassVar[bool] = False
    """Whether it selects by decode influence, too, where that is collected."""
    looks_ahead: ClassVar[bool] = False
    """Whether ``deviation`` is measured at layer ``whole``, of which K and V are made of every reused token first."""
    default_budget: Budget | None = None
    """What a request gets that names none; a server's certificate may say otherwise."""
    start: int | None = None
    """The layer that reused tokens can enter with stored hidden states."""
    enters: int = 0
    """The layer that they enter: 0, with their embeddings, or ``start`` on a server that keeps hidden states."""
    whole: int
    until: int

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers

    @property
    def exact(self) -> bool:
        """Whether the repaired KV equals full prefill up to rounding."""
        return self.whole == self.num_layers

    @property
    def detect(self) -> int:
        """The layer at which ``deviation`` is measured: the last that runs over every reused token, or the next."""
        return self.whole if self.looks_ahead else self.whole - 1

    @property
    def probes(self) -> bool:
        return self.signal == "probe"

    @abstractmethod
    def select(self, view: PromptView, budget: Budget | None) -> torch.Tensor:
        """Bool [n]: the tokens that are recomputed from layer ``whole`` on."""

    @abstractmethod
    def expected_share(self, budget: Budget | None) -> float:
        """Expected recomputed share of a reused token's layers, in [0, 1]; what the prefill budget charges."""


def largest(score: torch.Tensor, limit: int) -> torch.Tensor:
    """Bool [n]: the ``limit`` largest of ``score`` [n], ties by position."""
    keep = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    best = torch.argsort(score, descending=True, stable=True)[:limit]
    return keep.index_fill_(0, best, True)  # ``keep[best] = True`` would copy its value from the host, and wait
