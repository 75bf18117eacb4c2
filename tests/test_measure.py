"""The measuring room: its tasks, its statistics, and its divergence on a real server with the tiny model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from reference import Reference
from tiny_model import make_tiny_llama

from bench.fidelity import render, table
from sglang_relay.fetch_model import ensure_model
from sglang_relay.measure import statistics
from sglang_relay.measure.chains import Chain, Decoding, Template, build_chains
from sglang_relay.measure.divergence import (
    _PROCESSOR,
    FLOOR,
    SERVER_ARGS,
    Case,
    MeasureError,
    _logits,
    compare,
    cost_of,
    measure,
    parse_choice,
    read,
    require_reuse,
)
from sglang_relay.measure.server import Server
from sglang_relay.measure.tasks import KINDS, SPLITS, Task, load_tasks

# ------------------------------------------------------------------ tasks


def _words(task: Task) -> list[str]:
    own = [task.topic, task.question, *(agent.prompt for agent in task.agents)]
    return [word.strip(".,;:?!()").lower() for text in own for word in text.split()]


@pytest.mark.parametrize(("split", "least"), [("calibration", 16), ("development", 16), ("heldout", 32)])
def test_a_split_has_every_kind_with_both_suffixes(split: str, least: int) -> None:
    tasks = load_tasks(split)
    assert len(tasks) >= least
    assert {(task.kind, task.long) for task in tasks} == {(kind, long) for kind in KINDS for long in (False, True)}
    assert {task.domain for task in tasks} == {"maths", "code", "summary", "plan", "debate"}


def test_tasks_are_well_formed() -> None:
    tasks = [task for split in SPLITS for task in load_tasks(split)]
    assert len({task.id for task in tasks}) == len(tasks) == len({task.digest for task in tasks})
    for task in tasks:
        agents = {"single": {1}, "several": {2, 3}, "dependent": {2}, "judge": {2}}[task.kind]
        assert len(task.agents) in agents, task.id
        assert len({agent.name for agent in task.agents}) == len(task.agents), task.id
        texts = [task.topic, task.role, task.question, *(t for a in task.agents for t in (a.role, a.prompt))]
        assert all(text == text.strip() and text[-1] in ".?" for text in texts), task.id
        assert [list(task.reads(i)) for i in range(len(task.agents))] == (
            [[], [0]] if task.kind == "dependent" else [[]] * len(task.agents)
        )


def test_suffixes_have_their_lengths() -> None:
    tokenizer = Template(ensure_model("smollm2-135m")).tokenizer
    for task in (task for split in SPLITS for task in load_tasks(split)):
        length = len(tokenizer.encode(task.suffix))
        assert (150 <= length <= 300) if task.long else (16 <= length <= 40), (task.id, length)


def test_splits_share_no_wording() -> None:
    """A task that is copied to another split, or reworded lightly, shares runs of words with its source."""
    runs: dict[str, set[tuple[str, ...]]] = {}
    rubrics: dict[str, set[str]] = {}
    for split in SPLITS:
        tasks = load_tasks(split)
        sequences = [_words(task) for task in tasks]
        runs[split] = {tuple(words[i : i + 6]) for words in sequences for i in range(len(words) - 5)}
        rubrics[split] = {task.rubric for task in tasks if task.rubric is not None}
    for one, other in (SPLITS[:2], SPLITS[1:], (SPLITS[0], SPLITS[2])):
        shared = runs[one] & runs[other], rubrics[one] & rubrics[other]
        assert shared == (set(), set())


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="known: calibration, development, heldout"):
        load_tasks("test")


# ------------------------------------------------------------------ statistics


def test_summary_of_known_values() -> None:
    found = statistics.summarise([4.0, 1.0, 3.0, 2.0])
    assert (found.cases, found.mean.value, found.median.value, found.max) == (4, 2.5, 2.5, 4.0)
    assert found.p90.value == pytest.approx(3.7)
    assert found.mean.low < 2.5 < found.mean.high
    constant = statistics.summarise([0.3] * 5)
    for estimate in (constant.mean, constant.median, constant.p90):
        assert estimate == pytest.approx((0.3, 0.3, 0.3))


def test_the_interval_of_a_mean_is_as_wide_as_theory_says() -> None:
    x = np.random.default_rng(5).normal(size=400)
    found = statistics.summarise(x.tolist())
    half = 1.96 * x.std() / math.sqrt(len(x))
    assert found.mean.high - found.mean.value == pytest.approx(half, rel=0.1)
    assert found.mean.value - found.mean.low == pytest.approx(half, rel=0.1)
    # The same seed draws the same cases.
    assert statistics.summarise(x.tolist()) == found


def test_differences_are_paired() -> None:
    """Cases differ a lot among themselves, the policies by a constant: only pairing sees how certain that is."""
    second = [10.0 * i for i in range(20)]
    first = [value - 1 for value in second]
    found = statistics.paired(first, second)
    assert found.difference == pytest.approx((-1.0, -1.0, -1.0))
    assert found.below == 1.0
    assert statistics.paired(second, first).below == 0.0
    assert statistics.gap_closed([0.25 * value for value in second], second) == pytest.approx((0.75, 0.75, 0.75))


def test_statistics_refuse_what_has_no_answer() -> None:
    with pytest.raises(ValueError, match="no values"):
        statistics.summarise([])
    with pytest.raises(ValueError, match="the cases differ"):
        statistics.paired([1.0, 2.0], [1.0])


# ------------------------------------------------------------------ one case


def test_divergence_of_known_distributions() -> None:
    p = np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    q = np.log([[0.5, 0.25, 0.25], [0.1, 0.7, 0.2], [0.4, 0.3, 0.3]])
    found = compare(p.astype(np.float32), q.astype(np.float32))
    assert found.kl[0] == 0
    assert found.kl[1] == pytest.approx(0.8 * math.log(8 / 7) + 0.1 * math.log(1 / 2), abs=1e-6)
    assert found.agree.tolist() == [True, True, False]
    assert found.exact_length == 2
    assert compare(p, p).exact_length == 3


def test_choices_become_custom_params() -> None:
    assert parse_choice("rotate").params == {"relay_policy": "rotate"}
    assert parse_choice("probe@0.2+router=false+note=a").params == {
        "relay_policy": "probe",
        "relay_budget": 0.2,
        "relay_router": False,
        "relay_note": "a",
    }
    for bad in ("", "@0.2", "probe+router", FLOOR):
        with pytest.raises(ValueError, match=r"policy|key=value"):
            parse_choice(bad)


def test_cost_counts_what_was_not_reused() -> None:
    report = {"relayed": 60, "recomputed": 20, "cost": 0.5}
    assert cost_of(report, 80) == 0.5
    assert cost_of(report, 100) == pytest.approx((0.5 * 80 + 20) / 100)
    assert cost_of({"relayed": 0, "recomputed": 0}, 100) == 1.0
    assert cost_of({"relayed": 75, "recomputed": 25}, 100) == 0.25


def test_a_prompt_that_was_not_reused_is_no_result() -> None:
    whole = {"relayed": 80, "recomputed": 20, "declined": None}
    for fine in (whole, {"relayed": 0, "recomputed": 0, "declined": "long_suffix"}):
        require_reuse("probe", fine, 100)
    for lost in (whole | {"relayed": 40}, whole | {"declined": "internal_error:copy"}):
        with pytest.raises(MeasureError, match="was to reuse 100 tokens"):
            require_reuse("probe", lost, 100)


def _case(policy: str, chain: str, kl: float, *, reused: int, cost: float) -> Case:
    return Case(chain, "single", policy, 2 * reused, reused, 20, (kl, kl), 1.0, True, 2, cost, None)


def test_the_table_pools_costs_and_pairs_chains() -> None:
    cases = [
        _case("rotate", "a", 0.04, reused=100, cost=0.0),
        _case("probe", "a", 0.01, reused=100, cost=0.3),
        _case("rotate", "b", 0.02, reused=300, cost=0.0),
        _case("probe", "b", 0.005, reused=300, cost=0.1),
    ]
    rows = table(cases)
    assert rows["probe"]["cost"] == pytest.approx((100 * 0.3 + 300 * 0.1) / 400)
    assert rows["probe"]["gap_closed"]["value"] == pytest.approx(0.75)
    assert rows["probe"]["paired"]["rotate"]["difference"]["value"] == pytest.approx(-0.0225)
    assert rows["rotate"]["kl"]["mean"]["value"] == pytest.approx(0.03)
    assert [line.split()[0] for line in render(rows).splitlines()] == ["policy", "rotate", "probe"]


# ------------------------------------------------------------------ prompts


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("model"))


def test_texts_stand_in_the_prompt_as_they_were_decoded(model: Path) -> None:
    template = Template(model)
    tokenizer = template.tokenizer
    first, second = [900, 5, 901, 902], [7, 903]
    tokens, segments = template.prompt("role", ["before ", first, " between ", second, " after"])
    assert [tokens[a:b] for a, b in segments] == [first, second]
    spliced = f"before {tokenizer.decode(first)} between {tokenizer.decode(second)} after"
    chat = [{"role": "system", "content": "role"}, {"role": "user", "content": spliced}]
    assert tokenizer.decode(tokens) == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def test_a_template_without_system_messages_still_gets_the_role(model: Path) -> None:
    template = Template(model)
    plain = template.tokenizer.chat_template
    user_only = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + plain
    for chat_template in (user_only, refusing):
        template.tokenizer.chat_template = chat_template
        tokens, ((start, stop),) = template.prompt("the role", ["a ", [900, 901], " b"])
        assert "the role\n\na " in template.tokenizer.decode(tokens)
        assert tokens[start:stop] == [900, 901]


# ------------------------------------------------------------------ a real server

SETTINGS = ("--dtype", "float32", "--max-total-tokens", 32768, "--chunked-prefill-size", 1024)
DECODING = Decoding(min_tokens=80, max_tokens=96, temperature=0.0)
VOCAB, EOS_ID = 1024, 1
TASKS = ("dev-02", "dev-05", "dev-13")  # one source, two, two of which the second read the first


def _tokens(n: int, seed: int) -> list[int]:
    return torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


class Room(NamedTuple):
    server: Server
    model: Path
    reference: Reference
    tasks: list[Task]
    chains: list[Chain]


@pytest.fixture(scope="module")
def room(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    with pytest.MonkeyPatch.context() as patch, Server(model, *SERVER_ARGS, *SETTINGS) as server:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        tasks = [task for task in load_tasks("development") if task.id in TASKS]
        chains = build_chains(server, model, tasks, DECODING, dtype="float32")
        yield Room(server, model, Reference(model), tasks, chains)


def test_chains_hold_what_producers_decoded(room: Room) -> None:
    assert [chain.task.id for chain in room.chains] == list(TASKS)
    for chain in room.chains:
        assert [chain.prompt[a:b] for a, b in chain.segments] == [p.output for p in chain.producers]
        assert all(80 <= len(p.output) <= 96 for p in chain.producers)
        assert 0 < len(chain.forced) <= 32 and chain.suffix >= 16
    first, second = room.chains[2].producers
    text = first.output
    assert any(second.prompt[i : i + len(text)] == text for i in range(len(second.prompt)))


def test_transcripts_are_decoded_once(room: Room) -> None:
    said: list[str] = []
    again = build_chains(room.server, room.model, room.tasks, DECODING, dtype="float32", progress=said.append)
    assert again == room.chains and not said
    build_chains(room.server, room.model, room.tasks[:1], DECODING, dtype="bfloat16", progress=said.append)
    assert said


def test_only_outputs_become_donors(room: Room) -> None:
    """What a replay donates is what decoding donates; the task's text, which all prompts share, is no part of it."""
    for chain in room.chains:
        chain.donate(room.server, "donors")
        ask = {"relay_policy": "rotate", "relay_donate": "none"}
        answer = room.server.generate(
            chain.prompt, fields={"cache_salt": "donors"}, max_new_tokens=1, custom_params=ask
        )
        report = answer["meta_info"]["relay"]
        assert report["relayed"] == chain.reused and report["segments"] == len(chain.segments), report


