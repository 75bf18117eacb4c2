"""The cost model on a server: what it declines, what it learns, and what happens when it breaks.

The first server's calibration fails, so that it decides by the prior, in which a pass costs as much as 64 rows."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from plugins import install_plugin
from prompts import random_tokens
from tiny_model import make_tiny_llama

from sglang_relay.budget import Budget
from sglang_relay.config import RelayConfig
from sglang_relay.cost import PRIOR, TRIAL_EVERY, together
from sglang_relay.engine.consensus import Consensus, digest_of
from sglang_relay.engine.costing import LAG, Costs
from sglang_relay.engine.donors import EXACT_PREFIX
from sglang_relay.engine.selection import Work
from sglang_relay.measure.server import Server
from sglang_relay.plan import Candidate, RelayPlan, Segment
from sglang_relay.policies import make_policies

VOCAB = 1024
LAYERS = 6
CHUNK = 1024
WORTH = {"relay_policy": "rotate"}
HOPELESS = {"relay_policy": "probe", "relay_budget": 1.0}
"""Everything runs again, and a probe before it."""


class Served:
    """A server whose cost model a fault can break, and a text of 300 tokens that was decoded on it."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        self.folder = folder
        self._rng = random.Random(7)
        self._numbers = itertools.count()
        self.text: list[int] = []

    def fault(self, name: str) -> None:
        (self.folder / "fault").write_text(name, encoding="utf-8")

    def ask(self, tokens: list[int], custom: dict[str, Any], new: int = 1, **fields: Any) -> Any:
        """The request's id is the next one that is no trial."""
        rid = next(f"r{n}" for n in self._numbers if digest_of(f"r{n}") % TRIAL_EVERY)
        fields = {"rid": rid, **fields}
        return self.server.generate(tokens, max_new_tokens=new, ignore_eos=True, custom_params=custom, fields=fields)

    def decode(self) -> None:
        """Not donated: a relayed prompt may not become the text of another."""
        self.text = self.ask(self.fresh(20), {"relay": "exact"}, 300)["output_ids"]

    def fresh(self, n: int) -> list[int]:
        return random_tokens(n, self._rng, VOCAB)

    def prompt(self, reused: int = 299, tail: int = 15) -> list[int]:
        return [*self.fresh(30), *self.text[:reused], *self.fresh(tail)]

    def report(self, custom: dict[str, Any], prompt: list[int] | None = None, **fields: Any) -> dict[str, Any]:
        custom = {**custom, "relay_donate": "none"}
        return self.ask(prompt or self.prompt(), custom, **fields)["meta_info"]["relay"]

    def relay(self) -> dict[str, Any]:
        (internal,) = self.server.get("/server_info")["internal_states"]
        return internal["relay"]

    def cost(self) -> dict[str, Any]:
        return self.relay()["cost"]

    def timed(self, count: int) -> None:
        """Serve until so many more forwards have been timed."""
        goal = self.cost()["timed"] + count
        for custom in itertools.islice(itertools.cycle([WORTH, {"relay": "off"}]), 2 * count + 4):
            if self.cost()["timed"] >= goal:
                return
            self.report(custom)
        pytest.fail(f"not {count} forwards were timed: {self.cost()}")


def serve(folder: Path, fault: str, *args: object) -> Iterator[Served]:
    model = make_tiny_llama(folder / "model", vocab=VOCAB, layers=LAYERS)
    (folder / "fault").write_text(fault, encoding="utf-8")
    code = (Path(__file__).parent / "cost_fault_plugin.py").read_text(encoding="utf-8")
    env = install_plugin(folder / "plugin", "relay_test_cost_fault", code)
    env |= {"RELAY_TEST_COST": str(folder), "SGLANG_RELAY_COST_MODEL": "true"}
    with Server(model, "--radix-cache-backend", "relay", "--max-total-tokens", 8192, *args, env=env) as server:
        yield Served(server, folder)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serve(tmp_path_factory.mktemp("prior"), "calibrate", "--chunked-prefill-size", CHUNK)


@pytest.fixture
def prior(broken: Served) -> Iterator[Served]:
    """Decides by the prior, and learns nothing, unless the test lets it."""
    broken.fault("observe")
    if not broken.text:
        broken.decode()
    yield broken
    broken.fault("observe")


# ---------------------------------------------------------------------- declining


