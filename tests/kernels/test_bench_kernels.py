"""bench/kernels.py without a GPU: its checks pass and its timed calls run, interpreted and on small heads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton_interpreter import interpreted

sys.path.insert(0, str(Path(__file__).parents[2]))
from bench import kernels as bench

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"HEADS": 4, "KV_HEADS": 2, "DIM": 32, "SCALE": 32**-0.5}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "ROTARY", bench.ROTARY | {"rotary_dim": 32})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=8))
    with interpreted():
        yield


def test_every_kernel_agrees_with_its_reference(capsys: pytest.CaptureFixture[str]) -> None:
    bench.check(CPU)
    assert "every kernel agrees" in capsys.readouterr().out


def test_a_kernel_that_does_not_agree_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bench.realign_on_device

    def wrong(pool: object, source: torch.Tensor, target: torch.Tensor, *args: object, **kwargs: object) -> None:
        right(pool, source.flip(0), target, *args, **kwargs)

    monkeypatch.setattr(bench, "realign_on_device", wrong)
    with pytest.raises(SystemExit, match="realign scattered K: off by"):
        bench.check(CPU)


def test_what_is_timed_runs_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not FlashInfer's prefill and not the captured influence, which need a device."""

    def once(run: Callable[[], object]) -> float:
        run()
        return 1.0

    monkeypatch.setattr(bench, "time_ms", once)
    monkeypatch.setattr(bench, "flash_prefill", lambda *args: None)
    pool = bench.Pool.new(3, 4096, CPU)
    rows = [
        *bench.time_realign(pool, 64, CPU),
        *bench.time_attention(pool, 128, CPU),
        *bench.time_selection(pool, 64, CPU),
        *bench.time_interpolation(pool, 64, CPU),
    ]
    assert {row.kernel for row in rows} == {
        "realign",
        "scattered attention",
        "deviation",
        "select_rows",
        "probe scores",
        "interpolation change",
        "interpolation carry",
        "interpolation looks",
    }
    assert all(row.bytes > 0 for row in rows)
    assert len(bench.table(rows, bench.Rates(1e12, 1e15)).splitlines()) == 1 + len(rows)
