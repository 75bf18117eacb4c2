"""The plugin behind plugins.Inspector. Runs inside the server's processes; must not import from the tests."""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import random
import sys
import time
from array import array
from collections import Counter
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

_FOLDER = Path(os.environ["RELAY_TEST_INSPECTOR"])
_PEAK = {"running": 0, "rows": 0, "stage_rows": 0}
_WATCHED: set[type] = set()
_BROKEN: Counter[str] = Counter()
"""Invariants of the scheduler that a step has broken, and how often."""


def load() -> None:
    controller = "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController"
    HookRegistry.register(f"{controller}.get_internal_state", answer, HookType.AFTER)
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.process_batch_result", watch, HookType.BEFORE)
    batch = "sglang.srt.managers.schedule_batch.ScheduleBatch"
    HookRegistry.register(f"{batch}.prepare_for_extend", watch_admission, HookType.BEFORE)
    runner = "sglang.srt.model_executor.model_runner.ModelRunner"
    HookRegistry.register(f"{runner}._forward_raw", watch_rows, HookType.BEFORE)
    manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
    HookRegistry.register(f"{manager}.get_internal_state", in_front, HookType.BEFORE)


def watch(scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Keep the greatest number of KV slots that running requests have held between two steps, and see that no donor is
    locked there."""
    _PEAK["running"] = max(_PEAK["running"], _running(scheduler))
    relay = getattr(scheduler.tree_cache, "relay", None)
    _BROKEN["donor locks"] += relay is not None and relay.donors.locked != 0


def watch_admission(batch: Any, *args: Any, **kwargs: Any) -> None:
    """What SGLang takes for granted of an admitted prefill; on any server, with or without the relay."""
    from sglang.srt.runtime_context import get_schedule

    unfinished = [r for r in batch.reqs if r.extend_end < len(r.full_untruncated_fill_ids)]
    _BROKEN["unfinished prompts"] += len(unfinished) > 1
    _BROKEN["unknown unfinished prompt"] += any(r is not batch.chunked_req for r in unfinished)
    chunk = get_schedule().chunked_prefill_size
    _BROKEN["rows"] += 0 < chunk < sum(r.extend_end - r.prefix_len for r in batch.reqs)
    _BROKEN["requests twice"] += len({r.rid for r in batch.reqs}) < len(batch.reqs)
    # A prompt goes on where its last chunk ended: what lies between was never computed.
    _BROKEN["answer before its prompt"] += any(
        r.output_ids and r.prefix_len < len(r.origin_input_ids) and r.retraction_count == 0 for r in batch.reqs
    )


def watch_rows(runner: Any, batch: Any, *args: Any, **kwargs: Any) -> None:
    """The widest prefill that ran on SGLang's own path."""
    if batch.forward_mode.is_extend():
        _PEAK["rows"] = max(_PEAK["rows"], batch.input_ids.shape[0])


def _running(scheduler: Any) -> int:
    free = scheduler.token_to_kv_pool_allocator.available_size()
    return scheduler.max_total_num_tokens - free - scheduler.tree_cache.evictable_size()


def answer(result: Any, controller: Any, *args: Any, **kwargs: Any) -> None:
    asked = _FOLDER / "question.json"
    if not asked.exists():
        return
    question = json.loads(asked.read_text(encoding="utf-8"))
    asked.unlink()
    reply = QUESTIONS[question["question"]](controller.scheduler, **question["arguments"])
    (_FOLDER / "answer.json").write_text(json.dumps(reply), encoding="utf-8")


def in_front(*args: Any, **kwargs: Any) -> None:
    """Answer what is asked of the front end before it asks the scheduler."""
    asked = _FOLDER / "question.json"
    if asked.exists() and json.loads(asked.read_text(encoding="utf-8"))["question"] == "kept_reports":
        asked.unlink()
        (_FOLDER / "answer.json").write_text(json.dumps(kept_reports()), encoding="utf-8")


def kept_reports() -> int:
    """Reports that anything in this process holds."""
    gc.unfreeze()  # SGLang hides what there is at start-up from the collector
    gc.collect()
    held = (v for holder in gc.get_objects() for v in gc.get_referents(holder))
    return len({id(v) for v in held if type(v) is dict and "match_ms" in v})


# ---------------------------------------------------------------------- questions


def _slots(scheduler: Any, tokens: list[int], extra_key: str | None, salt: str | None, namespace: Any) -> Any:
    from sglang.srt.mem_cache.base_prefix_cache import MatchPrefixParams
    from sglang.srt.mem_cache.radix_cache import RadixKey

    tree = scheduler.tree_cache
    if namespace is not None:
        from sglang_relay.engine.namespaces import Tenant

        tenant = Tenant(extra_key, salt, namespace.get("scope"))
        extra_key = tree.relay.namespaces.key(tenant, namespace["tier"])
    key = RadixKey(array("q", tokens), extra_key, cache_salt=salt)
    match = tree.match_prefix(MatchPrefixParams(key=key))
    return tree.path_device_indices(match.last_device_node)[: match.device_prefix_len]


def rows(scheduler: Any, *key: Any, **keys: Any) -> list[str]:
    slots = _slots(scheduler, *key, **keys)
    pool = scheduler.tp_worker.model_runner.token_to_kv_pool
    digests = [hashlib.blake2b(digest_size=8) for _ in range(len(slots))]
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        for digest, row in zip(digests, buffer[slots].contiguous().numpy(), strict=True):
            digest.update(row.tobytes())
    return [d.hexdigest() for d in digests]


def influence(scheduler: Any, *key: Any, **keys: Any) -> list[float | None]:
    scores = scheduler.tree_cache.relay.influence.of(_slots(scheduler, *key, **keys)).tolist()
    return [None if score != score else score for score in scores]


def hidden(scheduler: Any, *key: Any, **keys: Any) -> list[list[float] | None]:
    kept, slots = scheduler.tree_cache.relay.hidden, _slots(scheduler, *key, **keys)
    return [state if held else None for state, held in zip(kept.states[slots].tolist(), kept.held[slots], strict=True)]


def forget_hidden(scheduler: Any, tokens: list[int]) -> None:
    """The last of ``tokens`` has no hidden state."""
    scheduler.tree_cache.relay.hidden.held[_slots(scheduler, tokens, None, None, None)[-1]] = False


def module_hooks(scheduler: Any) -> int:
    """Forward hooks on the model's modules."""
    modules = scheduler.tp_worker.model_runner.model.modules()
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def pool(scheduler: Any) -> dict[str, int]:
    """running: slots that running requests hold; held: those and what the tree keeps; peak: the greatest running since
    this was last asked."""
    peak, _PEAK["running"] = _PEAK["running"], 0
    free = scheduler.token_to_kv_pool_allocator.available_size()
    return {"running": _running(scheduler), "held": scheduler.max_total_num_tokens - free, "peak": peak}


def broken(scheduler: Any) -> dict[str, int]:
    return {what: count for what, count in _BROKEN.items() if count}


def widest(scheduler: Any) -> dict[str, int]:
    """Rows of the widest prefill on SGLang's path, and of the widest stage, since this was last asked."""
    found = {"stock": _PEAK["rows"], "stage": _PEAK["stage_rows"]}
    _PEAK["rows"] = _PEAK["stage_rows"] = 0
    from sglang_relay.engine.stage import Stage

    if Stage not in _WATCHED:
        original = Stage.__init__

        def counting(self: Any, model: Any, layout: Any, backend: Any, rows: Any, *args: Any, **kwargs: Any) -> None:
            _PEAK["stage_rows"] = max(_PEAK["stage_rows"], len(rows))
            original(self, model, layout, backend, rows, *args, **kwargs)

        Stage.__init__ = counting
        _WATCHED.add(Stage)
    return found


def kept_text(scheduler: Any) -> int:
    """Characters of the longest text that the relay holds, not counting what requests and the tree do."""
    relay = scheduler.tree_cache.relay
    waiting: list[Any] = list(vars(relay).values())
    seen = {id(one) for one in (scheduler, relay, relay.tree, relay.tools, relay.hidden, relay.influence)}
    longest = 0
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, (type, ModuleType, FunctionType, MethodType)):
            continue
        seen.add(id(one))
        if isinstance(one, (str, bytes)):
            longest = max(longest, len(one))
        waiting += gc.get_referents(one)
    return longest


