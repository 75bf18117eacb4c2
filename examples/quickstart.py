"""A chain of three agents on one server, each reading what the earlier ones wrote, timed with and without relay.

    python examples/quickstart.py                              # starts a server on a small model
    python examples/quickstart.py --url http://127.0.0.1:30000 # uses a running one

Every prompt is sent twice, byte for byte the same: once to be relayed and once with ``relay: "off"``, which is stock
SGLang. A number at the head of each role prompt is new in every repeat, so neither side ever finds its own prefix in
the cache. The two cannot help each other either: relayed requests live in a namespace of their own, and the exact
request, which could be seen from there, goes second.
"""

import argparse
import itertools
import json
import random
import shutil
import statistics
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openai import APIError, OpenAI
from serving import add_server_arguments, fail, say, server
from tqdm import tqdm

TASK = (
    "A small town has 40,000 dollars and an empty shop on the market square. It wants to open a repair cafe there "
    "within three months, where volunteers help neighbours to mend bicycles, lamps, radios and clothes for free."
)


LEGEND = """\
TTFT: median time to first token. Then tokens of each prompt by where their KV came from (exact: prefix cache, relayed:
reused as it was decoded, recomp.: reused and repaired, fresh: prefilled), and how much of what the earlier agents
decoded was found again."""


@dataclass(frozen=True, slots=True)
class Role:
    """An agent: its name, its role prompt, and what it is asked to do."""

    name: str
    prompt: str
    request: str


ROLES = (
    Role(
        "planner",
        "You are a planner. You turn an idea into steps that people can follow.",
        "Write the plan, step by step.",
    ),
    Role(
        "treasurer",
        "You are the treasurer of a town council. You care about what things cost and who pays for them.",
        "Write a budget for this plan: what does each step cost?",
    ),
    Role(
        "reviewer",
        "You are a careful reviewer. You look for what was forgotten and for what contradicts itself.",
        "Write your review: what was forgotten, and what should be changed?",
    ),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer; ``ttft_ms`` is from sending the request to its first piece of text.

    ``report`` says how the prompt was served: ``sglext.relay`` of the stream's first chunk.
    """

    text: str
    tokens: int
    ttft_ms: float
    report: dict[str, Any]


@dataclass(frozen=True, slots=True)
class AgentResult:
    """What the table shows of one agent, and what ``--json`` writes of it. Counts are tokens of its prompt."""

    name: str
    ttft_ms_exact: float
    ttft_ms_relay: float
    exact: int
    relayed: int
    recomputed: int
    fresh: int
    matched_share: float | None
    segments: int
    declined: str | None
    answer_exact: str
    answer_relay: str


class Chain:
    """The agents so far and what they wrote, on one server."""

    def __init__(self, url: str, args: argparse.Namespace) -> None:
        self.client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=None)
        self.model = self.client.models.list().data[0].id
        self.args = args
        self.written: list[tuple[Role, Answer]] = []
        self._random = random.Random()

    def prompt(self, role: Role) -> list[dict[str, str]]:
        """The agent's messages, new at the head and otherwise the same in every call.

        An earlier text stands on lines of its own, as it was written: there it is tokenized as it was decoded.
        """
        nonce = self._random.randrange(10**9)
        parts = [f"The task:\n{TASK}"]
        parts += [f"The {earlier.name} wrote:\n{answer.text}" for earlier, answer in self.written]
        return [
            {"role": "system", "content": f"[{nonce:09d}] {role.prompt}"},
            {"role": "user", "content": "\n\n".join([*parts, role.request])},
        ]

    def custom_params(self, relay: str) -> dict[str, Any]:
        """What the extension is told about one request."""
        params: dict[str, Any] = {"relay": relay}
        if self.args.policy:
            params["relay_policy"] = self.args.policy
        return params

    def stream(
        self,
        messages: list[dict[str, str]],
        relay: str,
        max_tokens: int,
        on_piece: Callable[[], object] = lambda: None,
    ) -> Answer:
        """One greedy streamed request of exactly ``max_tokens`` tokens."""
        start = time.perf_counter()
        first: float | None = None
        report: dict[str, Any] | None = None
        pieces: list[str] = []
        tokens = 0
        chunks: Any = self.client.chat.completions.create(
            model=self.model,
            messages=messages,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=max_tokens,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={
                "min_tokens": max_tokens,
                "repetition_penalty": 1.1,  # a model as small as the default one repeats itself without it
                "custom_params": self.custom_params(relay),
            },
        )
        for chunk in chunks:
            report = report or (getattr(chunk, "sglext", None) or {}).get("relay")
            if chunk.usage is not None:
                tokens = chunk.usage.completion_tokens
            if chunk.choices and chunk.choices[0].delta.content:
                first = first if first is not None else time.perf_counter()
                pieces.append(chunk.choices[0].delta.content)
                on_piece()
        # A token that is half a character gives no text of its own; then the end of the stream is the first sign of it.
        first = first if first is not None else time.perf_counter()
        if report is None:
            fail("this server does not run the relay extension: start it with --radix-cache-backend relay")
        return Answer("".join(pieces), tokens, (first - start) * 1e3, report)

    def run(self, role: Role) -> AgentResult:
        """Time the agent on both paths, let it write on both, and hand the relayed text on."""
        say(f"{role.name}: timing {self.args.repeats} prompts on each path")
        timed: dict[str, list[float]] = {"on": [], "off": []}
        for _ in range(self.args.repeats):
            messages = self.prompt(role)
            for relay, times in timed.items():
                times.append(self.stream(messages, relay, 1).ttft_ms)
        relayed, exact = self._write(role)
        report = relayed.report
        decoded = sum(answer.tokens for _, answer in self.written)
        matched = report["relayed"] + report["recomputed"]
        self.written.append((role, relayed))
        return AgentResult(
            name=role.name,
            ttft_ms_exact=statistics.median(timed["off"]),
            ttft_ms_relay=statistics.median(timed["on"]),
            **{key: report[key] for key in ("exact", "relayed", "recomputed", "fresh", "segments", "declined")},
            matched_share=matched / decoded if decoded else None,
            answer_exact=exact.text,
            answer_relay=relayed.text,
        )

    def _write(self, role: Role) -> tuple[Answer, Answer]:
        """The agent's whole answer, relayed and exact, one after the other: batched together they would round apart."""
        messages = self.prompt(role)
        tokens = self.args.max_tokens
        with tqdm(total=2 * tokens, desc=f"{role.name}: writing", unit="token", file=sys.stderr) as bar:
            return self.stream(messages, "on", tokens, bar.update), self.stream(messages, "off", tokens, bar.update)


def print_answers(results: list[AgentResult], lines: int) -> None:
    """The two answers of each agent in two columns, cut after ``lines`` lines."""
    width = max(30, (shutil.get_terminal_size((120, 24)).columns - 3) // 2)
    for result in results:
        left, right = result.answer_exact, result.answer_relay
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(left, right, strict=False)))
        alike = "both answers are the same" if left == right else f"the answers part after {common} characters"
        print(f"\n{result.name}: {alike}")
        columns = [[f"{title}:", *_wrap(text, width)] for title, text in (("exact", left), ("relayed", right))]
        for row in range(min(lines + 1, max(map(len, columns)))):
            cells = [column[row] if row < len(column) else "" for column in columns]
            print(f"{cells[0]:<{width}} | {cells[1]}".rstrip())


