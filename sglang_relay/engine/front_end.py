"""The front-end processes (tokenizer manager, HTTP server): bring each request's report to its answer.

``/generate``: ``meta_info["relay"]``. OpenAI API: ``sglext.relay``, in the response or in a stream's first chunk (one
report per choice); ``choices[].meta_info["relay"]`` too where ``return_meta_info`` asks for it.

A server has one front end, in its launcher, or several (``--tokenizer-worker-num``), each a process of its own.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_relay.config import load_config
from sglang_relay.engine.log import Log
from sglang_relay.engine.report import REPORT_KEY, coarse
from sglang_relay.engine.requests import PRIMES

T = TypeVar("T")

_MANAGER = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
_TO_WORKERS = "sglang.srt.managers.multi_tokenizer_mixin.write_data_for_multi_tokenizer"
_OPENAI = "sglang.srt.entrypoints.openai"
_DATA = "data: "
_reports = "full"
"""What answers of this process say."""
_STREAM = "_relay_stream"
"""Attribute of a streamed request: its ``_Stream``, which goes when the request goes."""


_log = Log(logging.getLogger(__name__))


def _guarded(where: str, otherwise: T, call: Callable[..., T], *args: Any) -> T:
    """What ``call`` returns, ``otherwise`` after a failure: an answer is brought without its report then."""
    try:
        return call(*args)
    except Exception as error:
        _log.failure(where, error)
        return otherwise


def register(backends: Mapping[str, str]) -> None:
    """Register the hooks that run in every front end and its launcher, to see whether the relay is selected.
    backends: the reports that are usual with each name of it."""

    def started(result: Any, manager: Any, *args: Any, **kwargs: Any) -> None:
        usual = backends.get(manager.server_args.radix_cache_backend)
        if usual is not None:
            wanted = load_config(os.environ).report
            install(usual if wanted == "auto" else wanted)

    def workers(port_args: Any, server_args: Any, *args: Any, **kwargs: Any) -> Any:
        if server_args.radix_cache_backend not in backends:
            return None
        port_args = copy.copy(port_args)
        port_args.relay_plugins = _LoadedOnArrival()
        return (port_args, server_args, *args), kwargs

    HookRegistry.register(f"{_MANAGER}.__init__", started, HookType.AFTER)
    HookRegistry.register(_TO_WORKERS, workers, HookType.BEFORE)


class _LoadedOnArrival:
    """SGLang loads no plugins in the processes of ``--tokenizer-worker-num``, its own HTTP workers and engines that
    attach themselves. All of them begin with unpickling the launcher's arguments: this, among them, becomes the call.
    """

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return load_plugins, ()


def install(reports: str) -> None:
    """Apply the hooks of a front end whose scheduler relays. reports: what answers say (config.py, ``report``)."""
    global _reports
    _reports = reports
    from sglang_relay.engine.hooks import Hook, install, missing

    chat, completion = f"{_OPENAI}.serving_chat.OpenAIServingChat", f"{_OPENAI}.serving_completions"
    completion += ".OpenAIServingCompletion"
    hooks: list[Hook] = []

    async def internal_state(
        original: Callable[..., Awaitable[list[dict[str, Any]]]], *args: Any, **kwargs: Any
    ) -> Any:
        """``/server_info`` shows the hooks of the front end that answers: nobody else can tell that it has them."""
        states = await original(*args, **kwargs)
        absent = _guarded("state", [h.target for h in hooks], missing, hooks)
        for state in states:
            if REPORT_KEY in state:
                state[REPORT_KEY]["front_end"] = {h.target: h.target not in absent for h in hooks}
        return states

    hooks += [
        Hook(f"{_MANAGER}.generate_request", HookType.AROUND, answers),
        Hook(f"{_MANAGER}._send_one_request", HookType.AROUND, send),
        Hook(f"{_MANAGER}.get_internal_state", HookType.AROUND, internal_state),
        Hook(f"{chat}._generate_chat_stream", HookType.AROUND, stream),
        Hook(f"{chat}._build_chat_response", HookType.AFTER, response),
        Hook(f"{completion}._generate_completion_stream", HookType.AROUND, stream),
        Hook(f"{completion}._build_completion_response", HookType.AFTER, response),
    ]
    install(hooks)
    if absent := missing(hooks):
        raise RuntimeError(f"relay: hooks not applied in the front end: {', '.join(absent)}")


# ---------------------------------------------------------------------- requests


def send(original: Callable[..., Awaitable[None]], manager: Any, tokenized: Any, *args: Any, **kwargs: Any) -> Any:
    """A request on its way to the scheduler. Of a prompt that is sampled several times SGLang computes the KV first, by
    a request without an answer (managers/tokenizer_manager.py, ``_handle_batch_request``). It is marked: such requests
    of clients score, and are not relayed."""
    _guarded("priming", None, _mark, manager, tokenized)
    return original(manager, tokenized, *args, **kwargs)


def _mark(manager: Any, tokenized: Any) -> None:
    sampling = tokenized.sampling_params
    if sampling.max_new_tokens == 0:
        asked = manager.rid_to_state[tokenized.rid].obj.sampling_params or {}
        params = sampling.custom_params
        if asked.get("max_new_tokens") != 0 and (params is None or isinstance(params, dict)):
            tokenized.sampling_params = sampling = copy.copy(sampling)
            sampling.custom_params = {**(params or {}), PRIMES: True}


# ---------------------------------------------------------------------- answers


async def answers(
    original: Callable[..., AsyncGenerator[Any]], manager: Any, obj: Any, *args: Any, **kwargs: Any
) -> AsyncGenerator[Any]:
    """Every answer of a request, which may hold several prompts, on its way to the client. SGLang collects what is said
    once per request in a list and repeats or slices it from chunk to chunk (managers/tokenizer_manager.py); the report
    is the one dict in it."""
    waiting: _Stream | None = getattr(obj, _STREAM, None)
    async with aclosing(original(manager, obj, *args, **kwargs)) as outs:
        async for out in outs:
            for one in out if isinstance(out, list) else [out]:
                _guarded("report", None, _bring, one, waiting)
            yield out


def _bring(one: dict[str, Any], waiting: _Stream | None) -> None:
    meta_info = one.get("meta_info") or {}
    _unwrap(meta_info)
    if waiting is not None:
        waiting.note(meta_info)


def _unwrap(meta_info: dict[str, Any]) -> None:
    for beam in meta_info.get("beam_results", ()):  # the first has a copy of the answer's own
        _unwrap(beam["meta_info"])
    value = meta_info.get(REPORT_KEY)
    if not isinstance(value, list):
        return
    meta_info.pop(REPORT_KEY)
    if value and _reports != "none":
        report = _counted(value[0], meta_info)
        meta_info[REPORT_KEY] = coarse(report) if _reports == "coarse" else report


class _Stream:
    """The reports of one stream that no chunk has carried yet, by answer."""

    def __init__(self) -> None:
        self._reports: dict[str, dict[str, Any]] = {}
        self._noted: set[str] = set()

    def note(self, meta_info: dict[str, Any]) -> None:
        if REPORT_KEY in meta_info and meta_info["id"] not in self._noted:
            self._noted.add(meta_info["id"])
            self._reports[meta_info["id"]] = meta_info[REPORT_KEY]

    def annotate(self, chunk: str) -> str:
        """``chunk`` with ``sglext.relay`` if it is the first of its answer."""
        if not self._reports or not chunk.startswith(_DATA + "{"):
            return chunk
        body = json.loads(chunk[len(_DATA) :])
        report = self._reports.pop(body.get("id"), None)
        if report is None:
            return chunk
        body["sglext"] = {**(body.get("sglext") or {}), REPORT_KEY: report}
        return f"{_DATA}{json.dumps(body, ensure_ascii=False)}\n\n"


async def stream(
    original: Callable[..., AsyncGenerator[str]], serving: Any, adapted_request: Any, *args: Any, **kwargs: Any
) -> AsyncGenerator[str]:
    """Add ``sglext.relay`` to the first chunk of every choice; all later chunks pass untouched."""
    waiting = _Stream()
    setattr(adapted_request, _STREAM, waiting)
    async with aclosing(original(serving, adapted_request, *args, **kwargs)) as chunks:
        async for chunk in chunks:
            yield _guarded("report", chunk, waiting.annotate, chunk)


def response(result: Any, serving: Any, request: Any, ret: Any, *args: Any, **kwargs: Any) -> Any:
    """Add ``sglext.relay`` to a complete chat or text response (a pydantic model)."""
    return _guarded("report", result, _with_reports, result, ret)


def _with_reports(result: Any, ret: Any) -> Any:
    items = ret if isinstance(ret, list) else [ret]
    reports = [item["meta_info"].get(REPORT_KEY) for item in items]
    if not hasattr(result, "choices") or not any(reports):
        return result
    return _with_extension(result, reports)


def _counted(report: dict[str, Any], meta_info: dict[str, Any]) -> dict[str, Any]:
    """``report``, with the counts that a scheduler does not take where it hooks nothing: all is prefix hit or fresh."""
    if (report["declined"] or "").startswith("unsupported:"):
        cached = meta_info.get("cached_tokens", 0)
        return report | {"exact": cached, "fresh": meta_info["prompt_tokens"] - cached}
    return report


def _with_extension(response: Any, reports: list[Any]) -> Any:
    """``response`` with ``sglext.relay``."""
    extension, model = _extended(type(response))
    fields = {name: getattr(response, name) for name in type(response).model_fields}
    given = fields["sglext"].model_dump(exclude_none=True) if fields.get("sglext") is not None else {}
    fields["sglext"] = extension(**given, relay=reports[0] if len(reports) == 1 else reports)
    return model.model_construct(**fields)


@functools.cache
def _extended(response: type) -> tuple[Any, Any]:
    """The models of an extended ``sglext`` and of ``response`` with it: pydantic serialises fields by declared type.
    Made once: making them takes a millisecond of the event loop."""
    from pydantic import SerializeAsAny, create_model
    from sglang.srt.entrypoints.openai.protocol import SglExt

    extension: Any = create_model("RelaySglExt", __base__=SglExt, relay=(Any, None))
    model: Any = create_model(response.__name__, __base__=response, sglext=(SerializeAsAny[SglExt] | None, None))
    return extension, model