def hooked(scheduler: Any) -> list[str]:
    """Functions of SGLang that the relay has hooked in this process."""
    patched = HookRegistry._patched
    return sorted(
        target
        for target, hooks in HookRegistry._hooks.items()
        if target in patched and any(source is not None and source.plugin_name == "relay" for *_, source in hooks)
    )


def gather(scheduler: Any, count: int) -> None:
    """Schedule nothing, once a request has come, before ``count`` of them wait (or half a minute has passed)."""
    original = scheduler.ingest_requests

    def ingest() -> Any:
        result = original()
        if scheduler.waiting_queue:
            deadline = time.monotonic() + 30
            while len(scheduler.waiting_queue) < count and time.monotonic() < deadline:
                time.sleep(0.001)
                original()
            del scheduler.ingest_requests
        return result

    scheduler.ingest_requests = ingest


def secret(scheduler: Any) -> str:
    return scheduler.tree_cache.relay.namespaces.secret


# ---------------------------------------------------------------------- faults


class Injected(RuntimeError):
    """What a broken step raises."""


def _raising(*args: Any, **kwargs: Any) -> Any:
    raise Injected("broken by a test")


def _corrupt_slots(scheduler: Any) -> Any:
    tree = scheduler.tree_cache
    original = tree.path_device_indices

    def beyond_the_pool(*args: Any, **kwargs: Any) -> Any:
        slots = original(*args, **kwargs).clone()
        slots[-1] = 1 << 40
        return slots

    return tree, "path_device_indices", beyond_the_pool


