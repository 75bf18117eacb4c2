"""Time the GPU kernels against what the device can do, and first hold each to its reference.

    python -m bench.kernels [--json FILE] [--check-only] [--layers 32] [--tokens 2048]

Needs a CUDA device, PyTorch and Triton, and for the comparison FlashInfer; not SGLang. Shapes are those of an 8B model
(32 query heads, 8 KV heads of 128). Bytes and FLOPs are counted as the kernels' docstrings say; the shares are of the
device's own rates, measured first: a copy of 1 GiB, and a bfloat16 product of 8192 x 8192 matrices. Times are medians
over runs with a cold L2 cache (`triton.testing.do_bench`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sglang_relay_kernels import (  # pyright: ignore[reportMissingImports]
    deviation,
    influence,
    probe_scores,
    scattered_attention,
)
from sglang_relay_kernels.interpolation_carry import (  # pyright: ignore[reportMissingImports]
    carry_rows,
    reference_carry,
)
from sglang_relay_kernels.interpolation_changes import (  # pyright: ignore[reportMissingImports]
    change_rows,
    reference_change,
    save_rows,
)
from sglang_relay_kernels.interpolation_looks import look_rows, reference_look  # pyright: ignore[reportMissingImports]
from sglang_relay_kernels.interpolation_plan import (  # pyright: ignore[reportMissingImports]
    Plan,
    Rows,
    launch_options,
    padded_width,
    plan_items,
)
from sglang_relay_kernels.kv_table import KVTable, kv_table  # pyright: ignore[reportMissingImports]
from sglang_relay_kernels.realign import realign  # pyright: ignore[reportMissingImports]
from sglang_relay_kernels.realign_triton import realign_on_device  # pyright: ignore[reportMissingImports]
from torch import Tensor
from triton.testing import do_bench

HEADS, KV_HEADS, DIM = 32, 8, 128
SCALE = DIM**-0.5
DTYPE = torch.bfloat16
ROTARY = {"neox": True, "rotary_dim": DIM}


class Row(NamedTuple):
    kernel: str
    what: str
    ms: float
    bytes: int
    flops: int


class Rates(NamedTuple):
    copy: float
    """Bytes per second, read and written."""
    matrix: float
    """FLOPs per second."""


def time_ms(run: Callable[[], object]) -> float:
    return float(do_bench(run, return_mode="median"))  # pyright: ignore[reportArgumentType]


def measure_rates(device: torch.device) -> Rates:
    a, b = torch.empty(2, 1 << 30, dtype=torch.uint8, device=device)
    copy = 2 * a.numel() / time_ms(lambda: b.copy_(a)) * 1e3
    x = torch.randn(8192, 8192, dtype=DTYPE, device=device)
    return Rates(copy, 2 * 8192**3 / time_ms(lambda: x @ x) * 1e3)


class Pool(NamedTuple):
    table: KVTable
    slots: int

    @classmethod
    def new(cls, layers: int, slots: int, device: torch.device) -> Pool:
        def kind() -> list[Tensor]:
            return [torch.randn(slots, KV_HEADS, DIM, dtype=DTYPE, device=device) for _ in range(layers)]

        return cls(kv_table(kind(), kind()), slots)


def factors(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    angle = torch.rand(n, DIM // 2, device=device) * 6.28
    return angle.cos(), angle.sin()


def distinct(count: int, below: int, seed: int) -> Tensor:
    return torch.randperm(below, generator=torch.Generator().manual_seed(seed))[:count]


# --- each kernel against its reference, on the device ---------------------------------------------------------------


def close(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    error = float((got.double() - want.double()).abs().max()) if got.numel() else 0.0
    if not error <= tolerance:
        sys.exit(f"{name}: off by {error:.3g}, allowed {tolerance:.3g}")
    print(f"  {name}: off by at most {error:.2e}")


def check(device: torch.device) -> None:
    """Exit with a message at the first kernel that does not agree with its reference."""
    pool = Pool.new(3, 4096, device)
    n = 700
    cos, sin = factors(n, device)
    for name, source, target in (
        ("scattered", *distinct(2 * n, 4096, 1).view(2, n)),
        ("overlapping", torch.arange(n) + 100, torch.arange(n) + 90),
    ):
        before = [b.to("cpu", copy=True) for b in (*pool.table.keys, *pool.table.values)]
        realign(before[:3], before[3:], source, target, cos.cpu(), sin.cpu(), neox=True, rotary_dim=DIM)
        realign_on_device(
            pool.table,
            *(source.to(device), target.to(device), cos, sin),
            neox=True,
            rotary_dim=DIM,
            disjoint=name == "scattered",
        )
        for kind, got, want in zip("KKKVVV", (*pool.table.keys, *pool.table.values), before, strict=True):
            # The reference rounds from fp32 too; a fused multiply-add may move the last bit.
            close(f"realign {name} {kind}", got.cpu(), want, 2.0**-5 if kind == "K" else 0.0)
    check_attention(pool, device)
    check_selection(pool, device)
    check_interpolation(pool, device)
    print("every kernel agrees with its reference")


def check_attention(pool: Pool, device: torch.device) -> None:
    key, value = pool.table.keys[0], pool.table.values[0]
    for name, positions, keys, window in (
        ("rows", np.unique(np.random.default_rng(1).integers(0, 1500, 300)), 1500, -1),
        ("window", np.arange(900, 1500), 1500, 255),
        ("split", np.arange(1992, 2000), 2000, -1),
    ):
        sequences = [
            scattered_attention.ScatteredSequence(positions, np.arange(keys)),
            scattered_attention.ScatteredSequence(np.array([5, 9]), np.array([0, 4, 5, 9])),
        ]
        rows = len(positions) + 2
        slots = distinct(keys + 4, pool.slots, 2).int().to(device)
        q = torch.randn(rows, HEADS, DIM, dtype=DTYPE, device=device)
        out = torch.full((rows, HEADS, DIM), torch.nan, dtype=DTYPE, device=device)
        lse = torch.full((rows, HEADS), torch.nan, device=device)
        plan = plan_attention(sequences, device, window)
        scattered_attention.attend_scattered(plan, q, key, value, slots, SCALE, out, lse)
        want, mass = scattered_attention.reference(sequences, q, key, value, slots, SCALE, window_left=window)
        close(f"attention {name}", out, want, 3e-2)
        close(f"attention {name} lse", lse, mass, 1e-3)
    requests = [(np.arange(2000, 2008), np.arange(1900)), (np.array([7]), np.array([3]))]
    q = torch.randn(9, HEADS, DIM, dtype=DTYPE, device=device)
    lse = torch.randn(9, HEADS, device=device) + 8
    slots = distinct(1901, pool.slots, 3).to(device)
    scores = torch.zeros(KV_HEADS, 1901, device=device)
    plan = probe_scores.plan_probe(requests, device=device)
    probe_scores.add_probe_scores(plan, q, lse, key, value, slots, SCALE, 1.0, scores)
    want = probe_scores.reference(requests, q, lse, key, value, slots, SCALE)
    close("probe scores", scores, want, 1e-3 * float(want.max()))
    table = distinct(4000, pool.slots, 4).int().view(2, 2000).to(device)
    rows, starts, lengths = (torch.tensor(x, device=device) for x in ([1, 0], [1500, 3], [2000, 5]))
    got = torch.zeros(pool.slots, device=device)
    influence.add_influence(q[:2], lse[:2], key, table, rows, starts, lengths, SCALE, got, programs=4)
    want = influence.reference(q[:2], lse[:2], key, table, rows, starts, lengths, SCALE)
    close("influence", got, want, 1e-3 * float(want.max()))


def check_selection(pool: Pool, device: torch.device) -> None:
    slots = distinct(600, pool.slots, 5).to(device)
    cached = pool.table.values[0]
    fresh = cached[slots] + 0.3 * torch.randn(600, KV_HEADS, DIM, dtype=DTYPE, device=device)
    out = torch.full((600,), torch.nan, device=device)
    deviation.value_deviation(fresh, cached, slots, out)
    want = deviation.reference(fresh, cached, slots)
    close("deviation", out, want, 1e-5)
    chosen = deviation.select_rows(out, 64)
    if chosen.rows.tolist() != sorted(torch.argsort(out, descending=True, stable=True)[:64].tolist()):
        sys.exit("selection: other rows than a sort on the host finds")


def interpolation_plan(
    pool: Pool, sizes: list[tuple[int, int]], device: torch.device
) -> tuple[Plan, list[tuple[Tensor, Tensor, Tensor]]]:
    """A plan of random weights, and its parts as `reference_carry` takes them."""
    kept, chosen = (sum(column) for column in zip(*sizes, strict=True))
    slots = distinct(kept + chosen, pool.slots, 6).to(device)
    some, others = (Rows(s, *factors(len(s), device)) for s in slots.split([kept, chosen]))
    weights = torch.zeros(kept, padded_width(max(m for _, m in sizes)), dtype=DTYPE, device=device)
    parts = []
    for rows, cols in zip(
        torch.arange(kept, device=device).split([u for u, _ in sizes]),
        torch.arange(chosen, device=device).split([m for _, m in sizes]),
        strict=True,
    ):
        part = torch.randn(len(rows), len(cols), device=device).to(DTYPE) / len(cols)
        weights[rows, : len(cols)] = part
        parts.append((rows, cols, part))
    options = launch_options(pool.table.keys[0], pool.table.values[0], **ROTARY)
    items = torch.from_numpy(plan_items(sizes, options["carry"]["BLOCK_KEPT"])).to(device)
    return Plan(some, others, weights, items, options), parts


def check_interpolation(pool: Pool, device: torch.device) -> None:
    layers = list(zip(pool.table.keys, pool.table.values, strict=True))
    plan, parts = interpolation_plan(pool, [(410, 102), (3, 1), (1, 70)], device)
    looks = look_rows(layers, plan.kept, **ROTARY)
    close("interpolation looks", looks, reference_look(layers, plan.kept, **ROTARY), 1e-5)
    before = save_rows(plan, *layers[0])
    for (keys, values), following in zip(layers, [*layers[1:], None], strict=True):
        for got, buffer in zip(before, (keys, values), strict=True):
            close("interpolation rows kept", got, buffer[plan.chosen.slots], 0.0)
            buffer[plan.chosen.slots] += torch.randn_like(got)
        change, after = change_rows(plan, keys, values, before, following)
        want = reference_change(keys, values, before, plan.chosen, **ROTARY)
        close("interpolation changes", change, want, 2.0**-5)
        expected = reference_carry(keys, values, change, parts, plan.kept, **ROTARY)
        carry_rows(plan, keys, values, change)
        for kind, buffer, value in zip("KV", (keys, values), expected, strict=True):
            close(f"interpolation {kind}", buffer[plan.kept.slots], value, 2.0**-5)
        before = after or before


# --- times -----------------------------------------------------------------------------------------------------------


def plan_attention(
    sequences: list[scattered_attention.ScatteredSequence], device: torch.device, window_left: int = -1
) -> scattered_attention.ScatteredPlan:
    group = HEADS // KV_HEADS
    major, minor = torch.cuda.get_device_capability(device)
    capability = 10 * major + minor
    packed = max(len(query) for query, _ in sequences) * group
    return scattered_attention.plan_scattered(
        sequences,
        group=group,
        kv_heads=KV_HEADS,
        tiling=scattered_attention.choose_tiling(packed, DIM, DIM, DTYPE.itemsize, capability),
        multiprocessors=torch.cuda.get_device_properties(device).multi_processor_count,
        device=device,
        window_left=window_left,
    )


def time_realign(pool: Pool, n: int, device: torch.device) -> list[Row]:
    cos, sin = factors(n, device)
    layers = len(pool.table.keys)
    moved, flops = 2 * n * layers * pool.table.row_bytes, 3 * n * layers * KV_HEADS * DIM
    runs = torch.arange(2 * n).view(2, n).to(device)
    scattered = distinct(2 * n, pool.slots, 1).view(2, n).to(device)
    rows = []
    for what, (source, target), disjoint in (
        ("runs", runs, True),
        ("scattered", scattered, True),
        ("scattered, staged", scattered, False),
    ):
        ms = time_ms(
            lambda source=source, target=target, disjoint=disjoint: realign_on_device(
                pool.table, source, target, cos, sin, neox=True, rotary_dim=DIM, disjoint=disjoint
            )
        )
        rows.append(Row("realign", what, ms, moved, flops))
    return rows


def flash_prefill(positions: np.ndarray, slots: Tensor, pool: Pool, q: Tensor, device: torch.device) -> float | None:
    """ms of FlashInfer's causal prefill of the last ``len(positions)`` of the keys; None without FlashInfer."""
    try:
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper
    except ImportError:
        return None
    wrapper = BatchPrefillWithPagedKVCacheWrapper(torch.empty(256 << 20, dtype=torch.uint8, device=device), "NHD")
    n, keys = len(positions), len(slots)
    wrapper.plan(
        torch.tensor([0, n], dtype=torch.int32),
        torch.tensor([0, keys], dtype=torch.int32),
        slots,
        torch.ones(1, dtype=torch.int32),
        HEADS,
        KV_HEADS,
        DIM,
        1,
        causal=True,
        q_data_type=DTYPE,
    )
    cache = (pool.table.keys[0][:, None], pool.table.values[0][:, None])
    return time_ms(lambda: wrapper.run(q, cache))


