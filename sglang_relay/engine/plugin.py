"""Entry point of the SGLang plugin: registers the tree backends, and wires the relay when one of them is chosen.

Loading registers two backend names and a start-up hook in the front-end process; nothing that serves requests is
touched. Only when SGLang builds the tree with one of the names (``--radix-cache-backend relay``) are the scheduler's
hooks applied, in that process.
"""

from __future__ import annotations

import logging
import os
import secrets
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from sglang_relay import __version__
from sglang_relay.config import ConfigError, load_config

if TYPE_CHECKING:
    from sglang.srt.mem_cache.registry import TreeCacheBuildContext

    from sglang_relay.config import RelayConfig
    from sglang_relay.engine.consensus import Consensus
    from sglang_relay.engine.tools import ForwardTools
    from sglang_relay.engine.tree import RelayCache

logger = logging.getLogger(__name__)

SHARED = "relay"
ISOLATED = "relay-isolated"
SGLANG_VERSION = "0.5.23"


def load() -> None:
    """Called by SGLang in every process (plugins/__init__.py, ``load_plugins``)."""
    from sglang.srt.mem_cache.registry import get_radix_cache_factory, register_radix_cache_backend

    from sglang_relay.engine import command_line, front_end

    for name in (SHARED, ISOLATED):
        if get_radix_cache_factory(name) is None:
            register_radix_cache_backend(name, build_tree)
    command_line.register((SHARED, ISOLATED))
    front_end.register({SHARED: "full", ISOLATED: "coarse"})


def build_tree(ctx: TreeCacheBuildContext) -> Any:
    """Build the tree and the relay of one scheduler process.

    Raises ConfigError for a setting that is not allowed, which ends the start-up. Whatever else stands in the way
    (model, deployment, a hook that did not apply) is logged by name and leaves a server that serves stock.
    """
    from sglang.srt.mem_cache.registry import create_unified_radix_cache
    from sglang.srt.runtime_context import get_memory, get_observability, get_schedule

    from sglang_relay.engine import hooks as hooking
    from sglang_relay.engine.calibration import calibrate_costs
    from sglang_relay.engine.certified import (
        bands,
        choose,
        find_certificate,
        settings_of,
        warn_of_other_settings,
    )
    from sglang_relay.engine.consensus import Consensus
    from sglang_relay.engine.guards import server_reasons
    from sglang_relay.engine.hidden import hidden_of, hidden_reason
    from sglang_relay.engine.influence import influence_of, influence_reason
    from sglang_relay.engine.manager import RelayManager
    from sglang_relay.engine.namespaces import new_secret
    from sglang_relay.engine.report import Metrics
    from sglang_relay.engine.served import with_profile
    from sglang_relay.engine.tree import RelayCache
    from sglang_relay.index import warm_up

    config = load_config(os.environ)
    runner = ctx.tp_worker.model_runner
    isolated = get_memory().radix_cache_backend == ISOLATED
    reasons = server_reasons(ctx)
    tree = create_unified_radix_cache(ctx, cache_class=RelayCache)
    if not isinstance(tree, RelayCache):
        raise ConfigError(f"radix_cache_backend={SHARED}: SGLang built a {type(tree).__name__} instead")
    consensus = Consensus(ctx.params.tp_cache_group)
    chunk = _chunk(get_schedule().chunked_prefill_size)
    tools = _tools(runner, config, consensus, tree, chunk, reasons)
    warm_up()
    secret, base = consensus.broadcast((new_secret(), secrets.randbits(60) | 1))  # type: ignore[misc]
    args = SimpleNamespace(**ctx.server_args.resolved_dict())
    config: Any = consensus.broadcast(with_profile(config, args) if consensus.leads else None)
    settings = settings_of(config, config.resolve_layer_range(runner.model_config.num_hidden_layers), args)
    certificate: Any = consensus.broadcast(find_certificate(config, args) if consensus.leads else None)
    missing_influence = influence_reason(runner, config, ctx.server_args)
    chosen = choose(config, certificate, influence=missing_influence is None)
    config = replace(config, policy=chosen.policy)
    relay = RelayManager(
        config,
        tree,
        consensus,
        num_layers=runner.model_config.num_hidden_layers,
        pool_slots=0 if reasons else runner.token_to_kv_pool.k_buffer[0].shape[0],
        chunk=chunk,
        secret=secret,
        base=base,
        isolated=isolated,
        unsupported=reasons,
        budgets={} if chosen.budget is None else {chosen.policy: chosen.budget},
        band_of=bands(certificate),
    )
    if missing_influence is not None:
        relay.influence_missing = missing_influence
    elif not reasons:
        relay.influence = influence_of(runner, config, relay.failure)
    first = relay.layers.start
    if (missing_hidden := hidden_reason(runner, config, first, ctx.server_args)) is not None:
        relay.hidden_missing = missing_hidden
    elif not reasons:
        relay.keep_hidden(hidden_of(runner, first, relay.failure))
    if tools is not None:
        relay.tools = replace(tools, hidden=relay.hidden, influence=relay.influence, failure=relay.failure)
        if relay.costs is not None and (reason := calibrate_costs(relay, relay.tools, relay.costs, chunk)):
            relay.unsupported.append(reason)
    hooks = hooking.SchedulerHooks(relay, lambda: _state(relay, table, isolated, settings))
    table = hooks.table()
    hooking.install(table)
    if absent := hooking.missing(table):
        logger.error("relay: hooks not applied, relay stays off: %s", ", ".join(absent))
    relay.unsupported += consensus.union(["hook_missing"] if absent else [])
    tree.relay = relay
    if ctx.tp_rank == 0:
        if get_observability().enable_metrics:
            relay.stats.metrics = Metrics({"model_name": str(getattr(ctx.server_args, "served_model_name", None))})
        warn_of_other_settings(certificate, settings)
        _announce(relay, table, isolated, chosen)
    return tree


