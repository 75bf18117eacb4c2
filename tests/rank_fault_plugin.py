"""An SGLang plugin that breaks one tensor-parallel rank (test_tp_faults.py). Runs inside the server's processes; must
not import from the tests. Which fault is in force is the text of the file that RELAY_TEST_FAULT names."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FAULT = Path(os.environ["RELAY_TEST_FAULT"])
_BROKEN_RANK = 1


class Injected(RuntimeError):
    """What a broken step raises."""


def load() -> None:
    from sglang_relay import index
    from sglang_relay.attention import engines
    from sglang_relay.engine import (
        backend,
        collectives,
        forward,
        manager,
        quote_book,
        quotes,
        rotary_probe,
        selection,
        stage,
    )
    from sglang_relay.engine.audit import Auditor
    from sglang_relay.engine.influence import Influence
    from sglang_relay.ops import torch_ops
    from sglang_relay.plan import RelayPlan
    from sglang_relay.policies.relay import DeviationPolicy

    _wrap(index.ContentIndex, "match", {"match": _raise, "other_segments": _other_segments})
    _wrap(index.ContentIndex, "learn", {"learn": _raise})
    _wrap(manager, "new_report", {"adopt": _raise})
    _wrap(Auditor, "admits", {"admits": _raise})
    _wrap(Auditor, "choose", {"choose": _raise})
    _wrap(Auditor, "count", {"count": _raise})
    _wrap(RelayPlan, "check", {"plan": _raise})
    _wrap(forward.StagedForward, "prepare", {"prepare": _raise})
    _wrap(engines, "attend", {"attention": _raise})
    _wrap(backend.DeviationProbe, "measure", {"measure": _raise})
    _wrap(stage.Stage, "take_over", {"hand_over": _raise, "split": _raise})
    _wrap(selection, "_with_heads", {"deviations": _raise})
    _wrap(torch_ops.TorchProbeScores, "totals", {"scores": _raise})
    _wrap(Influence, "of", {"influence": _raise})
    _wrap(selection.Selection, "ends_early", {"last_layer": _raise})
    _wrap(selection.Selection, "work", {"work": _raise})
    _wrap(rotary_probe, "_found", {"rotary": _raise})
    _wrap(collectives, "_build", {"build": _raise})
    _wrap(torch_ops, "realign", {"place": _raise})
    _wrap(DeviationPolicy, "select", {"select": _raise, "other_rows": _other_rows})
    _wrap(quote_book, "quoted", {"quotes": _raise, "other_quotes": _other_quotes})
    _wrap(quotes, "_stage", {"quote_attention": _failed_stage})
    _record_sums()


def _record_sums() -> None:
    """A line in ``<RELAY_TEST_FAULT>.sums`` for each kind of tensor that is all-reduced for the first time: its dtype
    and dimensions, and whether the relay was ready."""
    from sglang.srt.distributed.parallel_state import GroupCoordinator

    from sglang_relay.engine import hooks

    seen, ready = set(), []
    original, install = GroupCoordinator.all_reduce, hooks.install

    def all_reduce(self: Any, input_: Any) -> Any:
        kind = (input_.dtype, input_.dim())
        if kind not in seen:
            seen.add(kind)
            with Path(f"{_FAULT}.sums").open("a", encoding="utf-8") as file:
                file.write(f"{'ready' if ready else 'starting'} {input_.dtype} {input_.dim()}\n")
        return original(self, input_)

    def installed(table: Any) -> None:
        ready.append(True)
        install(table)

    GroupCoordinator.all_reduce, hooks.install = all_reduce, installed


def _wrap(owner: Any, name: str, faults: dict[str, Callable[..., Any]]) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        fault = faults.get(_in_force())
        return original(*args, **kwargs) if fault is None else fault(original, *args, **kwargs)

    setattr(owner, name, wrapped)


def _in_force() -> str:
    """The fault in this process: none before the ranks are known, and none on the other ranks."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized() and dist.get_rank() == _BROKEN_RANK):
        return ""
    return _FAULT.read_text(encoding="utf-8")


def _raise(*args: Any, **kwargs: Any) -> Any:
    raise Injected("broken by a test")


def _other_segments(match: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Every run one token shorter than on the other ranks."""
    return [run._replace(stop=run.stop - 1) for run in match(*args, **kwargs)]


def _other_rows(select: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The selection of the other ranks, upside down."""
    return ~select(*args, **kwargs)


def _other_quotes(quoted: Callable[..., Any], tokens: Any, answer: Any, stale: Any, ahead: int) -> Any:
    """The first token that may still be recomputed, whatever was decoded."""
    return stale.nonzero()[0][:1]


def _failed_stage(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A pass whose attention fails in its first layer; its K and V are written all the same."""
    stage = make(*args, **kwargs)
    stage._backend.failure = Injected("broken by a test")
    return stage
