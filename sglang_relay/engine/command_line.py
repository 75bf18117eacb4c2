"""``--relay-<name>`` flags where SGLang parses its own: sugar over the environment variables."""

from __future__ import annotations

import argparse
import os
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_relay.config import CONFIG_ENV, ENV_PREFIX, load_config, setting_names

_SERVER_ARGS = "sglang.srt.server_args.ServerArgs"


def register() -> None:
    HookRegistry.register(f"{_SERVER_ARGS}.add_cli_args", add_flags, HookType.AFTER)
    HookRegistry.register(f"{_SERVER_ARGS}.from_cli_args", export_flags, HookType.BEFORE)


def add_flags(result: Any, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
    group = parser.add_argument_group("sglang-relay", "Settings of --radix-cache-backend relay and relay-isolated.")
    group.add_argument("--relay-config", dest="relay_config", metavar="FILE", help=f"JSON file; same as {CONFIG_ENV}")
    for name in setting_names():
        flag = "--relay-" + name.replace("_", "-")
        group.add_argument(flag, dest=f"relay_{name}", metavar="VALUE", help=f"same as {ENV_PREFIX}{name.upper()}")


def export_flags(*args: Any, **kwargs: Any) -> None:
    """Put given flags into the environment, which SGLang's other processes inherit, and check them at once.

    Raises ConfigError before any process is started.
    """
    namespaces = [a for a in (*args, *kwargs.values()) if isinstance(a, argparse.Namespace)]
    given = {k: v for n in namespaces for k, v in vars(n).items() if k.startswith("relay_") and v is not None}
    if not given:
        return
    for key, value in given.items():
        os.environ["SGLANG_" + key.upper()] = str(value)
    load_config(os.environ)
