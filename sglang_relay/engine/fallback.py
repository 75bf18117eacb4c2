"""``ModelRunner.forward`` of a planned batch: relayed, or stock after a host failure, or both for an audit."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sglang.srt.model_executor.model_runner import ModelRunnerOutput

from sglang_relay.engine.audit import AUDITED, divergence
from sglang_relay.engine.batch_state import require_own_rows_only, without_adapters
from sglang_relay.engine.consensus import digest_of
from sglang_relay.engine.forward import StagedForward
from sglang_relay.plan import Decline
from sglang_relay.transfer import on_device

if TYPE_CHECKING:
    from sglang_relay.engine.manager import BatchPlan, RelayManager
    from sglang_relay.engine.tools import ForwardTools


def relay_forward(
    original: Any,
    relay: RelayManager,
    tools: ForwardTools,
    planned: BatchPlan,
    runner: Any,
    batch: Any,
    *args,
    **kwargs,
) -> ModelRunnerOutput:
    """ModelRunner.forward of a planned batch; the stock forward of the whole batch after any host failure.

    The stock forward writes K and V of every extended row itself, so whatever was placed before is overwritten.
    """
    began = time.perf_counter()
    watch = None if relay.costs is None else relay.costs.start(runner.device)
    staged, reason, step, digest = None, None, "prepare", 0
    try:
        staged = StagedForward(tools, batch, planned)
        require_own_rows_only(batch)
        staged.prepare()
        step = "place"
        staged.place()
        digest = digest_of(len(planned.plans), staged.entered)
    except Decline as decline:
        reason, planned.why = decline.reason, decline.detail
    except Exception as error:
        reason = relay.failure(step, error)
    placed = time.perf_counter()
    if relay.consensus.agree(reason is None, digest) and staged is not None:
        try:
            with torch.no_grad(), without_adapters(runner, batch):
                logits, work = staged.run()
        except Decline as decline:
            reason, planned.why = decline.reason, decline.detail
        except Exception as error:
            reason = relay.failure("forward", error)
        else:
            if planned.audits:
                del staged  # the stock forward needs its memory
                return _audited(original, relay, planned, logits, runner, batch, *args, **kwargs)
            runner.forward_pass_id += 1
            relay.guarded("report", None, relay.count_work, planned, work)
            relay.stats.place_seconds += placed - began
            relay.stats.forward_seconds += time.perf_counter() - placed
            relay.guarded("report", None, relay.stats.batch)
            if relay.costs is not None:
                relay.guarded("time", None, relay.costs.take_relayed, watch, batch, planned.policy, planned.plans, work)
            return ModelRunnerOutput(logits_output=logits, can_run_graph=False)
    del staged  # the stock forward needs its memory, the more so if that was what failed
    planned.fell_back = reason or "ranks_disagree"
    relay.guarded("report", None, relay.stats.fallback)
    return original(runner, batch, *args, **kwargs)


def _audited(
    original: Any, relay: RelayManager, planned: BatchPlan, relayed: Any, runner: Any, batch: Any, *args, **kwargs
) -> ModelRunnerOutput:
    """The stock forward of the whole batch, after the relayed one, whose distributions it judges."""
    planned.fell_back, rows, guess = AUDITED, None, None
    try:
        rows = on_device(np.array([planned.plans[i].row for i in planned.audits]), batch.out_cache_loc.device)
        guess = relayed.next_token_logits.index_select(0, rows)
    except Exception as error:  # a rank that left here would leave the others waiting in the stock forward
        relay.failure("audit", error)
    output = original(runner, batch, *args, **kwargs)

    def measured() -> list[float]:
        if rows is None or guess is None:
            raise RuntimeError("the relayed logits were not kept")
        return divergence(guess, output.logits_output.next_token_logits.index_select(0, rows))

    relay.guarded("audit", None, relay.record_audits, planned, measured)
    return output