def _wrong_rotation() -> Any:
    """Keys turned 37 positions too far."""
    from sglang_relay.rotary import DeltaRotary

    original = DeltaRotary.factors

    def factors(self: Any, source: Any, target: Any) -> Any:
        return original(self, source, (target + 37).clamp_max(self.positions - 1))

    return DeltaRotary, "factors", factors


def _stale_donor(scheduler: Any) -> Any:
    """The slots of other tokens: the donor's own, 61 tokens away."""
    tree = scheduler.tree_cache
    original = tree.path_device_indices

    def moved(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs).roll(61)

    return tree, "path_device_indices", moved


def _corrupt_copy() -> Any:
    """Every fourth placed token gets the values of the first one, ten times as large."""
    from sglang_relay.ops import torch_ops

    original = torch_ops.realign

    def corrupting(keys: Any, values: Any, source: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
        original(keys, values, source, target, *args, **kwargs)
        for buffer in values:
            buffer[target[::4]] = 10 * buffer[target[:1]]

    return torch_ops, "realign", corrupting


def _counted_short() -> Any:
    """Chunks seem to end 40 tokens early, as where SGLang takes a part of a prompt for all of it."""
    from sglang_relay.engine import manager

    original = manager.count_chunk

    def count_chunk(req: Any, state: Any, *args: Any) -> None:
        original(req, state, *args)
        state.reached -= 40

    return manager, "count_chunk", count_chunk


def _places(scheduler: Any) -> dict[str, Any]:
    from sglang_relay import index
    from sglang_relay.attention import Interpolation, engines
    from sglang_relay.engine import forward, manager, stage
    from sglang_relay.ops import torch_ops
    from sglang_relay.plan import RelayPlan
    from sglang_relay.policies.probe import Probe

    return {
        "adopt": (manager, "new_report", _raising),
        "match": (index.ContentIndex, "match", _raising),
        "plan": (RelayPlan, "check", _raising),
        "prepare": (forward.StagedForward, "prepare", _raising),
        "place": (torch_ops, "realign", _raising),
        "forward": (forward.StagedForward, "run", _raising),
        "attention": (engines, "attend", _raising),
        "interpolate": (Interpolation, "apply", _raising),
        "hand_over": (stage.Stage, "take_over", _raising),
        "select": (Probe, "select", _raising),
        "learn": (index.ContentIndex, "learn", _raising),
        "slots": _corrupt_slots(scheduler),
        "rotation": _wrong_rotation(),
        "stale": _stale_donor(scheduler),
        "corrupt": _corrupt_copy(),
        "counted_short": _counted_short(),
    }


_UNDO: list[tuple[Any, str, Any, bool]] = []


def break_(scheduler: Any, what: str | None) -> str | None:
    while _UNDO:
        owner, name, original, own = _UNDO.pop()
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)
    if what is not None:
        owner, name, broken = _places(scheduler)[what]
        _UNDO.append((owner, name, getattr(owner, name), name in vars(owner)))
        setattr(owner, name, broken)
    return what


# ---------------------------------------------------------------------- failures at the boundary


class _Injector:
    """Makes calls between SGLang and the relay fail: one place at its next call, or each call by chance."""

    def __init__(self) -> None:
        self.place: str | None = None
        self.share = 0.0
        self.random = random.Random()
        self.failed: Counter[str] = Counter()

    def wrap(self, owner: Any, name: str, *, theirs: bool) -> str:
        """theirs: of SGLang, which calls it, too: only calls of the relay fail."""
        original = getattr(owner, name)
        place = f"{owner.__name__.rpartition('.')[2]}.{name}"

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            ours = sys._getframe(1).f_globals.get("__name__", "").startswith("sglang_relay")
            if (ours or not theirs) and self.hits(place):
                raise Injected(f"{place} broken by a test")
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)
        return place

    def hits(self, place: str) -> bool:
        hit = place == self.place or self.random.random() < self.share
        if hit:
            self.place = None
            self.failed[place] += 1
        return hit


