"""Repair while decoding: before a decode step, reused tokens that an answer is about to quote are recomputed.

Overlap scheduling launches a step before the host knows the token that it begins with, and that token decides what is
quoted. So the host reads it back, and waits for the step before, unless no token could make a quote: with one request
that is so in a third of the steps (docs/fidelity.md), with many in few. Scheduling itself stays overlapped; the device
is idle while a step is launched.

Runs in front of the step as a pass of its own over the quotes of all requests of the batch, eager, so a step that
replays a captured graph does not change. The pass writes K and V of its rows in all layers, and nothing else.

A request's prompt may be in the tree by now, and other requests of its namespace read the same slots: they find KV that
is closer to exact. Where the tree kept slots of its own instead, made by another request and perhaps exact, nothing is
written.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sglang_relay.engine.backend import RelayAttentionBackend
from sglang_relay.engine.batch_state import require_own_rows_only, without_adapters
from sglang_relay.engine.consensus import digest_of
from sglang_relay.engine.layout import Rows, pool_rows
from sglang_relay.engine.quote_book import Quotes
from sglang_relay.engine.requests import RelayRequest, relay_of
from sglang_relay.engine.stage import Stage
from sglang_relay.plan import Decline
from sglang_relay.quotes import LONGEST, may_quote
from sglang_relay.transfer import on_device, read_back

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_relay.engine.manager import RelayManager
    from sglang_relay.engine.tools import ForwardTools

NOWHERE = 0
"""The slot that SGLang keeps for what nobody reads (mem_cache/allocator/base.py)."""


class QuotedRows(Rows):
    """wanted: per request of the batch, ascending positions of its prompt, and its `Quotes`; None for no rows."""

    def __init__(self, runner: Any, batch: ForwardBatch, wanted: list[tuple[np.ndarray, Quotes] | None]) -> None:
        self.batch, self.device, self.is_batch = batch, batch.out_cache_loc.device, False
        counts = [0 if w is None else len(w[0]) for w in wanted]
        self.starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int64)
        own = [w for w in wanted if w is not None]
        self.positions = np.concatenate([positions for positions, _ in own])
        ids = np.concatenate([quotes.tokens[positions] for positions, quotes in own])
        self.input_ids = on_device(ids, self.device).to(batch.input_ids.dtype)
        self.row_positions = self.tensor(self.positions).to(batch.positions.dtype)
        table, rows = runner.req_to_token_pool.req_to_token, pool_rows(batch)
        ends = [0 if w is None else int(w[0][-1]) + 1 for w in wanted]
        self.slots = [table[row, :end].long() for row, end in zip(rows, ends, strict=True)]
        pairs = [(slots, *w) for slots, w in zip(self.slots, wanted, strict=True) if w is not None]
        now = torch.cat([slots.index_select(0, self.tensor(positions)) for slots, positions, _ in pairs])
        written = torch.cat([quotes.slots(positions) for _, positions, quotes in pairs])
        self.out_loc = torch.where(now == written, now, NOWHERE).to(batch.out_cache_loc.dtype)


def repair_quotes(relay: RelayManager, tools: ForwardTools, reqs: list[Req], batch: ForwardBatch) -> None:
    """``batch`` is about to run: if it decodes, recompute what the answers of ``reqs`` have begun to quote.

    A request whose own quotes cannot be found quotes what it has from there on; after any other failure all requests of
    the batch do. With several ranks all of them agree at every step of a
    batch in which one request may still quote, and once more behind a pass.
    """
    if not batch.forward_mode.is_decode() or len(reqs) != batch.batch_size:
        return
    states = [relay_of(req) for req in reqs]
    watched = [s for s in states if s is not None and s.quotes is not None]
    if not watched:
        return
    failure, stage, wanted, digest = None, None, [], 0
    try:
        require_own_rows_only(batch, adapters=True)
        wanted = _wanted(relay, reqs, states, batch)
        if any(w is not None for w in wanted):
            stage = _stage(tools, batch, wanted)
        digest = digest_of([None if w is None else w[0].tolist() for w in wanted])
    except Decline as decline:
        failure = decline.reason
        relay.log_once(f"quotes:{failure}", f"quotes are not repaired: {decline}")
    except Exception as error:
        failure = relay.failure("quotes", error)
    agreed = relay.consensus.agree(failure is None, digest)
    if agreed and stage is not None and (agreed := _run(relay, tools, batch, stage)):
        for state, found in zip(states, wanted, strict=True):
            if state is not None and found is not None:
                relay.count_quoted(state, found[0])
    if not agreed:
        for state in watched:
            state.quotes = None


def _wanted(
    relay: RelayManager, reqs: list[Req], states: list[RelayRequest | None], batch: ForwardBatch
) -> list[tuple[np.ndarray, Quotes] | None]:
    """Per request."""
    answers = _answers(reqs, states, batch)
    wanted: list[tuple[np.ndarray, Quotes] | None] = [None] * len(reqs)
    for row, (state, answer) in enumerate(zip(states, answers, strict=True)):
        if state is None or state.quotes is None or answer is None:
            continue
        try:
            found = state.quotes.wanted(answer, state.controls.quote_tokens)
            wanted[row] = (found, state.quotes) if len(found) else None
        except Exception as error:
            relay.failure("quotes", error)
            state.quotes = None
    return wanted


def _answers(reqs: list[Req], states: list[RelayRequest | None], batch: ForwardBatch) -> list[list[int] | None]:
    """Per request, the latest tokens of its answer, the one that the step begins with included; None where that one is
    not known and need not be."""
    answers: list[list[int] | None] = [list(req.output_ids[-LONGEST:]) for req in reqs]
    if batch.seq_lens_cpu is None:
        raise RuntimeError("the lengths of a decode batch are not known")
    lengths = batch.seq_lens_cpu.tolist()
    late = [row for row, req in enumerate(reqs) if len(req.origin_input_ids) + len(req.output_ids) < lengths[row]]
    if any(_decides(answers[row], states[row]) for row in late):
        (begun,) = read_back([batch.input_ids])
        for row in late:
            answers[row] = [*(answers[row] or ()), int(begun[row])]
    else:
        for row in late:
            answers[row] = None
    return answers


def _decides(answer: list[int] | None, state: RelayRequest | None) -> bool:
    """Whether the token behind ``answer`` decides if something is quoted."""
    quotes = None if state is None else state.quotes
    return bool(quotes is not None and answer and may_quote(quotes.tokens, answer[-1], quotes.stale()))


def _stage(tools: ForwardTools, batch: ForwardBatch, wanted: list[tuple[np.ndarray, Quotes] | None]) -> Stage:
    rows = QuotedRows(tools.runner, batch, wanted)
    every = np.arange(len(rows.positions))
    backend = RelayAttentionBackend(tools.runner, tools.ops)
    attention = tools.attention.plan(rows.sequences(every), dtype=tools.runner.dtype, device=rows.device)
    return Stage(tools.runner.model, rows, backend, every, attention)


@torch.no_grad()
def _run(relay: RelayManager, tools: ForwardTools, batch: ForwardBatch, stage: Stage) -> bool:
    """Whether the pass succeeded, on all ranks. One that did not leaves some layers recomputed and others not."""
    failure = None
    try:
        with without_adapters(tools.runner, batch):
            stage.keys_and_values(0, relay.num_layers - 1)
    except Exception as error:
        failure = relay.failure("quotes", error)
    if failure is None and stage.failure is not None:
        failure = relay.failure("quotes", stage.failure)
    return relay.consensus.agree(failure is None, 0)