def test_replayed_donors_equal_decoded_ones(room: Room) -> None:
    chain = room.chains[1]
    for producer in chain.producers:
        answer = room.server.generate(
            producer.prompt, fields={"cache_salt": "decoded"}, max_new_tokens=len(producer.output) + 1, ignore_eos=True
        )
        # One token more: the last one of an output has no KV.
        assert answer["output_ids"][:-1] == producer.output
    chain.donate(room.server, "replayed")
    params = {"relay_policy": "rotate"}
    decoded, replayed = (
        read(room.server, chain.prompt, chain.forced, params, salt=salt) for salt in ("decoded", "replayed")
    )
    assert decoded.report["relayed"] == replayed.report["relayed"] == chain.reused
    assert compare(decoded.logprobs, replayed.logprobs).kl.max() < 1e-9


def test_the_exact_policy_does_not_diverge_and_rotation_does(room: Room) -> None:
    """In this order: were the exact KV of the first within reach of the second, rotation would look exact as well."""
    cases = measure(room.server, room.chains, [parse_choice("full"), parse_choice("rotate")])
    of = {policy: [case for case in cases if case.policy == policy] for policy in ("rotate", "full", FLOOR)}
    assert [len(rows) for rows in of.values()] == [3, 3, 3]
    for exact in of["full"] + of[FLOOR]:
        assert max(exact.kl) < 1e-8
        assert exact.top1 == 1 and exact.first and exact.exact_length == len(exact.kl)
    for rotated, full in zip(of["rotate"], of["full"], strict=True):
        assert rotated.kl_mean > 1e-4
        assert rotated.cost == 0 and full.cost == pytest.approx((6 - 0.9) / 6, abs=1e-4)  # K and V of the last layer
        assert rotated.declined is None


