"""FlashInfer attention without a GPU: FlashInfer's own Python runs, its compiled kernels are interpreted.

`BatchPrefillWithPagedKVCacheWrapper` is the installed one, so every call binds to its signature and passes its checks.
Only the module that it would compile is replaced, by `Kernels`: what the CUDA sources do with their arguments
(attention/variants.cuh, attention/prefill.cuh, page.cuh), row by row in fp64.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import flashinfer
import numpy as np
import pytest
import torch
from flashinfer.utils import MaskMode, TensorLayout
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_relay.attention import Heads, Sequence, TorchAttention, choose_engine, run_plan
from sglang_relay.attention.engines import check_engine
from sglang_relay.attention.flashinfer import WRAPPERS, FlashInferAttention
from sglang_relay.attention.per_stage import PerStageAttention, scattered_cost
from sglang_relay.attention.run_plan import RunPlan, plan_runs
from sglang_relay.attention.triton import TritonAttention
from sglang_relay.config import ConfigError

CPU = torch.device("cpu")
META = torch.device("meta")
SCALE = 0.3


def _names(function: Any, inner: str) -> list[str]:
    """Parameters of the function ``inner`` that the installed ``function`` defines."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == inner]
    return [a.arg for a in found[0].args.args]


RUN = _names(flashinfer.prefill.get_batch_prefill_module, "paged_run")