_INJECTOR = _Injector()


def _boundary(tree: Any) -> dict[bool, list[tuple[Any, str]]]:
    """Where SGLang calls the relay, and what that calls first; and, under True, what the relay calls of SGLang."""
    from sglang_relay.engine import costing, fallback, hooks, manager, quotes, report, requests
    from sglang_relay.engine import tree as tree_module
    from sglang_relay.engine.audit import Auditor
    from sglang_relay.engine.costing import Costs
    from sglang_relay.engine.donors import Donors
    from sglang_relay.engine.forward import StagedForward
    from sglang_relay.engine.hidden import HiddenStates
    from sglang_relay.engine.influence import Influence
    from sglang_relay.engine.learning import Learning
    from sglang_relay.engine.matching import Matcher
    from sglang_relay.engine.planning import Planner

    relay = "adopt agree_on company wait propose plan finish record_audits count_work count_quoted finished"
    ours = {
        hooks: "repair_quotes recompute_placed",
        fallback: "require_own_rows_only divergence",
        quotes: "require_own_rows_only quoted",
        manager: "new_report read_controls request_reason batch_reason neighbour_reason begin_chunk count_chunk "
        "count_fallback note_pending broken_invariant",
        tree_module: "answered_too_early",
        manager.RelayManager: f"{relay} _admitted _agreed_plan _plan _settle _decline _decline_all _count policy_of",
        Auditor: "admits choose count record",
        Learning: "learn mark_depth on_flush on_weights start_over",
        Donors: "candidates available prefix_held hold touch release",
        Matcher: "pieces",
        Planner: "plan",
        Costs: "choose take_relayed",
        costing: "Stopwatch measurable stock_features together",
        StagedForward: "__init__ prepare place run",
        Influence: "admit begin end before_insert after_insert",
        HiddenStates: "begin",
        report.Stats: "decline finished batch audit fallback",
        requests.RelayRequest: "__init__",
    }  # fmt: skip
    theirs = {type(tree): "lock unlock path_device_indices touch_prefix evictable_size"}
    theirs[type(tree.tree_core)] = "match_full_device_prefix"
    split = {False: ours, True: theirs}
    return {side: [(o, n) for o, names in of.items() for n in names.split()] for side, of in split.items()}


def inject(scheduler: Any, place: str | None = None, share: float = 0.0, seed: int = 0) -> dict[str, Any]:
    """From now on ``place`` fails at its next call, or a ``share`` of all calls. Returns all places, and those that
    have failed since this was last asked."""
    from sglang_relay.cost import CostModel

    if not _PLACES:
        CostModel.saves = lambda *args, **kwargs: True  # a tiny model's prefill is never slower
        for theirs, targets in _boundary(scheduler.tree_cache).items():
            _PLACES.extend(_INJECTOR.wrap(owner, name, theirs=theirs) for owner, name in targets)
    failed = dict(_INJECTOR.failed)
    _INJECTOR.failed.clear()
    _INJECTOR.place, _INJECTOR.share, _INJECTOR.random = place, share, random.Random(seed)
    return {"places": _PLACES, "failed": sorted(failed), "count": sum(failed.values())}


_PLACES: list[str] = []


def locks(scheduler: Any) -> int:
    """Donor locks that are held, and KV slots that nobody may evict though nobody runs."""
    return scheduler.tree_cache.relay.donors.locked + _running(scheduler)


# ---------------------------------------------------------------------- audits


def audit_every(scheduler: Any, every: int) -> None:
    scheduler.tree_cache.relay.auditor._every = every


def half_open(scheduler: Any, tier: str) -> None:
    """The breaker of ``tier``, for requests without key, salt and scope, after gross audits and its rest."""
    from sglang_relay.breaker import Action
    from sglang_relay.engine.namespaces import Tenant

    breaker = scheduler.tree_cache.relay.auditor.breakers.of(tier, Tenant(None, None, None).digest)
    while breaker.admit().action is Action.RELAY:
        breaker.record(float("inf"), breaker.admit().round)
    while breaker.admit().action is Action.STOCK:
        pass


QUESTIONS: dict[str, Any] = {
    "rows": rows,
    "influence": influence,
    "hidden": hidden,
    "forget_hidden": forget_hidden,
    "module_hooks": module_hooks,
    "pool": pool,
    "broken": broken,
    "widest": widest,
    "kept_text": kept_text,
    "hooked": hooked,
    "gather": gather,
    "secret": secret,
    "break": break_,
    "inject": inject,
    "locks": locks,
    "audit_every": audit_every,
    "half_open": half_open,
}
