"""What every relayed forward of one scheduler process works with; made once, at start-up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sglang_relay.attention import AttentionEngine
from sglang_relay.engine.consensus import Consensus
from sglang_relay.engine.graphs import PrefillGraphs
from sglang_relay.ops import Ops
from sglang_relay.rotary import DeltaRotary

if TYPE_CHECKING:
    from sglang_relay.engine.hidden import HiddenStates
    from sglang_relay.engine.influence import Influence


@dataclass(frozen=True, slots=True)
class ForwardTools:
    """runner: the target model's ModelRunner. probe_queries: most last tokens of a prompt that look at its segments.
    graphs: replayed where they fit, None for never. hidden, influence: None where the server keeps none. failure:
    counts and logs a host failure, returns its reason (``RelayManager.failure``)."""

    runner: Any
    rotary: DeltaRotary
    attention: AttentionEngine
    ops: Ops
    probe_queries: int
    graphs: PrefillGraphs | None
    hidden: HiddenStates | None
    influence: Influence | None
    consensus: Consensus
    failure: Callable[[str, BaseException], str]
