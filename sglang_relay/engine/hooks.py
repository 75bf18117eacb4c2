"""Hooks on SGLang, applied through its registry and only in a process that serves with the relay backend."""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

from sglang.srt.managers.utils import is_health_check_generate_req
from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

from sglang_relay.engine.adder import adder_class
from sglang_relay.engine.fallback import relay_forward
from sglang_relay.engine.manager import BatchPlan, RelayManager
from sglang_relay.engine.namespaces import Tenant
from sglang_relay.engine.quotes import repair_quotes
from sglang_relay.engine.recompute import recompute_placed
from sglang_relay.engine.report import streamer_class
from sglang_relay.engine.requests import named_scope

SOURCE = HookSource(plugin_name="relay", dist_name="sglang-relay")

_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_UPDATER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_WEIGHT_UPDATES = (
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "update_weights_from_tensor",
    "update_weights_from_ipc",
    "begin_weight_update",
    "end_weight_update",
)


class Hook(NamedTuple):
    target: str
    kind: HookType
    function: Callable[..., Any]


class SchedulerHooks:
    """The hooks of one scheduler process, bound to its relay."""

    def __init__(self, relay: RelayManager, state: Callable[[], dict[str, Any]]) -> None:
        self.relay = relay
        self.state = state
        self._running: BatchPlan | None = None
        self._reqs: list[Any] = []
        self._adders: dict[type, type] = {}

    def table(self) -> list[Hook]:
        around, after = HookType.AROUND, HookType.AFTER
        internal = "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController"
        hooks = [
            Hook(f"{_SCHEDULER}._create_generation_req", after, self.create_request),
            Hook(f"{_SCHEDULER}.get_output_streamer_class", after, self.streamer),
            Hook(f"{internal}.get_internal_state", after, self.internal_state),
        ]
        if self.relay.unsupported:
            return hooks
        hooks += [
            Hook(f"{_SCHEDULER}.get_prefill_adder_class", after, self.adder),
            Hook("sglang.srt.managers.schedule_batch.ScheduleBatch.prepare_for_extend", around, self.prepare),
            Hook(f"{_SCHEDULER}.run_batch", around, self.run_batch),
            Hook("sglang.srt.model_executor.model_runner.ModelRunner.forward", around, self.forward),
        ]
        return hooks + [Hook(f"{_UPDATER}.{name}", around, self.update_weights) for name in _WEIGHT_UPDATES]

    # ------------------------------------------------------------------ requests and reports

    def create_request(self, req: Any, scheduler: Any, received: Any, *args: Any, **kwargs: Any) -> None:
        if is_health_check_generate_req(received):
            return  # the server's own: no client reads its report, and it is none of the requests that are counted
        tenant, failed = Tenant(req.extra_key, req.cache_salt, named_scope(req.sampling_params.custom_params)), None
        try:
            self.relay.adopt(req, tenant, has_multimodal=received.mm_inputs is not None)
        except Exception as error:
            failed = self.relay.failure("adopt", error)
        self.relay.guarded("adopt", None, self.relay.agree_on, req, tenant, failed)

    def streamer(self, base: type, scheduler: Any) -> type:
        return self.relay.guarded("streamer", base, streamer_class, base)

    def internal_state(self, result: Any, controller: Any, *args: Any, **kwargs: Any) -> Any:
        result.internal_state["relay"] = self.relay.guarded("state", {}, self.state)
        return result

    # ------------------------------------------------------------------ scheduling

    def adder(self, base: type, scheduler: Any) -> type:
        if base not in self._adders:
            self._adders[base] = self.relay.guarded("adder", base, adder_class, base, self.relay)
        return self._adders[base]

    def prepare(self, original: Callable[..., None], batch: Any, *args: Any, **kwargs: Any) -> None:
        batch.relay_plan = planned = self.relay.guarded("plan", None, self.relay.plan, batch)
        if self.relay.influence is not None:
            self.relay.guarded("influence", None, self.relay.influence.admit, batch.reqs)
        try:
            original(batch, *args, **kwargs)
        except BaseException:
            if planned is not None:
                self.relay.release(planned.held)
            raise

    def run_batch(self, original: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        planned = batch.__dict__.pop("relay_plan", None)
        self._reqs = batch.reqs
        if planned is None:
            return original(scheduler, batch, *args, **kwargs)
        self._running = planned
        try:
            return original(scheduler, batch, *args, **kwargs)
        finally:
            self._running = None
            self.relay.guarded("finish", None, self.relay.finish, planned)

    def forward(self, original: Callable[..., Any], runner: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        if runner.is_draft_worker or self.relay.tools is None:
            return original(runner, batch, *args, **kwargs)
        guarded = self.relay.guarded
        guarded("quotes", None, repair_quotes, self.relay, self.relay.tools, self._reqs, batch)
        if (hidden := self.relay.hidden) is not None:
            guarded("hidden_states", None, hidden.begin, batch)
        if (influence := self.relay.influence) is None:
            return self._forward(original, runner, batch, *args, **kwargs)
        guarded("influence", None, influence.begin, self._reqs, batch, relayed=self._running is not None)
        output = self._forward(original, runner, batch, *args, **kwargs)
        guarded("influence", None, influence.end)
        return output

    def _forward(self, original: Callable[..., Any], runner: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        planned, tools, reqs = self._running, self.relay.tools, self._reqs

        def stock(*given: Any, **named: Any) -> Any:
            self.relay.guarded("recompute", None, recompute_placed, original, self.relay, runner, reqs, batch)
            return original(*given, **named)

        if planned is None or tools is None:
            costs = self.relay.costs
            run = stock if costs is None else functools.partial(costs.time_stock, stock)
            return run(runner, batch, *args, **kwargs)
        self._running = None  # a failed relay forward calls the stock forward, which must not come back here
        return relay_forward(stock, self.relay, tools, planned, runner, batch, *args, **kwargs)

    def update_weights(self, original: Callable[..., Any], updater: Any, *args: Any, **kwargs: Any) -> Any:
        self.relay.weights_change(updater.scheduler, begin=True)
        try:
            return original(updater, *args, **kwargs)
        finally:
            self.relay.weights_change(updater.scheduler, begin=False)


def install(hooks: list[Hook]) -> None:
    """Apply ``hooks``. A target that another plugin has hooked keeps that plugin's wrapper inside ours."""
    for hook in hooks:
        HookRegistry.register(hook.target, hook.function, hook.kind, source=SOURCE)
        if hook.target in HookRegistry._patched:
            HookRegistry._apply_target(hook.target, [(hook.kind, hook.function, SOURCE)])
    HookRegistry.apply_hooks()


def missing(hooks: list[Hook]) -> list[str]:
    """Targets whose hook is not in force: SGLang only logs a hook that failed to apply."""
    return [h.target for h in hooks if not _in_force(h)]


def _in_force(hook: Hook) -> bool:
    owner, _, name = hook.target.rpartition(".")
    try:
        current = getattr(pkgutil.resolve_name(owner), name)
    except (ImportError, AttributeError):
        return False
    while current is not None:
        # Each wrapper of the registry closes over its hook (plugins/hook_registry.py, ``_wrap_fn``).
        cells = getattr(current, "__closure__", None) or ()
        if any(cell.cell_contents == hook.function for cell in cells):
            return True
        current = getattr(current, "__wrapped__", None)
    return False