def _chunk(size: int | None) -> int | None:
    """Most rows of a prefill forward; -1 is SGLang's for no limit (managers/scheduler.py, ``init_chunked_prefill``)."""
    return size if size is not None and size > 0 else None


def _tools(
    runner: Any, config: RelayConfig, consensus: Consensus, tree: RelayCache, chunk: int | None, reasons: list[str]
) -> ForwardTools | None:
    """What this server relays with, or None where it cannot; ``reasons``, why not, are the same on all ranks then."""
    from sglang_relay.engine.backend import attention_of, ops_of
    from sglang_relay.engine.collectives import build_sums
    from sglang_relay.engine.graphs import PrefillGraphs
    from sglang_relay.engine.split_check import split_reason
    from sglang_relay.engine.tools import ForwardTools

    reasons[:] = consensus.union(reasons)
    rotary = None if reasons else _rotary(runner, reasons)
    reasons[:] = consensus.union(reasons)
    if reasons or rotary is None:
        return None
    if (failure := build_sums(consensus, runner.device)) is not None:
        logger.warning("relay: the ranks cannot sum what they measure", exc_info=failure)
        reasons.append("rank_sums_failed")
        return None
    tools = ForwardTools(
        runner=runner,
        rotary=rotary,
        attention=attention_of(runner, config.attention),
        ops=ops_of(runner, rotary, config.probe_queries),
        probe_queries=config.probe_queries,
        graphs=PrefillGraphs(runner) if config.graphs == "auto" else None,
        hidden=None,
        influence=None,
        consensus=consensus,
        failure=_log_failure,
    )
    if (reason := split_reason(tree, tools, chunk)) is not None:
        reasons.append(reason)
        return None
    return tools


def _log_failure(where: str, error: BaseException) -> str:
    """Of a start-up check, before there is a relay that counts."""
    logger.warning("relay: %s failed at start-up", where, exc_info=error)
    return f"internal_error:{where}"


def _rotary(runner: Any, reasons: list[str]) -> Any:
    """The delta rotation of the model, or None after adding the reason why there is none."""
    from sglang_relay.engine.guards import find_rotary
    from sglang_relay.engine.rotary_probe import unrotated_layers
    from sglang_relay.rotary import DeltaRotary, is_static_table

    module: Any = find_rotary(runner.model)
    table = module._compute_cos_sin_cache().float().to(runner.device)
    if not is_static_table(table):
        reasons.append("rotary_table_not_static")
        return None
    if table.shape[0] < runner.model_config.context_len:
        reasons.append("rotary_table_short")
        return None
    rotary = DeltaRotary.from_table(
        table, neox=module.is_neox_style, rotary_dim=module.rotary_dim, head_dim=module.head_size
    )
    try:
        wrong = unrotated_layers(runner, rotary)
    except Exception as error:
        logger.warning("relay: the rotary probe failed", exc_info=error)
        reasons.append("rotary_probe_failed")
        return None
    if wrong:
        logger.warning("relay: keys of layers %s do not follow the model's rotary embedding", wrong)
        reasons.append("layers_without_rotation")
        return None
    return rotary


def _announce(relay: Any, hooks: list[Any], isolated: bool, chosen: Any) -> None:
    if relay.unsupported:
        logger.warning("relay: off, this server is served stock: %s", ", ".join(relay.unsupported))
        return
    domain = (
        "isolated: only requests with a cache_salt or relay_scope donate and relay"
        if isolated
        else "one trust domain: requests with equal extra_key and cache_salt share donors"
    )
    level = logging.INFO if chosen.assured else logging.WARNING
    tier, why = relay.default_tier, chosen.why
    logger.log(level, "relay: on (%s); policy %s: %s; %d hooks in force", domain, tier, why, len(hooks))


def _state(relay: Any, hooks: list[Any], isolated: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """What ``/server_info`` shows. Holds no secret."""
    from sglang_relay.attention import TorchAttention
    from sglang_relay.engine.hooks import missing

    absent, tools = missing(hooks), relay.tools
    replayed = 0 if tools is None or tools.graphs is None else tools.graphs.passes
    return {
        "version": __version__,
        "active": not relay.unsupported,
        "unsupported": list(relay.unsupported),
        "isolated": isolated,
        "hooks": {h.target: h.target not in absent for h in hooks},
        "config": {name: _plain(getattr(relay.config, name)) for name in type(relay.config).__dataclass_fields__},
        "layer_range": str(relay.layers),
        "attention": TorchAttention.name if tools is None else tools.attention.name,
        "influence": (
            {"unavailable": relay.influence_missing} if relay.influence is None else relay.influence.as_dict()
        ),
        "hidden": {"unavailable": relay.hidden_missing} if relay.hidden is None else relay.hidden.as_dict(),
        "graph_passes": None if relay.config.graphs == "off" else replayed,
        "kernels": None if tools is None or relay.unsupported else tools.ops.names(),
        "weight_epoch": relay.namespaces.epoch,
        "index": relay.learning.index.stats(),
        "settings": settings,
        "default_tier": relay.default_tier,
        "audit": relay.auditor.breakers.as_dict(),
        "cost": None if relay.costs is None else relay.costs.as_dict(),
        "stats": relay.stats.as_dict(),
    }


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