def test_a_calibration_that_fails_leaves_the_prior(prior: Served) -> None:
    cost = prior.cost()
    assert cost["calibration_seconds"] is None and cost["deciding"]
    assert cost["coefficients"] == PRIOR._asdict()
    assert "the calibration of the cost model failed" in prior.server.log()


def test_what_would_be_slower_is_prefilled_by_name(prior: Served) -> None:
    prompt, before = prior.prompt(), prior.relay()["stats"]["declined"].get("predicted_slower", 0)
    answer = prior.ask(prompt, {**HOPELESS, "relay_donate": "none"}, 8)
    report = answer["meta_info"]["relay"]
    assert report["declined"] == "predicted_slower", report
    assert (report["fresh"], report["segments"]) == (len(prompt), 0)
    predicted = report["predicted_ms"]
    assert predicted["relay"] > predicted["stock"] > 0
    assert prior.relay()["stats"]["declined"]["predicted_slower"] == before + 1
    assert answer["output_ids"] == prior.ask(prompt, {"relay": "off"}, 8)["output_ids"]


@pytest.mark.parametrize(("reused", "declined"), [(70, "predicted_slower"), (299, None)])
def test_a_second_pass_pays_for_enough_reused_tokens(prior: Served, reused: int, declined: str | None) -> None:
    """It costs 64 rows, the probe 15, and saves four fifths of the reused ones."""
    report = prior.report({"relay_policy": "probe", "relay_budget": 0.2}, prior.prompt(reused))
    assert report["declined"] == declined, report
    assert report["relayed"] + report["recomputed"] == (0 if declined else reused)
    assert ("predicted_ms" in report) == (declined is not None)


def test_full_is_never_declined(prior: Served) -> None:
    assert prior.report({"relay_policy": "full"})["recomputed"] == 299


def test_one_in_many_is_relayed_all_the_same(prior: Served) -> None:
    trial = next(f"t{n}" for n in itertools.count() if digest_of(f"t{n}") % TRIAL_EVERY == 0)
    report = prior.report(HOPELESS, rid=trial)
    assert report["declined"] is None and report["recomputed"] > 0, report


# ---------------------------------------------------------------------- learning


def test_a_failure_to_learn_harms_no_request(prior: Served) -> None:
    failures = prior.relay()["stats"]["failures"]
    prior.timed(9)
    cost, stats = prior.cost(), prior.relay()["stats"]
    assert stats["failures"] > failures and cost["learnt"] == 0
    assert cost["coefficients"] == PRIOR._asdict() and cost["deciding"]
    assert prior.report(WORTH)["relayed"] == 299


def test_only_prefills_that_ran_as_planned_are_timed(prior: Served) -> None:
    for _ in range(LAG + 1):
        prior.report(WORTH)
    before = prior.cost()["timed"]
    prior.fault("run")
    for _ in range(LAG + 1):
        assert prior.report(WORTH)["declined"] == "internal_error:forward"
        prior.report({"relay": "off"}, return_logprob=True, logprob_start_len=0)
    assert prior.cost()["timed"] == before
    prior.fault("observe")
    prior.report(WORTH)
    assert prior.cost()["timed"] == before + 1


def test_coefficients_follow_the_forwards(prior: Served) -> None:
    prior.fault("publish")
    prior.timed(64)
    assert prior.cost()["coefficients"] == PRIOR._asdict(), "nothing was published"
    assert "broken by a test" in prior.server.log()
    assert prior.report(WORTH)["relayed"] == 299
    prior.fault("")
    prior.timed(64)
    cost = prior.cost()
    assert cost["deciding"] and cost["learnt"] >= 64
    assert cost["coefficients"] != PRIOR._asdict()


# ---------------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    for served in serve(tmp_path_factory.mktemp("ranks"), "synthetic", "--tp-size", 2):
        served.decode()
        yield served


def published(served: Served, rank: int) -> list[str]:
    path = served.folder / f"published.{rank}"
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def test_ranks_decide_by_what_rank_0_measured(ranks: Served) -> None:
    """On the second rank the relay path takes seven times as long."""
    start = ranks.cost()
    assert start["calibration_seconds"] > 0 and start["deciding"]
    ranks.timed(16)
    cost = ranks.cost()
    assert cost["coefficients"]["stock_row"] > 1.5 * start["coefficients"]["stock_row"] and cost["deciding"]
    assert len(published(ranks, 0)) >= 2
    assert published(ranks, 0) == published(ranks, 1)
    # By the second rank's times both were declined; with different answers, neither by this name.
    reports = [ranks.report(custom) for custom in (WORTH, HOPELESS)]
    assert [r["declined"] for r in reports] == [None, "predicted_slower"]


