"""Hidden states that enter the first untrusted layer (RelayCaching, arXiv 2603.13289; design: method.md, "While the
producer decodes"), kept per KV slot: a reused segment enters there instead of at its embeddings.

Written through the callback that SGLang's decoder layers offer for auxiliary hidden states (``capture_output``,
layers/layer_boundary/stage.py): it hands over the residual that the layer's input norm has just written, so it costs no
further computation; with tensor parallelism the sum that this norm would have fused is completed before it. A hook
passes the callback to the one layer; ``layers_to_capture`` would make the model return these states beside its output,
which its logits processor then has to expect.

Each forward first marks the slots whose KV it writes as not held, and the callback marks them as held. A slot whose
token did not pass the layer (a copied one that no policy recomputed) stays without. Nothing but forwards writes slots
where states are kept (``hidden_reason``).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from sglang_relay.config import RelayConfig
from sglang_relay.engine.guards import beside_slots_reason

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

logger = logging.getLogger(__name__)


class HiddenStates:
    """layer: the one that the states enter. states: [slots, hidden size], of the KV's dtype. held: bool [slots],
    whether there is one. failure: counts and logs a host failure."""

    def __init__(self, runner: Any, layer: int, failure: Callable[[str, BaseException], str]) -> None:
        keys = runner.token_to_kv_pool.k_buffer[0]
        self._failure = failure
        self.layer = layer
        shape = keys.shape[0], runner.model_config.hidden_size
        self.states = torch.zeros(shape, dtype=keys.dtype, device=keys.device)
        self.held = torch.zeros(keys.shape[0], dtype=torch.bool, device=keys.device)
        _decoder_layer(runner, layer).register_forward_pre_hook(self._before, with_kwargs=True)

    def as_dict(self) -> dict[str, Any]:
        return {"layer": self.layer, "bytes": self.states.nbytes + self.held.nbytes}

    def begin(self, batch: ForwardBatch) -> None:
        """``batch`` is about to run. On a rank where this fails no state is held any more, which the ranks notice where
        one of them would use it."""
        try:
            self.held[batch.out_cache_loc] = False
        except Exception as error:
            self._failure("hidden_states", error)
            self.held.fill_(False)

    def of(self, slots: torch.Tensor) -> torch.Tensor | None:
        """[n, hidden size]: the states of ``slots`` [n]; None where one of them has none. Waits for the device."""
        return self.states.index_select(0, slots) if bool(self.held.index_select(0, slots).all()) else None

    def _before(self, layer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """layer: ``forward(positions, hidden_states, forward_batch, capture_output=None)``."""
        batch = args[2] if len(args) > 2 else kwargs["forward_batch"]

        def keep(value: torch.Tensor, owned: bool = False) -> None:
            try:
                self.states[batch.out_cache_loc] = value.to(self.states.dtype)
                self.held[batch.out_cache_loc] = True
            except Exception as error:
                self._failure("hidden_states", error)

        return args, {**kwargs, "capture_output": keep}


def _decoder_layer(runner: Any, layer: int) -> Any:
    return runner.model.model.layers[layer]


def hidden_reason(runner: Any, config: RelayConfig, layer: int, args: Any) -> str | None:
    """Why this server keeps no hidden states of ``layer``, or None. args: sglang's ServerArgs."""
    if config.entry != "hidden":
        return "off"
    if layer == 0:
        return "first_layer"  # what enters it are the embeddings
    try:
        known = inspect.signature(_decoder_layer(runner, layer).forward).parameters
    except (AttributeError, IndexError):
        known = {}
    return beside_slots_reason(runner, args) if "capture_output" in known else "model_without_capture"


def hidden_of(runner: Any, layer: int, failure: Callable[[str, BaseException], str]) -> HiddenStates:
    """Where ``hidden_reason`` finds nothing in the way."""
    kept = HiddenStates(runner, layer, failure)
    logger.info("relay: hidden states are kept: %s", kept.as_dict())
    return kept
