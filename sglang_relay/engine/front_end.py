"""The front-end process (tokenizer manager, HTTP server): brings each request's report to its answer.

``/generate``: ``meta_info["relay"]``. OpenAI API: ``sglext.relay``, in the response or in a stream's first chunk (one
report per choice); ``choices[].meta_info["relay"]`` too where ``return_meta_info`` asks for it.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_relay.engine.report import REPORT_KEY

_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_OPENAI = "sglang.srt.entrypoints.openai"
_DATA = "data: "
_KEPT = 4096
"""Reports kept for streams that have not sent their first chunk yet."""


def register(backends: tuple[str, ...]) -> None:
    """Register the one hook that runs in every front end: at start-up, to see whether the relay is selected."""

    def started(result: Any, manager: Any, *args: Any, **kwargs: Any) -> None:
        if manager.server_args.radix_cache_backend in backends:
            install()

    HookRegistry.register(f"{_MANAGER}.__init__", started, HookType.AFTER)


def install() -> None:
    """Apply the hooks of a front end whose scheduler relays."""
    from sglang_relay.engine.hooks import Hook, install, missing

    front = FrontEnd()
    chat, completion = f"{_OPENAI}.serving_chat.OpenAIServingChat", f"{_OPENAI}.serving_completions"
    completion += ".OpenAIServingCompletion"
    hooks = [
        Hook(f"{_MANAGER}._wait_one_response", HookType.AROUND, front.answers),
        Hook(f"{chat}._generate_chat_stream", HookType.AROUND, front.stream),
        Hook(f"{chat}._build_chat_response", HookType.AFTER, front.response),
        Hook(f"{completion}._generate_completion_stream", HookType.AROUND, front.stream),
        Hook(f"{completion}._build_completion_response", HookType.AFTER, front.response),
    ]
    install(hooks)
    if absent := missing(hooks):
        raise RuntimeError(f"relay: hooks not applied in the front end: {', '.join(absent)}")


class FrontEnd:
    """Hooks of one front-end process."""

    def __init__(self) -> None:
        self._reports: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def answers(
        self, original: Callable[..., AsyncGenerator[Any]], manager: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any]:
        """Every answer of one request on its way to the client. SGLang collects request-level values in a list and
        repeats or slices it from chunk to chunk (managers/tokenizer_manager.py); the report is the one dict in it.

        ``original`` is called at once: it looks the request up before the caller advances any answer."""
        return self._unwrapped(original(manager, *args, **kwargs))

    async def _unwrapped(self, answers: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
        async with aclosing(answers):
            async for out in answers:
                self._unwrap(out.get("meta_info") or {})
                yield out

    def _unwrap(self, meta_info: dict[str, Any]) -> None:
        value = meta_info.get(REPORT_KEY)
        if not isinstance(value, list):
            return
        meta_info.pop(REPORT_KEY)
        if value:
            meta_info[REPORT_KEY] = self._reports[meta_info["id"]] = _counted(value[0], meta_info)
            while len(self._reports) > _KEPT:
                self._reports.popitem(last=False)

    def response(self, result: Any, serving: Any, request: Any, ret: Any, *args: Any, **kwargs: Any) -> Any:
        """Add ``sglext.relay`` to a complete chat or text response (a pydantic model)."""
        items = ret if isinstance(ret, list) else [ret]
        reports = [item["meta_info"].get(REPORT_KEY) for item in items]
        if not hasattr(result, "choices") or not any(reports):
            return result
        return _with_extension(result, reports)

    async def stream(
        self, original: Callable[..., AsyncGenerator[str]], serving: Any, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[str]:
        """Add ``sglext.relay`` to the first chunk of every choice; all later chunks pass untouched."""
        request = kwargs.get("request", args[1] if len(args) > 1 else None)
        waiting = getattr(request, "n", 1) or 1
        seen: set[str] = set()
        async with aclosing(original(serving, *args, **kwargs)) as chunks:
            async for chunk in chunks:
                waits = len(seen) < waiting and chunk.startswith(_DATA + "{")
                yield self._annotate(chunk, seen) if waits else chunk

    def _annotate(self, chunk: str, seen: set[str]) -> str:
        body = json.loads(chunk[len(_DATA) :])
        rid = body.get("id")
        if rid in seen or rid not in self._reports:
            return chunk
        seen.add(rid)
        body["sglext"] = {**(body.get("sglext") or {}), REPORT_KEY: self._reports.pop(rid)}
        return f"{_DATA}{json.dumps(body, ensure_ascii=False)}\n\n"


def _counted(report: dict[str, Any], meta_info: dict[str, Any]) -> dict[str, Any]:
    """``report``, with the counts that a scheduler does not take where it hooks nothing: all is prefix hit or fresh."""
    if (report["declined"] or "").startswith("unsupported:"):
        cached = meta_info.get("cached_tokens", 0)
        return report | {"exact": cached, "fresh": meta_info["prompt_tokens"] - cached}
    return report


def _with_extension(response: Any, reports: list[Any]) -> Any:
    """``response`` with ``sglext.relay``: the field is redeclared, as pydantic serialises fields by declared type."""
    from pydantic import SerializeAsAny, create_model
    from sglang.srt.entrypoints.openai.protocol import SglExt

    extension: Any = create_model("RelaySglExt", __base__=SglExt, relay=(Any, None))
    model = create_model(type(response).__name__, __base__=type(response), sglext=(SerializeAsAny[SglExt] | None, None))
    fields = {name: getattr(response, name) for name in type(response).model_fields}
    given = fields["sglext"].model_dump(exclude_none=True) if fields.get("sglext") is not None else {}
    fields["sglext"] = extension(**given, relay=reports[0] if len(reports) == 1 else reports)
    return model.model_construct(**fields)