def test_a_rank_whose_clock_is_wrong_decides_as_the_others(ranks: Served) -> None:
    """By its own times no forward takes any, so that no prompt is worth relaying. What is decided meanwhile hangs on
    how far the coefficients have come; that it is one decision does not."""
    ranks.fault("clock")
    before = len(published(ranks, 1))
    for _ in range(64):
        ranks.timed(1)
        if len(published(ranks, 1)) > before:
            break
    assert len(published(ranks, 1)) > before
    assert published(ranks, 0) == published(ranks, 1)
    ranks.decode()
    declined = {ranks.report(custom)["declined"] for _ in range(3) for custom in (WORTH, HOPELESS)}
    assert declined <= {None, "predicted_slower"}, declined
    assert ranks.cost()["deciding"]
    ranks.fault("synthetic")


def test_ranks_that_publish_differently_stop_deciding(ranks: Served) -> None:
    ranks.fault("load@1")
    for _ in range(64):
        ranks.timed(1)
        if not ranks.cost()["deciding"]:
            break
    assert not ranks.cost()["deciding"]
    ranks.decode()
    assert [ranks.report(custom)["declined"] for custom in (WORTH, HOPELESS)] == [None, None]


# ---------------------------------------------------------------------- pieces


def costs(chunk: int | None = None) -> Costs:
    return Costs(Consensus(None), lambda *_: "failed", layers=LAYERS, chunk=chunk, probe_queries=24)


POLICIES = make_policies(RelayConfig(), LAYERS)
RID = next(f"u{n}" for n in itertools.count() if digest_of(f"u{n}") % TRIAL_EVERY)


def piece(start: int, stop: int, donor: int = 1) -> Candidate:
    return Candidate(start, stop, donor, start, 0)


@pytest.mark.parametrize(
    ("pieces", "kept"),
    [
        ([piece(0, 200, EXACT_PREFIX), piece(300, 900)], 2),  # both save much
        ([piece(0, 200, EXACT_PREFIX), piece(300, 340)], 1),  # the second is not worth a second pass
        ([piece(0, 20, EXACT_PREFIX), piece(300, 340)], 0),  # an eager pass costs more than 20 copied rows save
        ([piece(0, 200, EXACT_PREFIX)], 1),
        ([piece(0, 20, EXACT_PREFIX)], 0),
    ],
)
def test_pieces_are_kept_as_far_as_they_pay(pieces: list[Candidate], kept: int) -> None:
    found, predicted = costs().choose(RID, 0, 1000, pieces, POLICIES["probe"], Budget("share", 0.2))
    assert found == pieces[:kept]
    assert (predicted is None) == (kept == len(pieces))
    if predicted is not None and kept == 0:
        assert predicted["relay"] > 0.95 * predicted["stock"]


def test_a_probe_over_several_chunks_pays_for_the_rows_that_run_again() -> None:
    """Five chunks of fresh tokens stand behind the segment: the last one computes them once more."""
    prompt = [piece(100, 900)]
    for chunk, kept in ((None, 1), (1024, 0)):
        found, _ = costs(chunk).choose(RID, 0, 6000, prompt, POLICIES["probe"], Budget("share", 0.2))
        assert len(found) == kept, chunk
    found, _ = costs(1024).choose(RID, 0, 6000, prompt, POLICIES["rotate"], None)
    assert found == prompt, "without a probe nothing runs again"


def test_what_ran_is_learnt_in_the_units_of_what_was_predicted() -> None:
    """A row that ends with K and V of the last layer counts as one, as fresh rows do, which end there, too."""
    some, budget = costs(), Budget("share", 0.25)
    slots = torch.arange(1, 801)
    segment = Segment(100, 900, source=100, depth=0, slots=slots, exact=False, end=900, index=0)
    plan = RelayPlan(0, 0, 1000, (segment,), budget, last=True)
    ran = Work(200, (200 + 24) * (LAYERS - 0.9), 0, None, entered=False)
    learnt = some._features([(0, 1000)], POLICIES["probe"], [plan], [ran])
    predicted = some._relayed(0, 1000, [piece(100, 900)], POLICIES["probe"], budget)
    assert learnt == pytest.approx(together([predicted]))