class Kernels:
    """The module of one set of types, interpreted. visible: per row of the last run, the slots that it saw."""

    def __init__(self) -> None:
        self.types: tuple[Any, ...] = ()
        self.plans = 0
        self.runs = 0
        self.visible: list[set[int]] = []

    def plan(self, *args: Any) -> dict[str, Any]:
        """data/csrc/batch_prefill.cu, ``BatchPrefillWithKVCachePlan``."""
        _, _, _, qo_indptr, kv_indptr, kv_lens, rows, batch, heads, kv_heads, page, graph = args[:12]
        self.plans += 1
        for tensor in (qo_indptr, kv_indptr, kv_lens):  # read through host pointers of IdType
            assert tensor.device.type == "cpu" and tensor.dtype == torch.int32 and tensor.is_contiguous()
        assert len(qo_indptr) == len(kv_indptr) == batch + 1 == len(kv_lens) + 1
        assert rows == qo_indptr[-1] and heads % kv_heads == 0 and page == 1 and graph is False
        assert bool((qo_indptr.diff() > 0).all()) and bool((kv_indptr.diff() > 0).all())
        assert self.types[5:7] == args[12:14]  # what is compiled is what is planned
        return {"qo": qo_indptr.tolist(), "kv": kv_indptr.tolist(), "dims": args[12:14], "causal": args[14]}

    def paged_run(self, *args: Any) -> None:
        a = dict(zip(RUN, args, strict=False))
        self.runs += 1
        assert a["layout"] == TensorLayout.NHD.value and a["window_left"] == -1 and a["logits_soft_cap"] == 0.0
        if a["q"].device.type == "meta":
            return
        query, out, plan = a["q"], a["o"], a["plan_info_vec"]
        assert plan["qo"] == a["qo_indptr"].tolist() and plan["kv"] == a["paged_kv_indptr"].tolist()
        assert query.stride(-1) == 1 and out.is_contiguous()
        assert plan["dims"] == (query.shape[-1], out.shape[-1])
        assert self.types[1:4] == (query.dtype, a["paged_k_cache"].dtype, out.dtype)
        self.visible = [set() for _ in range(len(query))]
        for sequence in range(len(plan["qo"]) - 1):
            self._sequence(sequence, query, out, plan, a)

    def _sequence(self, number: int, query: torch.Tensor, out: torch.Tensor, plan: dict, a: dict) -> None:
        first, stop = plan["qo"][number : number + 2]
        low, high = plan["kv"][number : number + 2]
        keys, values = a["paged_k_cache"], a["paged_v_cache"]
        page = keys.shape[1]
        kv_len = (high - low - 1) * page + int(a["paged_kv_last_page_len"][number])
        slots = a["paged_kv_indices"][low:high].long()
        k = keys[slots].flatten(0, 1)[:kv_len].double()
        v = values[slots].flatten(0, 1)[:kv_len].double()
        row, key = torch.arange(stop - first)[:, None], torch.arange(kv_len)[None, :]
        if a["mask_mode"] == MaskMode.CUSTOM.value:
            offset = row * kv_len + key
            data = a["maybe_custom_mask"][int(a["maybe_mask_indptr"][number]) :]
            seen = (data[offset // 8].long() >> (offset % 8)) & 1 == 1
        else:
            assert a["mask_mode"] == MaskMode.CAUSAL.value and plan["causal"]
            seen = key + (stop - first) <= kv_len + row
        for i in range(stop - first):
            self.visible[first + i] = set(slots[seen[i]].tolist())
        group = query.shape[1] // keys.shape[2]
        q = query[first:stop].double()
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * a["sm_scale"]
        weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
        out[first:stop] = torch.einsum("hqk,khd->qhd", weights, v.repeat_interleave(group, 1)).to(out.dtype)


@pytest.fixture(scope="module")
def kernels() -> Iterator[Kernels]:
    """Page-locked memory needs a driver; without one plain memory stands in."""
    module, empty = Kernels(), torch.empty

    def build(backend: str, *types: Any) -> Kernels:
        module.types = (backend, *types)
        return module

    def plain(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return empty(*args, **kwargs)

    with patch.object(flashinfer.prefill, "get_batch_prefill_module", build), patch.object(torch, "empty", plain):
        yield module


def engine_for(heads: Heads, dtype: torch.dtype = torch.float16, device: torch.device = CPU) -> FlashInferAttention:
    return FlashInferAttention(heads, dtype=dtype, kv_dtype=dtype, device=device)


def requests_of(*rows_and_keys: tuple[list[int], list[int]], seed: int = 0) -> list[Sequence]:
    """Slots of all keys are a shuffle of twice as many."""
    total = sum(len(keys) for _, keys in rows_and_keys)
    slots = torch.randperm(2 * total + 1, generator=torch.Generator().manual_seed(seed))
    out, at = [], 0
    for rows, keys in rows_and_keys:
        out.append(Sequence(np.array(rows, np.int64), slots[at : at + len(keys)], np.array(keys, np.int64)))
        at += len(keys)
    return out


def check(kernels: Kernels, sequences: list[Sequence], heads: Heads, engine: FlashInferAttention | None = None) -> Any:
    """Every row sees the right slots and no other, and the output is PyTorch's; what no row sees is NaN."""
    generator = torch.Generator().manual_seed(1)
    taken = torch.cat([s.slots for s in sequences])
    buffers = []
    for dim in (heads.dim, heads.v_dim):
        buffer = torch.full((int(taken.max()) + 2 if len(taken) else 1, heads.kv, dim), torch.nan, dtype=torch.float16)
        buffer[taken] = torch.randn(len(taken), heads.kv, dim, generator=generator).half()
        buffers.append(buffer)
    rows = sum(len(s.positions) for s in sequences)
    # As the model hands it over: a slice of the fused projection.
    query = torch.randn(rows, heads.query + 1, heads.dim, generator=generator).half()[:, 1:]
    out = torch.full((rows, heads.query, heads.v_dim), torch.nan, dtype=torch.float16)
    want = torch.full(out.shape, torch.nan)
    stage = (engine or engine_for(heads)).plan(sequences, dtype=torch.float16, device=CPU)
    keys, values = buffers
    stage.attend(query, keys, values, SCALE, out)
    plain = TorchAttention().plan(sequences, dtype=torch.float32, device=CPU)
    plain.attend(query.float(), keys, values, SCALE, want)
    assert torch.allclose(out.float(), want, atol=2e-3), float((out.float() - want).abs().max())
    if rows:
        expected = [
            set(s.slots[torch.from_numpy(keys_of(s) <= position)].tolist())
            for s in sequences
            for position in s.positions
        ]
        assert kernels.visible == expected
    return stage


def keys_of(sequence: Sequence) -> np.ndarray:
    return np.arange(len(sequence.slots)) if sequence.keys is None else sequence.keys


# ---------------------------------------------------------------------- the plan computes attention


def test_any_rows_of_any_requests(kernels: Kernels) -> None:
    """Among them, rows for which each form is the cheapest."""
    forms: set[str] = set()

    @given(data=st.data())
    @settings(deadline=None, max_examples=150)
    def compare(data: st.DataObject) -> None:
        requests = []
        for _ in range(data.draw(st.integers(1, 4))):
            n = data.draw(st.integers(0, 70))
            density = data.draw(st.sampled_from([0.05, 0.3, 0.9, 1.0]))
            random = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
            rows = np.flatnonzero(random.random(n) < density)
            there = random.random(n) < data.draw(st.sampled_from([0.5, 1.0]))
            there[rows] = True
            requests.append((rows.tolist(), np.flatnonzero(there).tolist()))
        kv, group = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 2, 3, 8]))
        heads = Heads(kv * group, kv, 8, data.draw(st.sampled_from([8, 4])))
        constants = {
            "MASKED": data.draw(st.sampled_from([0.01, 1.5, 100.0])),
            "TILE": data.draw(st.sampled_from([8, 128])),
            "LOAD": data.draw(st.sampled_from([1, 8])),
        }
        with patch.multiple(run_plan, **constants):
            stage = check(kernels, requests_of(*requests), heads)
        forms.add(stage.runs.form)

    compare()
    assert forms == {"runs", "mask", "merged"}