def _wrap(text: str, width: int) -> list[str]:
    return [line for paragraph in text.splitlines() for line in textwrap.wrap(paragraph, width) or [""]]


def print_table(results: list[AgentResult]) -> None:
    """One line per agent."""
    head = ("agent", "TTFT exact", "relayed", "ratio", "exact", "relayed", "recomp.", "fresh", "segments", "matched")
    rows = [
        (
            r.name,
            f"{r.ttft_ms_exact:.0f} ms",
            f"{r.ttft_ms_relay:.0f} ms",
            f"{r.ttft_ms_exact / r.ttft_ms_relay:.2f}x",
            *(str(count) for count in (r.exact, r.relayed, r.recomputed, r.fresh, r.segments)),
            "-" if r.matched_share is None else f"{r.matched_share:.1%}",
        )
        for r in results
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    print()
    for row, result in zip((head, *rows), (None, *results), strict=True):
        cells = [cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        declined = result.declined if result is not None else None
        print("  ".join(cells) + (f"  declined: {declined}" if declined else ""))
    print(f"\n{LEGEND}")


def main() -> None:
    """Run the chain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_server_arguments(parser)
    parser.add_argument("--max-tokens", type=int, default=640, help="tokens that each agent writes (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed prompts per agent and path (%(default)s)")
    parser.add_argument("--policy", help="relay policy: rotate, relay or full (default: the server's)")
    parser.add_argument("--lines", type=int, default=8, help="lines shown of each answer (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and the whole answers to FILE")
    args = parser.parse_args()
    if args.max_tokens < 1 or args.repeats < 1:
        parser.error("--max-tokens and --repeats must be at least 1")

    with server(args) as url:
        try:
            chain = Chain(url, args)
            # The first request of a kind is slow, so it is not timed. One prompt for both, as everywhere: at any time
            # both namespaces hold the same prompts, so no number at a head is by chance half known to only one.
            warm_up = chain.prompt(ROLES[0])
            for relay in ("on", "off"):
                chain.stream(warm_up, relay, 1)
            results = [chain.run(role) for role in ROLES]
        except APIError as error:
            fail(f"the server did not serve a request: {error}")
    print_answers(results, args.lines)
    print_table(results)
    if args.json:
        settings = {"model": chain.model, "max_tokens": args.max_tokens, "repeats": args.repeats}
        figures = {"agents": [asdict(result) for result in results], "settings": settings}
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
