"""Start-up check that the model's layers, run in parts, do what the whole model does.

``forward_split_prefill`` is found by its name, and a name is no proof: a model's may drop the residual between two
parts (SGLang's Gemma-3), or leave one that cannot be handed over (EXAONE-4). So the same tokens run through the model's
own forward and through stages of the relay, all of them, and then ever fewer over the K and V of the others. What both
leave is compared: logits, and K and V of every layer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch

from sglang_relay.engine.made_up import MadeUp, borrowed, forward_stream, prepared
from sglang_relay.engine.rotary_probe import ROUNDING

if TYPE_CHECKING:
    from sglang_relay.engine.tools import ForwardTools
    from sglang_relay.engine.tree import RelayCache

logger = logging.getLogger(__name__)

DIFFERS = "layer_split_differs"
FAILED = "layer_split_failed"

_REQUESTS, _TOKENS = 8, 8
_NOISE = 4.0
"""A batch and its two halves, one after the other, differ by rounding alone; stages may differ by so many times as
much (and by `ROUNDING`)."""
_MOST = 0.5
"""No rounding explains more: a lost residual is off by the size of what is compared."""

T = TypeVar("T")
Parts = Sequence[tuple[int, np.ndarray]]
"""The layer at which each part begins, and its rows."""


class _Left(NamedTuple):
    """What a pass left. logits: [requests, vocab]. keys, values: of each layer, [rows, heads * dim]."""

    logits: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


def split_reason(tree: RelayCache, tools: ForwardTools, chunk: int | None) -> str | None:
    """Why the relay cannot run this model's layers in parts, or None; the same on every rank, all of which must call
    it. chunk: most rows of a prefill forward, None without a limit."""
    failure, error, allowed = None, math.nan, 0.0
    requests = _REQUESTS if chunk is None else max(1, min(_REQUESTS, chunk // _TOKENS))
    try:
        with (
            borrowed(tree, tools.consensus, tools.runner, requests=requests, tokens=_TOKENS) as made,
            forward_stream(tools.runner),
            torch.no_grad(),
        ):
            error, allowed = _Comparison(tools, made).run()
    except Exception as caught:  # on all ranks
        failure = caught
    if not tools.consensus.agree(failure is None, 0):
        logger.warning("relay: the model's layers do not run in parts", exc_info=failure)
        return FAILED
    alike = tools.consensus.agree(error <= allowed, 0)
    level = logging.INFO if alike else logging.WARNING
    logger.log(level, "relay: layers run in parts are %.2g from the whole model, %.2g is allowed", error, allowed)
    return None if alike else DIFFERS


class _Comparison:
    """Of passes over the tokens of ``made``. What may fail on one rank alone runs ``_together``."""

    def __init__(self, tools: ForwardTools, made: MadeUp) -> None:
        self._tools = tools
        self._runner = runner = tools.runner
        self._made = made
        self._layers: int = runner.model_config.num_hidden_layers
        self._pool = runner.token_to_kv_pool
        self._requests = len(made.rows)
        self._tokens = min(_TOKENS, made.slots.shape[1], tools.rotary.positions)
        self._slots = made.slots[:, : self._tokens].flatten()

    def run(self) -> tuple[float, float]:
        """How far stages are from the model's own forward, and how far they may be."""
        rows, half = np.arange(self._requests * self._tokens), self._requests // 2
        ends = rows % self._tokens == self._tokens - 1
        cuts = sorted({0, min(1, self._layers - 1), self._layers // 2})
        all_rows = [(cut, rows) for cut in cuts]
        ever_fewer = [(cut, rows[(rows % 3 >= left_out) | ends]) for left_out, cut in enumerate(cuts)]
        own = self._own([slice(None)])
        halves = self._own([slice(half), slice(half, None)]) if half else own
        staged = [(self._staged(parts, own), parts) for parts in (all_rows, ever_fewer)]

        def distances() -> tuple[float, float]:
            pool = max(ROUNDING[dtype] for dtype in (self._runner.dtype, self._pool.dtype))
            allowed = min(_MOST, max(pool, _NOISE * self._apart(halves, own, all_rows)))
            return max((self._apart(left, own, parts) for left, parts in staged), key=_nan_last), allowed

        return self._together(distances)

    def _together(self, step: Callable[[], T]) -> T:
        """``step``, which has no collective in it. Raises on every rank where it fails on one."""
        result, failure = None, None
        try:
            result = step()
        except Exception as error:
            failure = error
        if not self._tools.consensus.agree(failure is None, 0):
            raise RuntimeError("the comparison failed on a rank") from failure
        return result  # type: ignore[return-value]

    def _own(self, requests: list[slice]) -> _Left:
        """The model's own forward, of one batch after another."""
        logits = []
        for some in requests:
            batch = self._together(lambda some=some: self._made.batch(0, self._tokens, some))
            output = self._runner.forward(batch).logits_output
            logits.append(self._together(lambda output=output: output.next_token_logits.float()))
        return self._together(lambda: self._read(torch.cat(logits)))

    def _staged(self, parts: Parts, own: _Left) -> _Left:
        """Stages of the relay over K and V of ``own``, without those that they have to write."""
        batch = self._together(lambda: self._made.batch(0, self._tokens))
        self._together(lambda: self._erase(parts, own))
        logits = prepared(self._tools, batch).run_in_parts(parts)
        return self._together(lambda: self._read(logits.next_token_logits.float()))

    def _read(self, logits: torch.Tensor) -> _Left:
        keys, values = (
            [b[self._slots].flatten(1) for b in kind] for kind in (self._pool.k_buffer, self._pool.v_buffer)
        )
        return _Left(logits, keys, values)

    def _erase(self, parts: Parts, own: _Left) -> None:
        for kept, buffers in ((own.keys, self._pool.k_buffer), (own.values, self._pool.v_buffer)):
            for layer, rows in self._written(parts):
                buffers[layer][self._slots] = kept[layer].view(-1, *buffers[layer].shape[1:])
                buffers[layer][self._slots[rows]] = 0

    def _written(self, parts: Parts) -> list[tuple[int, torch.Tensor]]:
        """Per layer, the rows that run there."""
        stops = [*(start for start, _ in parts[1:]), self._layers]
        rows = [torch.from_numpy(rows).to(self._slots.device) for _, rows in parts]
        return [
            (layer, of_part)
            for (start, _), stop, of_part in zip(parts, stops, rows, strict=True)
            for layer in range(start, stop)
        ]

    def _apart(self, left: _Left, own: _Left, parts: Parts) -> float:
        pairs = [(left.logits, own.logits)]
        for layer, rows in self._written(parts):
            pairs += [(a[layer][rows], b[layer][rows]) for a, b in ((left.keys, own.keys), (left.values, own.values))]
        return float(torch.stack([_distance(a.float(), b.float()) for a, b in pairs]).max())


def _distance(found: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Relative, of the median row: rounding that tips a router sends single rows elsewhere."""
    return ((found - want).norm(dim=1) / want.norm(dim=1).clamp_min(1e-30)).median()


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value
