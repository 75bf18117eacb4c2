"""A server in fp32 that recomputes what an answer quotes while it decodes, against the fp64 reference: every next-token
distribution of an answer that is forced to quote its prompt's segments.

What is recomputed in front of which step follows from all tokens that were decoded by then, under overlap scheduling,
too, where the host reads back the one that the step begins with.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from prompts import Cut, Donor, Prompt, compose, random_tokens
from reference import FULL, Probe, Reference, Result, Segment
from test_quotes import literal

from sglang_relay.measure.divergence import _PROCESSOR, READ_ARGS, Reading, _logits, read
from sglang_relay.measure.server import Server

BOUND = 1e-4
CLEAR = 1e-2
AHEAD = 5
ASK = {"relay_policy": "probe", "relay_budget": 0.2, "relay_quote_tokens": AHEAD}


class Expected(NamedTuple):
    """logits: [steps, vocab]; quoted: positions in front of each step."""

    logits: torch.Tensor
    quoted: list[list[int]]

    @property
    def count(self) -> int:
        return sum(map(len, self.quoted))


class Quoting:
    def __init__(self, server: Server, reference: Reference) -> None:
        self.server, self.reference = server, reference
        self.vocab: int = reference.config["vocab_size"]
        self.rng = random.Random(11)
        self.donors: list[Donor] = []
        self._computed: list[Result] = []
        for length in (23, 40):
            prompt = random_tokens(length, self.rng, self.vocab)
            answer = server.generate(
                prompt, max_new_tokens=120, ignore_eos=True, frequency_penalty=1.0, custom_params={"relay": "exact"}
            )
            self.donors.append(Donor(prompt, answer["output_ids"]))
            self._computed.append(reference.run([*self.donors[-1].path[:-1], 3], [], FULL))

    def prompt(self) -> Prompt:
        return compose(self.donors, [Cut(0, 11, 100, 9), Cut(1, 5, 90, 12)], 14, self.rng, self.vocab)

    def answer(self, prompt: Prompt) -> list[int]:
        """Two quotes, one that ends its segment, between tokens of its own; the first goes on for long."""
        first, second = prompt.pieces
        text, own = prompt.tokens, random_tokens(6, self.rng, self.vocab)
        tail = text[second.stop - 9 : second.stop]
        return [*own[:2], *text[first.start + 30 : first.start + 48], *own[2:4], *tail, *own[4:]]

    def prefill(self, prompt: Prompt) -> Result:
        segments = []
        for p in prompt.pieces:
            span, donor = slice(p.source, p.source + p.length), self._computed[p.donor]
            segments.append(Segment(p.start, p.stop, p.donor, p.source, donor.k[:, span], donor.v[:, span]))
        return self.reference.run(prompt.tokens, segments, Probe(0.2))

    def stale(self, prompt: Prompt, result: Result) -> list[bool]:
        reused = np.zeros(len(prompt.tokens), dtype=bool)
        for p in prompt.pieces:
            reused[p.start : p.stop] = True
        return (reused & ~result.selected.numpy()).tolist()

    def expect(self, prompt: Prompt, answer: list[int], ahead: int = AHEAD) -> Expected:
        result = self.prefill(prompt)
        stale, before = self.stale(prompt, result), []
        for step in range(len(answer)):
            found = literal(prompt.tokens, answer[:step], stale, ahead) if ahead else []
            for position in found:
                stale[position] = False
            before.append(found)
        return Expected(self.reference.decode(prompt.tokens, result, answer, before), before)

    def read(self, prompt: Prompt, answer: list[int], **params: Any) -> Reading:
        return read(self.server, prompt.tokens, answer, {**ASK, **params})


@pytest.fixture(scope="module", params=["overlap", "in turn"])
def quoting(request: pytest.FixtureRequest, model: Path, reference: Reference) -> Iterator[Quoting]:
    overlap = request.param == "overlap"
    args = ["--radix-cache-backend", "relay", "--dtype", "float32", "--max-total-tokens", 4096, *READ_ARGS]
    with Server(model, *args, *([] if overlap else ["--disable-overlap-schedule"])) as server:
        yield Quoting(server, reference)


def far(reading: Reading, expected: Expected) -> list[float]:
    """By step, the largest difference of log-probabilities."""
    want = expected.logits.log_softmax(-1)
    return (torch.from_numpy(reading.logprobs).double() - want).abs().amax(-1).tolist()


def test_quotes_are_recomputed_in_front_of_the_next_step(quoting: Quoting) -> None:
    prompt = quoting.prompt()
    answer = quoting.answer(prompt)
    got, want = quoting.read(prompt, answer), quoting.expect(prompt, answer)
    assert got.report["declined"] is None and want.count > 2 * AHEAD
    assert max(far(got, want)) < BOUND
    assert got.report["quoted"] == want.count
    assert got.report["relayed"] + got.report["recomputed"] == prompt.matched
    selected = int(0.2 * prompt.matched)
    assert got.report["recomputed"] == selected + want.count
    rows, layers = selected + Probe().queries + want.count, quoting.reference.layers
    assert got.report["cost"] == pytest.approx(rows * (layers - 0.9) / prompt.matched / layers, abs=1e-4)
    without = quoting.expect(prompt, answer, ahead=0)
    assert max(far(got, without)) > CLEAR, "the repair makes a difference here"
    late = Expected(quoting.reference.decode(prompt.tokens, quoting.prefill(prompt), answer, [[], *want.quoted]), [])
    assert max(far(got, late)) > CLEAR, "and so does a step"


def test_a_request_that_asks_for_none_gets_none(quoting: Quoting) -> None:
    prompt = quoting.prompt()
    answer = quoting.answer(prompt)
    got = quoting.read(prompt, answer, relay_quote_tokens=0)
    assert got.report["quoted"] == 0
    assert max(far(got, quoting.expect(prompt, answer, ahead=0))) < BOUND


def test_a_prompt_found_in_the_tree_is_repaired_too(quoting: Quoting) -> None:
    """As forks find it: prefilled, and its answer begun, by another request; what that one has repaired stays so."""
    prompt = quoting.prompt()
    answer = quoting.answer(prompt)
    quoting.server.generate(prompt.tokens, max_new_tokens=1, custom_params={**ASK, "relay_donate": "none"})
    got, want, layers = quoting.read(prompt, answer), quoting.expect(prompt, answer), quoting.reference.layers
    first, cached = prompt.pieces[0].start, len(prompt.tokens) - 1
    assert (got.report["exact"], got.report["depth"], got.report["relayed"]) == (first, 1, 0)
    assert got.report["recomputed"] == got.report["quoted"] == want.count
    assert got.report["approximate"] == cached - first - want.count
    assert got.report["cost"] == pytest.approx(want.count * (layers - 0.9) / (cached - first) / layers, abs=1e-4)
    assert max(far(got, want)) < BOUND
    again = quoting.read(prompt, answer)
    assert again.report["quoted"] == 0
    result = quoting.prefill(prompt)
    every = sorted(p for found in want.quoted for p in found)
    known = quoting.reference.decode(prompt.tokens, result, answer, [[], every, *([[]] * len(answer))])
    want_again = Expected(known, [])
    assert max(far(again, want_again)) < max(far(again, quoting.expect(prompt, answer, ahead=0))), (
        "repaired is repaired"
    )


def test_another_suffix_behind_a_shared_segment(quoting: Quoting) -> None:
    """A fork whose prompt goes on otherwise: what its branch shares is repaired, what only the other one had is not."""
    prompt = quoting.prompt()
    quoting.server.generate(prompt.tokens, max_new_tokens=1, custom_params={**ASK, "relay_donate": "none"})
    first, second = prompt.pieces
    branch = [*prompt.tokens[: second.start], *random_tokens(20, quoting.rng, quoting.vocab)]
    left = quoting.stale(prompt, quoting.prefill(prompt))[: second.start] + [False] * 20
    answer = [9, 11, *prompt.tokens[first.start + 50 : first.start + 62], *prompt.tokens[second.start : second.stop]]
    answer = answer[:40]
    count = 0
    for step in range(len(answer)):
        found = literal(branch, answer[:step], left, AHEAD)
        for position in found:
            left[position] = False
        count += len(found)
    got = read(quoting.server, branch, answer, ASK)
    found = got.report["exact"] + got.report["approximate"] + got.report["recomputed"]
    assert found >= second.start - 1 and got.report["exact"] == first.start, got.report
    assert got.report["quoted"] == count > 0


def test_slots_that_the_tree_kept_instead_are_not_written(quoting: Quoting, tmp_path: Path) -> None:
    """Two equal prompts in one batch: the tree keeps the slots of the first and gives them to the second, whose quotes
    are then computed into nowhere."""
    prompt = quoting.prompt()
    answers = [random_tokens(36, quoting.rng, quoting.vocab), quoting.answer(prompt)]
    folders = [tmp_path / str(i) for i in range(2)]
    sampling = []
    for folder, answer in zip(folders, answers, strict=True):
        folder.mkdir()
        forced = {"forced_tokens": answer, "forced_folder": str(folder), "relay_donate": "none"}
        sampling.append({"max_new_tokens": len(answer), "ignore_eos": True, "custom_params": {**ASK, **forced}})
    together = {"input_ids": [prompt.tokens] * 2, "sampling_params": sampling, "custom_logit_processor": _PROCESSOR}
    both = quoting.server.post("/generate", together)
    reports = [answer["meta_info"]["relay"] for answer in both]
    assert [report["exact"] for report in reports] == [0, 0], "both were prefilled"
    assert reports[1]["quoted"] > 0
    logits = torch.from_numpy(_logits(folders[1], len(answers[1])))
    got = Reading(logits.log_softmax(-1).numpy(), reports[1], 0)
    assert max(far(got, quoting.expect(prompt, answers[1], ahead=0))) < BOUND