def test_a_policy_that_the_server_refuses_is_no_result(room: Room) -> None:
    """The request would be served by full prefill, and the policy would look exact."""
    with pytest.raises(MeasureError, match="bad_custom_params"):
        measure(room.server, room.chains[:1], [parse_choice("no-such-policy")])


def test_distributions_are_those_of_an_independent_decoder(room: Room) -> None:
    """Behind tokens that no greedy decoding would give, an end of sequence among them."""
    prompt, forced = _tokens(300, 1), _tokens(12, 2)
    forced[5] = EOS_ID
    reading = read(room.server, prompt, forced, {"relay": "off"}, salt="whole")
    assert reading.logprobs.shape == (len(forced), VOCAB) and reading.logprobs.dtype == np.float32
    for position in (0, 1, len(forced) - 1):
        want = room.reference.prefill(prompt + forced[:position]).logits.log_softmax(-1).numpy()
        assert np.abs(reading.logprobs[position] - want).max() < 1e-3
        assert position or reading.first == want.argmax() != forced[0]


def test_requests_of_one_batch_are_not_mixed_up(room: Room, tmp_path: Path) -> None:
    """One that is forced to its end, one that samples for itself, and one that does so behind what is forced. Of the
    last, the first chunk of the prompt runs, and is sampled behind, together with the prompts of the others."""
    prompts, forced = [_tokens(n, n) for n in (40, 41, 1300)], [_tokens(9, 20), [], _tokens(5, 21)]
    alone = [read(room.server, prompts[i], forced[i], {"relay": "off"}, salt="alone") for i in (0, 2)]
    folders = [tmp_path / str(i) for i in range(3)]
    for folder in folders:
        folder.mkdir()
    sampling = [
        {
            **{"max_new_tokens": 9, "ignore_eos": True, "temperature": 0 if tokens else 1},
            "custom_params": {"relay": "off", "forced_tokens": tokens, "forced_folder": str(folder)},
        }
        for tokens, folder in zip(forced, folders, strict=True)
    ]
    together = {
        **{"input_ids": prompts, "sampling_params": sampling, "cache_salt": "together"},
        "custom_logit_processor": [_PROCESSOR, None, _PROCESSOR],
    }
    outputs = [answer["output_ids"] for answer in room.server.post("/generate", together)]
    assert [len(output) for output in outputs] == [9, 9, 9]
    assert outputs[0] == forced[0] and outputs[2][:5] == forced[2]
    assert [len(list(folder.iterdir())) for folder in folders] == [9, 0, 5]
    for i, reading in zip((0, 2), alone, strict=True):
        logits = torch.from_numpy(_logits(folders[i], len(forced[i])))
        assert compare(reading.logprobs, logits.log_softmax(-1).numpy()).kl.max() < 1e-9


class Spoilt:
    """A server that answers to a changed request, and may spoil what it leaves."""

    def __init__(self, server: Server, drop: str = "", spoil: Callable[[Path], object] = lambda folder: None) -> None:
        self.server, self.drop, self.spoil = server, drop, spoil

    def generate(self, prompt: list[int], *, fields: dict[str, Any], **sampling: Any) -> Any:
        kept = {name: value for name, value in fields.items() if name != self.drop}
        answer = self.server.generate(prompt, fields=kept, **sampling)
        self.spoil(Path(sampling["custom_params"]["forced_folder"]))
        return answer


def test_a_reading_that_is_not_whole_is_no_result(room: Room) -> None:
    def broken(**how: Any) -> None:
        read(Spoilt(room.server, **how), _tokens(40, 3), _tokens(4, 4), {"relay": "off"})  # type: ignore[arg-type]

    with pytest.raises(MeasureError, match="was forced"):
        broken(drop="custom_logit_processor")
    for spoil in (
        lambda folder: (folder / "3.npy").unlink(),
        lambda folder: np.save(folder / "2.npy", np.zeros(VOCAB - 1, np.float32)),
    ):
        with pytest.raises(MeasureError, match="did not leave 4 distributions"):
            broken(spoil=spoil)
