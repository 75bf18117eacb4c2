"""Time to first token of every policy beside its divergence from full prefill: agents 2, 3, 4 of a chain.

    python -m bench.pareto --policies rotate,relay --json results/pareto.json --plot results/pareto.png

Agent n's prompt is a prefix of 512 tokens that no cache knows, what the n - 1 agents before it decoded (2,048 tokens
each) and a short question. A stock server and a relay server with the same settings are timed in one interleaved run,
a new prompt for every request, and medians are reported (bench/ttft.py). The KL divergence is taken once per policy
and agent, on one more prompt (sglang_relay/measure/divergence.py). Policies are written as in bench/fidelity.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from bench.fidelity import MODEL, policies_argument
from bench.ttft import Prompts, first_token_s
from sglang_relay.fetch_model import ensure_model
from sglang_relay.measure.divergence import READ_ARGS, SERVER_ARGS, Choice, compare, cost_of, read, require_reuse
from sglang_relay.measure.server import Server

STOCK = "stock"
TOPICS = (
    "Write a long and detailed report about how a railway station of a hundred years can be renewed while trains run.",
    "Write a long and detailed guide for people who want to grow vegetables on a roof in a windy city.",
    "Write a long and detailed account of how a small newspaper changes from paper to the web in two years.",
)
SEPARATOR = "\n\nThe next agent wrote:\n"


class Bench:
    """Two servers, the texts that agents decoded on one of them, and prompts that hold these texts."""

    def __init__(self, args: argparse.Namespace, stock: Server, relay: Server, model: str) -> None:
        self.args, self.stock, self.relay = args, stock, relay
        tokenizer = AutoTokenizer.from_pretrained(model)
        self._prompts = Prompts(tokenizer, args)
        self._separator = tokenizer.encode(SEPARATOR, add_special_tokens=False)
        self._texts = self._decode(tokenizer)

    def _decode(self, tokenizer: Any) -> list[list[int]]:
        count, length = max(self.args.agents) - 1, self.args.reused
        _say(f"decoding {count} texts of {length} tokens")
        chats = [[{"role": "user", "content": topic}] for topic in TOPICS[:count]]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
        sampling = {"temperature": self.args.temperature, "ignore_eos": True}
        # One token more: the last one of an output has no KV.
        answers = self.relay.generate(ids, max_new_tokens=length + 1, custom_params={"relay": "exact"}, **sampling)
        return [answer["output_ids"][:length] for answer in answers]

    def prompt(self, agent: int) -> list[int]:
        """A new prompt of this agent (2 or later)."""
        reused = list(self._texts[0])
        for text in self._texts[1 : agent - 1]:
            reused += self._separator + text
        return self._prompts.consumer(reused)

    def time(self, agent: int) -> dict[str, dict[str, Any]]:
        """Rows of stock and every policy: median TTFT in ms, all of them, and the last report."""
        times: dict[str, list[float]] = {}
        reports: dict[str, dict[str, Any]] = {}
        for repeat in range(self.args.repeats + 1):
            for label, server, params in self._sides():
                seconds, meta = first_token_s(server, self.prompt(agent), dict(params))
                if server is self.relay:
                    require_reuse(label, meta["relay"], (agent - 1) * self.args.reused)
                if repeat:  # the first request of a kind pays for what every later one finds warm
                    times.setdefault(label, []).append(1e3 * seconds)
                    reports[label] = meta.get("relay", {})
            done = ", ".join(f"{label} {values[-1]:.0f} ms" for label, values in times.items())
            _say(f"agent {agent}, repeat {repeat} of {self.args.repeats}: {done}")
        base = statistics.median(times[STOCK])
        rows = {}
        for label, values in times.items():
            middle = statistics.median(values)
            rows[label] = {"agent": agent, "ttft_ms": middle, "ratio": base / middle, "all_ms": values}
            if label != STOCK:
                rows[label]["cost"] = cost_of(reports[label], (agent - 1) * self.args.reused)
                rows[label]["report"] = reports[label]
        return rows

    def _sides(self) -> list[tuple[str, Server, Mapping[str, Any]]]:
        relayed = [(choice.label, self.relay, {**choice.params, "relay_donate": "none"}) for choice in self._choices]
        return [(STOCK, self.stock, {}), *relayed]

    @property
    def _choices(self) -> list[Choice]:
        return self.args.policies

    def diverge(self, agent: int, rows: dict[str, dict[str, Any]]) -> None:
        """Add the KL divergence, mean of the forced positions, to the rows of the policies."""
        prompt = self.prompt(agent)
        forced = self.stock.generate(prompt, max_new_tokens=self.args.forced, ignore_eos=True)["output_ids"]
        exact = {"relay": "off"}
        reference = read(self.relay, prompt, forced, exact, salt=f"reference {agent}").logprobs
        # One that serves the prompt exactly goes last: from then on its KV is the exact prefix of this prompt.
        for choice in sorted(self._choices, key=lambda choice: rows[choice.label]["report"]["depth"] == 0):
            found = compare(reference, read(self.relay, prompt, forced, choice.params).logprobs)
            rows[choice.label]["kl_mean"] = float(np.mean(found.kl))
            _say(f"agent {agent}, {choice.label}: KL {np.mean(found.kl):.2e}")


def run(args: argparse.Namespace) -> dict[int, dict[str, dict[str, Any]]]:
    """Rows of stock and every policy, by agent."""
    model = str(args.model or ensure_model(MODEL))
    settings = ["--dtype", args.dtype, "--max-total-tokens", args.pool, *args.server_args.split()]
    results = {}
    with ExitStack() as stack:
        # What the measurement needs costs time, and must not be a difference between the two.
        stock = stack.enter_context(Server(model, *settings, *READ_ARGS))
        relay = stack.enter_context(Server(model, *settings, *SERVER_ARGS))
        bench = Bench(args, stock, relay, model)
        # From the last agent down: a text that is not used for long is evicted, and the last agent uses all.
        for agent in sorted(args.agents, reverse=True):
            results[agent] = bench.time(agent)
            bench.diverge(agent, results[agent])
    return dict(sorted(results.items()))


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def render(results: dict[int, dict[str, dict[str, Any]]]) -> str:
    width = max(len(label) for rows in results.values() for label in rows) + 2
    lines = [f"{'agent':<7}{'policy':<{width}}{'TTFT ms':>9}{'ratio':>8}{'cost %':>8}{'KL mean':>10}  declined"]
    for agent, rows in results.items():
        for label, row in rows.items():
            line = f"{agent:<7}{label:<{width}}{row['ttft_ms']:>9.0f}{row['ratio']:>7.2f}x"
            if label != STOCK:
                line += f"{100 * row['cost']:>8.1f}{row['kl_mean']:>10.1e}  {row['report']['declined'] or ''}"
            lines.append(line.rstrip())
    return "\n".join(lines)


def plot(results: dict[int, dict[str, dict[str, Any]]], title: str, file: Path) -> None:
    """One panel per agent: KL over TTFT; stock, whose KL is zero by definition, is a vertical line."""
    from matplotlib.figure import Figure  # optional, and slow to import

    figure = Figure(figsize=(5 * len(results), 4.5), layout="constrained")
    for axes, (agent, rows) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        axes.axvline(rows[STOCK]["ttft_ms"], color="grey", linestyle="--", label="full prefill (stock)")
        for label, row in rows.items():
            if label != STOCK:
                axes.plot(row["ttft_ms"], row["kl_mean"], "o")
                axes.annotate(
                    label, (row["ttft_ms"], row["kl_mean"]), xytext=(5, 4), textcoords="offset points", fontsize=8
                )
        axes.set(title=f"agent {agent}", xlabel="TTFT, ms (median)", xlim=(0, None))
        axes.set_yscale("log")
    figure.axes[0].set_ylabel("KL to full prefill, mean, nats")
    figure.axes[0].legend(loc="upper right")
    figure.suptitle(title)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help=f"a checkpoint folder (default: {MODEL}, which is fetched)")
    parser.add_argument(
        "--policies", type=policies_argument, default=policies_argument("rotate,relay"), metavar="P,P,..."
    )
    parser.add_argument("--agents", type=int, nargs="+", default=[2, 3, 4], choices=(2, 3, 4))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--prefix", type=int, default=512, help="fresh tokens before the texts (%(default)s)")
    parser.add_argument("--reused", type=int, default=2048, help="tokens of every text (%(default)s)")
    parser.add_argument("--question", type=int, default=16, help="fresh tokens behind the texts (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="timed prompts per side and agent (%(default)s)")
    parser.add_argument("--forced", type=int, default=16, help="positions of the KL divergence (%(default)s)")
    parser.add_argument("--pool", type=int, default=65536, help="KV pool of each server, tokens (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the texts (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server-args", default="", metavar="'--FLAG VALUE ...'", help="further flags of both servers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture (needs matplotlib)")
    args = parser.parse_args()

    results = run(args)
    print(render(results))
    if args.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "policies"}
        settings["policies"] = {choice.label: choice.params for choice in args.policies}
        figures = {"settings": settings, "machine": platform.processor() or platform.machine(), "agents": results}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    if args.plot:
        plot(results, f"{args.model.name if args.model else MODEL}, {args.dtype}", args.plot)


if __name__ == "__main__":
    main()