def time_attention(pool: Pool, keys: int, device: torch.device) -> list[Row]:
    """Ours over scattered rows and over a dense chunk, FlashInfer over the dense chunk: equal rows, FLOPs told."""
    rows = []
    slots = distinct(keys, pool.slots, 2).int().to(device)
    few = np.arange(keys - 8, keys)
    dense = np.arange(keys - keys // 8, keys)
    random = np.sort(np.random.default_rng(1).choice(keys, keys // 8, replace=False))
    for what, positions in (("scattered", random), ("dense", dense), ("8 queries", few)):
        n = len(positions)
        q = torch.randn(n, HEADS, DIM, dtype=DTYPE, device=device)
        out, lse = torch.empty_like(q), torch.empty(n, HEADS, device=device)
        plan = plan_attention([scattered_attention.ScatteredSequence(positions, np.arange(keys))], device)
        ms = time_ms(
            lambda plan=plan, q=q, out=out, lse=lse: scattered_attention.attend_scattered(
                plan, q, pool.table.keys[0], pool.table.values[0], slots, SCALE, out, lse
            )
        )
        flops = 4 * HEADS * DIM * int((positions + 1).sum())
        moved = pool.table.row_bytes * keys + 4 * n * HEADS * DIM
        rows.append(Row("scattered attention", f"{what}: {n} rows of {keys}", ms, moved, flops))
        theirs = flash_prefill(positions, slots, pool, q, device) if what != "scattered" else None
        if theirs is not None:
            rows.append(Row("FlashInfer prefill", f"{what}: {n} rows of {keys}", theirs, moved, flops))
    return rows


def time_selection(pool: Pool, n: int, device: torch.device) -> list[Row]:
    slots = distinct(n, pool.slots, 3).to(device)
    key, value = pool.table.keys[0], pool.table.values[0]
    fresh, out = torch.randn(n, KV_HEADS, DIM, dtype=DTYPE, device=device), torch.empty(n, device=device)
    elements = n * KV_HEADS * DIM
    rows = [
        Row(
            "deviation",
            f"{n} tokens",
            time_ms(lambda: deviation.value_deviation(fresh, value, slots, out)),
            4 * elements + 4 * n,
            6 * elements,
        ),
        Row("select_rows", f"{n // 10} of {n}", time_ms(lambda: deviation.select_rows(out, n // 10)), 8 * n, 0),
    ]
    for m in (8, 32):
        requests = [(np.arange(n, n + m), np.arange(n))]
        plan = probe_scores.plan_probe(requests, device=device)
        q, lse = torch.randn(m, HEADS, DIM, dtype=DTYPE, device=device), torch.full((m, HEADS), 9.0, device=device)
        scores = torch.zeros(KV_HEADS, n, device=device)
        ms = time_ms(
            lambda plan=plan, q=q, lse=lse, scores=scores: probe_scores.add_probe_scores(
                plan, q, lse, key, value, slots, SCALE, 1.0, scores
            )
        )
        flops = 2 * n * m * HEADS * DIM + 2 * elements
        rows.append(Row("probe scores", f"{m} queries, {n} tokens", ms, 4 * elements + 8 * n * KV_HEADS, flops))
    return rows


def time_influence(pool: Pool, span: int, device: torch.device) -> list[Row]:
    batch = 8
    table = torch.arange(batch * span, dtype=torch.int32, device=device).view(batch, span) % pool.slots
    q, lse = torch.randn(batch, HEADS, DIM, dtype=DTYPE, device=device), torch.full((batch, HEADS), 9.0, device=device)
    request, start = torch.arange(batch, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
    length, total = torch.full_like(start, span), torch.zeros(pool.slots, device=device)

    def step() -> None:
        influence.add_influence(q, lse, pool.table.keys[0], table, request, start, length, SCALE, total, programs=16)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    moved = batch * span * (KV_HEADS * DIM * 2 + 12)
    return [
        Row(
            "influence", f"{batch} spans of {span}, graph", time_ms(graph.replay), moved, 2 * batch * span * HEADS * DIM
        )
    ]


def time_interpolation(pool: Pool, n: int, device: torch.device) -> list[Row]:
    """A prompt of n reused tokens, a fifth of them recomputed, in parts of 512."""
    count = max(1, n // 512)
    u, m = n // count - n // count // 5, n // count // 5
    plan, _ = interpolation_plan(pool, [(u, m)] * count, device)
    first, second, third = list(zip(pool.table.keys, pool.table.values, strict=True))[:3]
    before = save_rows(plan, *first)
    change, _ = change_rows(plan, *first, before, second)
    elements, row_bytes = 2 * KV_HEADS * DIM, pool.table.row_bytes
    kept, chosen, turned = count * u, count * m, KV_HEADS * DIM
    rows = []
    for name, run, moved, flops in (
        (
            "interpolation change",
            lambda: change_rows(plan, *first, before, second),
            5 * chosen * row_bytes,
            (elements + 3 * turned) * chosen,
        ),
        (
            "interpolation carry",
            lambda: carry_rows(plan, *first, change),
            2 * kept * row_bytes + chosen * row_bytes + plan.weights.numel() * DTYPE.itemsize,
            2 * kept * m * elements + 3 * turned * kept,
        ),
        (
            "interpolation looks",
            lambda: look_rows([first, second, third], plan.kept, **ROTARY),
            3 * kept * (2 * row_bytes + 4 * elements),
            3 * (3 * elements + 3 * turned) * kept,
        ),
    ):
        rows.append(Row(name, f"{chosen} of {n} recomputed", time_ms(run), moved, flops))
    return rows


def table(rows: list[Row], rates: Rates) -> str:
    lines = [f"{'kernel':<20} {'what':<34} {'ms':>8} {'GB/s':>7} {'of copy':>8} {'TFLOP/s':>8} {'of matmul':>9}"]
    for row in rows:
        seconds = row.ms / 1e3
        lines.append(
            f"{row.kernel:<20} {row.what:<34} {row.ms:8.4f} {row.bytes / seconds / 1e9:7.0f}"
            f" {row.bytes / seconds / rates.copy:8.1%} {row.flops / seconds / 1e12:8.1f}"
            f" {row.flops / seconds / rates.matrix:9.1%}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--check-only", action="store_true", help="hold the kernels to their references, time nothing")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048, help="reused tokens of the copy and of the selection")
    parser.add_argument("--keys", type=int, default=16384, help="keys of the attention")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench.kernels times GPU kernels: no CUDA device was found here, nothing was measured.")
    device = torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name(device)}, PyTorch {torch.__version__}")
    with torch.cuda.device(device):
        check(device)
        if arguments.check_only:
            return
        rates = measure_rates(device)
        print(f"copy {rates.copy / 1e9:.0f} GB/s, bfloat16 matmul {rates.matrix / 1e12:.0f} TFLOP/s")
        slots = max(4 * arguments.tokens, arguments.keys + 1, 1 << math.ceil(math.log2(8 * arguments.tokens)))
        pool = Pool.new(arguments.layers, slots, device)
        rows = [
            *time_realign(pool, arguments.tokens, device),
            *time_attention(pool, arguments.keys, device),
            *time_selection(pool, arguments.tokens, device),
            *time_influence(pool, min(arguments.tokens, pool.slots // 8), device),
            *time_interpolation(pool, arguments.tokens, device),
        ]
    print(table(rows, rates))
    if arguments.json:
        report = {
            "device": torch.cuda.get_device_name(device),
            "rates": rates._asdict(),
            "rows": [row._asdict() for row in rows],
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