def test_positions_without_holes_need_no_keys(kernels: Kernels) -> None:
    check(kernels, [Sequence(np.array([2, 3, 9]), torch.arange(4, 14))], Heads(2, 1, 8, 8))


def test_no_rows_at_all(kernels: Kernels) -> None:
    before = kernels.runs
    check(kernels, requests_of(([], [0, 1]), ([], [])), Heads(2, 1, 8, 8))
    check(
        kernels,
        requests_of(
            ([], []),
        ),
        Heads(2, 1, 8, 8),
    )
    assert kernels.runs == before


@pytest.mark.parametrize(
    ("positions", "keys", "message"),
    [
        ([3, 2], [0, 1, 2, 3], "query positions"),
        ([-1, 0], [0, 1], "query positions"),
        ([1], [1, 0], "key positions"),
        ([2], [0, 1, 3], "own key"),
        ([0], [1, 2], "own key"),
        ([1], [], "own key"),
    ],
)
def test_rows_and_keys_that_do_not_fit_are_refused(positions: list[int], keys: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_runs(requests_of((positions, keys)), group=1)


# ---------------------------------------------------------------------- the rule


def ruled(*rows: list[int], keys: int, group: int) -> RunPlan:
    return plan_runs(requests_of(*((r, list(range(keys))) for r in rows)), group=group)


def test_whole_prompts_are_causal_runs() -> None:
    plan = ruled(list(range(256)), keys=256, group=1)
    assert plan.costs == {"runs": 128 * (128 + 256), "mask": 1.5 * 256 * 256, "merged": 1.5 * 128 * (128 + 256)}
    assert (plan.form, plan.mask, plan.qo_indptr.tolist()) == ("runs", None, [0, 256])


def test_fresh_text_around_a_segment_is_two_runs() -> None:
    plan = ruled([*range(512), *range(2560, 2576)], keys=2576, group=3)
    assert plan.form == "runs" and plan.qo_indptr.tolist() == [0, 512, 528]
    assert plan.kv_indptr.tolist() == [0, 512, 512 + 2576] and plan.mask is None


def test_few_scattered_rows_share_one_tile() -> None:
    plan = ruled([99, 199, 299], keys=300, group=1)
    assert plan.costs == {"runs": 64 * 600, "mask": 1.5 * 64 * 300, "merged": 1.5 * 64 * 300}
    assert plan.form == "mask" and plan.qo_indptr.tolist() == [0, 3]


def test_many_scattered_rows_are_merged_until_their_tiles_are_full() -> None:
    plan = ruled(list(range(0, 4096, 7)), keys=4096, group=4)
    assert plan.form == "merged" and plan.costs["merged"] < 0.6 * plan.costs["mask"] < plan.costs["runs"]
    rows = np.diff(plan.qo_indptr)
    assert set(rows[:-1].tolist()) == {16}  # 64 packed rows: what loading the keys costs anyhow
    assert np.diff(plan.kv_indptr).tolist() == [7 * int(r) - 6 for r in plan.qo_indptr[1:]]


def test_short_runs_with_small_gaps_are_put_together_and_long_ones_left_alone() -> None:
    near = ruled([*range(1000, 1010), *range(1013, 1023)], keys=1023, group=1)
    assert near.form == "mask" and near.qo_indptr.tolist() == [0, 20]
    long = ruled([*range(1000, 1064), *range(1067, 1131)], keys=1131, group=1)
    assert long.form == "runs" and long.qo_indptr.tolist() == [0, 64, 128]


def test_a_hole_in_the_keys_does_not_end_a_run() -> None:
    """Rows 4 and 9 see one key more each: 5 to 8 are not there."""
    plan = plan_runs(requests_of(([2, 3, 4, 9], [0, 1, 2, 3, 4, 9])), group=1)
    assert plan.form == "runs" and plan.qo_indptr.tolist() == [0, 4] and plan.kv_indptr.tolist() == [0, 6]


@given(st.lists(st.tuples(st.integers(1, 700), st.integers(0, 900)), min_size=1, max_size=4), st.sampled_from([1, 4]))
@settings(deadline=None, max_examples=60)
def test_the_cost_counts_tiles_as_the_kernel_visits_them(runs: list[tuple[int, int]], group: int) -> None:
    """attention/prefill.cuh, ``num_iterations``: a causal tile ends at its last row's key."""
    causal = masked = 0.0
    requests = []
    for rows, before in runs:
        keys, packed = rows + before, rows * group
        tile = 64 if packed <= 64 else 128
        for t in range(-(-packed // tile)):
            causal += tile * min(keys, keys - rows + (t + 1) * tile / group)
            masked += 1.5 * tile * keys
        requests.append((list(range(before, keys)), list(range(keys))))
    plan = plan_runs(requests_of(*requests), group=group)
    assert plan.costs["runs"] == pytest.approx(causal) and plan.costs["mask"] == pytest.approx(masked)
    assert plan.form == "runs" or plan.costs[plan.form] <= causal


# ---------------------------------------------------------------------- FlashInfer or Triton


WHOLE = ([*range(300)], [*range(300)])
AROUND = ([*range(200), *range(1200, 1216)], [*range(1216)])
SCATTERED = ([*range(0, 1200, 7), 1199], [*range(1200)])


@pytest.mark.parametrize(
    "requests, chosen",
    [
        ([WHOLE], "FlashInferStage"),
        ([AROUND, WHOLE], "FlashInferStage"),
        ([SCATTERED], "TritonStage"),
        ([WHOLE, SCATTERED], "TritonStage"),
        ([], "FlashInferStage"),
    ],
)
def test_causal_runs_are_flashinfers_and_scattered_rows_tritons(kernels: Kernels, requests: list, chosen: str) -> None:
    heads = Heads(4, 2, 16, 16)
    both = PerStageAttention(engine_for(heads), TritonAttention(heads, capability=90, multiprocessors=8))
    stage = both.plan(requests_of(*requests), dtype=torch.float16, device=CPU)
    assert type(stage).__name__ == chosen


@given(st.lists(st.integers(0, 900), min_size=1, max_size=300, unique=True), st.sampled_from([1, 3, 8, 200]))
@settings(deadline=None, max_examples=60)
def test_the_cost_of_scattered_rows_counts_tiles(rows: list[int], group: int) -> None:
    seen = np.array(sorted(rows)) + 1
    most, cost = max(1, 128 // group), 0.0
    for first in range(0, len(seen), most):
        tile = seen[first : first + most]
        packed = len(tile) * group
        cost += 1.3 * (64 if packed <= 64 else -(-packed // 128) * 128) * int(tile[-1])
    assert scattered_cost([seen, np.empty(0, np.int64)], group) == pytest.approx(cost)


# ---------------------------------------------------------------------- the class


def test_one_plan_serves_every_layer_and_an_unused_stage_is_never_planned(kernels: Kernels) -> None:
    engine, heads = engine_for(HEADS), HEADS
    before = kernels.plans
    engine.plan(requests_of(([0, 3], [0, 1, 2, 3])), dtype=torch.float16, device=CPU)
    assert kernels.plans == before
    stage = check(kernels, requests_of(([0, 3, 5], list(range(6)))), heads, engine)
    assert kernels.plans == before + 1
    again(stage, 3)
    assert kernels.plans == before + 1
    assert kernels.types == ("fa2", *[torch.float16] * 3, torch.int32, 8, 8, 0, False, False, False)


HEADS = Heads(4, 2, 8, 8)


def again(stage: Any, rows: int, scaling: float = SCALE, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    query, out = torch.randn(rows, 4, 8, generator=generator).half(), torch.empty(rows, 4, 8, dtype=torch.float16)
    keys, values = torch.randn(2, 200, 2, 8, generator=generator).half()
    stage.attend(query, keys, values, scaling, out)
    return out


def test_more_stages_than_wrappers_in_any_order(kernels: Kernels) -> None:
    engine = engine_for(HEADS)
    stages = [
        engine.plan(requests_of(([1, n + 3], list(range(n + 4))), seed=n), dtype=torch.float16, device=CPU)
        for n in range(WRAPPERS + 2)
    ]
    alone = []
    for n in range(len(stages)):
        own = engine_for(HEADS).plan(
            requests_of(([1, n + 3], list(range(n + 4))), seed=n), dtype=torch.float16, device=CPU
        )
        alone.append(again(own, 2))
    for n in [*range(len(stages)), *range(len(stages)), 0, 0]:
        assert torch.equal(again(stages[n], 2), alone[n])


def test_layers_of_different_scaling(kernels: Kernels) -> None:
    stage = engine_for(HEADS).plan(requests_of(([1, 5], list(range(6)))), dtype=torch.float16, device=CPU)
    first = again(stage, 2, 0.3)
    assert not torch.allclose(again(stage, 2, 0.6), first, atol=1e-2)
    assert torch.equal(again(stage, 2, 0.3), first)


def test_a_masked_stage_leaves_no_mask_to_a_causal_one(kernels: Kernels) -> None:
    engine = engine_for(HEADS)
    for rows in ([3, 30, 60], list(range(61)), [0, 60]):
        for _ in range(WRAPPERS):
            check(kernels, requests_of((rows, list(range(61)))), HEADS, engine)


@pytest.mark.parametrize("rows", [list(range(50, 90)), [3, 30, 60, 80]])
def test_nothing_is_read_back_from_the_device(kernels: Kernels, rows: list[int]) -> None:
    """Meta tensors can be written and never read: a copy to the host, or a value, raises."""
    engine = engine_for(HEADS, device=META)
    sequences = [s._replace(slots=s.slots.to(META)) for s in requests_of((rows, list(range(90))), ([2, 7], [0, 2, 7]))]
    stage = engine.plan(sequences, dtype=torch.float16, device=META)
    query = torch.empty(len(rows) + 2, 4, 8, dtype=torch.float16, device=META)
    keys = torch.empty(200, 2, 8, dtype=torch.float16, device=META)
    before = kernels.runs
    for _ in range(2):
        stage.attend(query, keys, keys, SCALE, torch.empty_like(query))
    assert kernels.runs == before + 2
    with pytest.raises((NotImplementedError, RuntimeError)):
        stage.indices.to("cpu")


def test_other_types_are_refused(kernels: Kernels) -> None:
    with pytest.raises(ValueError, match="float32"):
        engine_for(HEADS, torch.float32)
    with pytest.raises(ValueError, match="bfloat16"):
        engine_for(HEADS).plan([], dtype=torch.bfloat16, device=CPU)


# ---------------------------------------------------------------------- which one serves


def choose(wanted: str, device: str) -> Any:
    heads = {Heads(4, 2, 16, 16)}
    return choose_engine(wanted, heads, dtype=torch.float16, kv_dtype=torch.float16, device=torch.device(device))


def test_on_the_cpu_pytorch_serves() -> None:
    assert choose("auto", "cpu").name == choose("torch", "cpu").name == "torch"


@pytest.mark.parametrize("name", ["flashinfer", "triton"])
def test_what_needs_a_gpu_ends_the_start_without_one(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"attention={name}: .*needs a CUDA device, not cpu"):
        choose(name, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a driver is there")
def test_what_does_not_work_is_passed_over_by_name(caplog: pytest.LogCaptureFixture) -> None:
    assert choose("auto", "cuda").name == "torch"
    assert [r.args[0] for r in caplog.records if isinstance(r.args, tuple) and r.args] == ["flashinfer", "triton"]
    with pytest.raises(ConfigError, match="attention=flashinfer"):
        choose("flashinfer", "cuda")


def test_the_start_up_check_passes_and_finds_wrong_masks(kernels: Kernels) -> None:
    heads, types = Heads(4, 2, 16, 16), {"dtype": torch.float16, "kv_dtype": torch.float16, "device": CPU}
    check_engine(engine_for(heads), heads, **types)
    wrong = run_plan._ones
    with (
        patch.object(run_plan, "_ones", lambda first, stop, size: wrong(first, stop - (stop - first > 1), size)),
        pytest.raises(RuntimeError, match="differs"),
    ):
        check_engine(engine_for(heads), heads, **types)
