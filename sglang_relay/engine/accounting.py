"""What each chunk does to a request's prompt: the per-request report behind ``meta_info["relay"]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang_relay.engine.donors import tokens_of
from sglang_relay.engine.requests import KINDS, RelayRequest
from sglang_relay.index import Approximation, DepthMap
from sglang_relay.plan import Placed, RelayPlan, Segment
from sglang_relay.policies import Policy

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req


def chunk_end(req: Req) -> int:
    """End of the chunk that the scheduler admitted."""
    assert req.extend_end is not None
    return req.extend_end


def begin_chunk(req: Req, state: RelayRequest, depths: DepthMap) -> bool:
    """Start counting anew at a first chunk, and at a new attempt after retraction, from the prefix the tree gave.
    Returns whether it is one."""
    if state.reached == req.prefix_len and state.reached >= 0:
        return False
    for key in (*KINDS, "segments", "quoted"):
        state.report[key] = 0
    state.report["cost"] = 0.0
    if state.report.get("influence") == "used":
        state.report["influence"] = "none"
    state.own.clear()
    state.found = 0
    state.pending, state.reused, state.layers = None, 0, 0.0
    state.placed.clear()
    found = Approximation(0, req.prefix_len)
    if state.relays and req.prefix_len:
        found = depths.look_up(req.extra_key, tokens_of(req), req.prefix_len)
    state.depth = state.inherited_depth = state.report["depth"] = found.depth
    prompt = len(req.origin_input_ids)
    state.report["exact"] = _in_prompt(0, found.start, prompt)
    state.report["approximate"] = state.inherited = _in_prompt(found.start, req.prefix_len, prompt)
    state.inherited_stop = req.prefix_len
    if state.depth == 0:
        _find(state, 0, req.prefix_len)
    return True


def _find(state: RelayRequest, start: int, stop: int) -> None:
    """``[start, stop)`` of the prompt is exact KV that was there already."""
    if stop > start:
        state.own.append((start, stop))
        state.found = stop


def _kind(segment: Segment, policy: Policy) -> str:
    """The report's name for a segment before the policy has selected anything."""
    if segment.exact:
        return "exact"
    return "recomputed" if policy.exact else "relayed"


def _in_prompt(start: int, stop: int, prompt: int) -> int:
    """Tokens of ``[start, stop)`` that belong to the prompt; after a retraction a chunk also extends outputs."""
    return max(0, min(stop, prompt) - start)


def count_chunk(req: Req, state: RelayRequest, plan: RelayPlan | None, policy: Policy | None) -> None:
    """Report one chunk, as planned."""
    prompt, end = len(req.origin_input_ids), chunk_end(req)
    report, at, placed = state.report, req.prefix_len, 0
    if plan is not None and policy is not None:
        for s in plan.segments:
            if s.start > at:
                state.own.append((at, s.start))
            if s.exact:
                _find(state, s.start, s.stop)
            inside = _in_prompt(s.start, s.stop, prompt)
            report[_kind(s, policy)] += inside
            report["segments"] += not s.exact
            placed += inside
            at = s.stop
    if end > at:
        state.own.append((at, end))
    report["fresh"] += _in_prompt(req.prefix_len, end, prompt) - placed
    state.reached = end
    if report["relayed"] + report["recomputed"]:
        if plan is not None or state.pending is None or end < prompt:
            # Else the repair that earlier chunks left to this one did not happen.
            report["declined"] = report["why"] = None
    elif state.relays and report["declined"] is None and end >= prompt and not report["approximate"]:
        report["declined"] = state.shortfall or "nothing_to_reuse"


def count_fallback(req: Req, state: RelayRequest, plan: RelayPlan, policy: Policy) -> None:
    """The stock path recomputed everything that was placed: it is fresh after all."""
    prompt = len(req.origin_input_ids)
    for s in plan.segments:
        inside = _in_prompt(s.start, s.stop, prompt)
        state.report[_kind(s, policy)] -= inside
        state.report["fresh"] += inside
        state.report["segments"] -= not s.exact


def count_recomputed(req: Req, state: RelayRequest) -> None:
    """What earlier chunks had placed has been computed by full prefill, and so is fresh, and may be published."""
    prompt = len(req.origin_input_ids)
    for placed in state.placed:
        inside = _in_prompt(placed.start, placed.stop, prompt)
        state.report["relayed"] -= inside
        state.report["fresh"] += inside
        state.report["segments"] -= 1
        state.reused -= placed.stop - placed.start
    state.pending = None
    state.depth = state.report["depth"] = state.inherited_depth


def note_pending(state: RelayRequest, plan: RelayPlan, policy: Policy) -> None:
    """A probe needs the prompt's end: until it has run, what was placed waits, unpublished."""
    if not policy.probes:
        return
    if plan.last:
        state.pending = None
        state.placed.clear()
        return
    placed = [Placed(s.start, s.stop, s.end, s.index) for s in plan.segments if not s.exact]
    state.placed += placed
    if state.pending is None and placed:
        state.pending = placed[0].start


def own_spans(state: RelayRequest, prompt: int) -> list[tuple[int, int]]:
    """Prompt ranges that are no donor's: computed, or found as exact KV; adjacent ones joined."""
    joined: list[tuple[int, int]] = []
    for start, stop in state.own:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return [(a, min(b, prompt)) for a, b in joined if a < prompt]
