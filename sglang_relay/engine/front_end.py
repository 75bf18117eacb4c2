"""The front-end process (tokenizer manager, HTTP server): gives the report its shape in ``meta_info``."""

from __future__ import annotations

from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_relay.engine.report import REPORT_KEY

_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"


def register(backends: tuple[str, ...]) -> None:
    """Register the one hook that runs in every front end: at start-up, to see whether the relay is selected."""

    def started(result: Any, manager: Any, *args: Any, **kwargs: Any) -> None:
        if manager.server_args.radix_cache_backend in backends:
            install()

    HookRegistry.register(f"{_MANAGER}.__init__", started, HookType.AFTER)


def install() -> None:
    from sglang_relay.engine.hooks import Hook, install, missing

    hooks = [Hook(f"{_MANAGER}.update_request_meta_info", HookType.AFTER, unwrap_report)]
    if missing(hooks):
        install(hooks)


def unwrap_report(result: Any, manager: Any, meta_info: dict[str, Any], state: Any, *args: Any, **kwargs: Any) -> None:
    """SGLang collects request-level values in a list; the report is the one dict in it."""
    value = meta_info.get(REPORT_KEY)
    if isinstance(value, list):
        meta_info.pop(REPORT_KEY)
        if value:
            meta_info[REPORT_KEY] = value[0]
