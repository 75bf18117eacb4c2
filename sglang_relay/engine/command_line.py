"""Settings in the front end, before any other process is started: ``--relay-<name>`` flags where SGLang parses its own,
sugar over the environment variables, and a check of all that is set, in whatever way the server is started."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_relay.config import CONFIG_ENV, ENV_PREFIX, ConfigError, RelayConfig, load_config, setting_names

logger = logging.getLogger(__name__)

_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
_PREFIX = "relay_"
_typed: dict[str, str] | None = None
"""The flags that were given, by the variables that they became; None where no command line was parsed."""


def register(backends: tuple[str, ...]) -> None:
    """backends: names of ``--radix-cache-backend`` with which the server relays."""

    def checked(result: Any, args: Any) -> None:
        check(args, relays=args.radix_cache_backend in backends)

    HookRegistry.register(f"{_SERVER_ARGS}.add_cli_args", add_flags, HookType.AFTER)
    HookRegistry.register(f"{_SERVER_ARGS}.from_cli_args", export_flags, HookType.BEFORE)
    HookRegistry.register(f"{_SERVER_ARGS}.check_server_args", checked, HookType.AFTER)


def add_flags(result: Any, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
    group = parser.add_argument_group("sglang-relay", "Settings of --radix-cache-backend relay and relay-isolated.")
    group.add_argument("--relay-config", dest="relay_config", metavar="FILE", help=f"JSON file; same as {CONFIG_ENV}")
    for name in setting_names():
        dest = _PREFIX + name
        group.add_argument(_flag(dest), dest=dest, metavar="VALUE", help=f"same as {ENV_PREFIX}{name.upper()}")


def _flag(dest: str) -> str:
    return "--" + dest.replace("_", "-")


def export_flags(*args: Any, **kwargs: Any) -> None:
    """Put given flags into the environment, which SGLang's other processes inherit."""
    global _typed
    namespaces = [a for a in (*args, *kwargs.values()) if isinstance(a, argparse.Namespace)]
    given = {k: v for n in namespaces for k, v in vars(n).items() if k.startswith(_PREFIX) and v is not None}
    _typed = {"SGLANG_" + dest.upper(): _flag(dest) for dest in given}
    os.environ.update({"SGLANG_" + dest.upper(): str(value) for dest, value in given.items()})


def check(args: Any, *, relays: bool) -> None:
    """SGLang has checked its own arguments, ``args``, and starts its processes next: check the relay's settings.

    A wrong one ends the start: by ConfigError, or, where a command line was parsed, by a line on stderr and exit status
    2, as any wrong argument. Where the server does not relay it is a warning: nothing reads the settings.
    """
    try:
        load_config(os.environ, typed=_typed or {}, check=lambda config: _fits(config, args) if relays else None)
    except ConfigError as error:
        if not relays:
            logger.warning("relay: not in use, and its settings are wrong: %s", error)
            return
        if _typed is None:
            raise
        print(f"sglang-relay: {error}", file=sys.stderr)
        sys.exit(2)


def _fits(config: RelayConfig, args: Any) -> None:
    """What can be told of the files that ``config`` names, and of the model, before this is loaded."""
    from sglang_relay.engine.certified import require_certificate
    from sglang_relay.engine.served import require_profile

    require_certificate(config)
    require_profile(config)
    if config.layer_range is not None or config.influence not in ("off", "auto"):
        from sglang.srt.configs.model_config import ModelConfig

        layers = ModelConfig.from_server_args(args).num_hidden_layers
        config.resolve_layer_range(layers)
        config.influence_layers(layers)
