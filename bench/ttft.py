"""Time to first token: a stock server and a relay server, the same settings, in one interleaved run.

    python -m bench.ttft --json results/ttft.json

A donor decodes ``--reused`` tokens on the relay server. Then every repeat sends one prompt (a prefix that no cache
knows, the donor's text, a question) to the stock server and, once per policy, to the relay server. Both servers run the
same attention, sampling and thread settings; the one that is not asked sleeps. Reported are medians, the ratio of
medians, the share of reused tokens that the policy recomputed, and, per policy, the KL divergence of the next-token
distributions from full prefill over the ``--forced`` positions behind the prompt, both sides forced through the stock
server's greedy continuation. Policies are written as in bench/fidelity.py: ``probe@0.2``.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import requests
from transformers import AutoTokenizer

from bench.fidelity import policies_argument
from sglang_relay.fetch_model import ensure_model
from sglang_relay.measure.server import Server

MODEL = "smollm2-135m"
TOPIC = (
    "Write a long and detailed report about how a coastal town can protect its harbour, its houses and its market "
    "from floods: the measures, their costs, the order of the works and the risks."
)
ROLES = (
    "You are a council member who has to decide which of several proposals is paid for.",
    "You are an engineer who checks the proposals of others for gaps and wrong numbers.",
    "You are a reporter who explains technical plans to people who have little time.",
    "You are a teacher who turns reports into questions for a class of fifteen-year-olds.",
)
RULES = (
    "Read the text that follows with care.",
    "Name what is missing before you name what is good.",
    "Prefer figures to adjectives, and say where a figure comes from.",
    "Where two passages contradict each other, say so and quote both.",
    "Keep the order of the works in mind: what has to be finished first?",
    "Think of those who pay, and of those who live next to the building site.",
)


class Prompts:
    """Prompts of exact lengths in tokens: fresh prefix, reused text, question."""

    def __init__(self, tokenizer: Any, args: argparse.Namespace) -> None:
        self._encode = lambda text: tokenizer.encode(text, add_special_tokens=False)
        self._args = args
        self._random = random.Random(args.seed)

    def donor(self) -> list[int]:
        return self._encode(f"<|im_start|>user\n{TOPIC}<|im_end|>\n<|im_start|>assistant\n")

    def consumer(self, reused: list[int]) -> list[int]:
        """A new head each time: neither server finds a prefix of it."""
        parts = [f"[{self._random.randrange(10**9):09d}] {self._random.choice(ROLES)}"]
        prefix: list[int] = []
        while len(prefix) < self._args.prefix:
            parts.append(self._random.choice(RULES))
            prefix = self._encode("<|im_start|>system\n" + " ".join(parts))
        question = self._encode("\nWhich measure should be built first, and why? Answer in one sentence, please, now:")
        return prefix[: self._args.prefix] + reused + question[: self._args.question]


def first_token_s(server: Server, prompt: list[int], params: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Seconds from sending the request to the first streamed token, and that chunk's meta_info."""
    body = {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True, "custom_params": params},
        "stream": True,
    }
    start = time.perf_counter()
    with requests.post(server.url + "/generate", json=body, stream=True, timeout=server.answer_limit) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith(b"data: {"):
                return time.perf_counter() - start, json.loads(line[6:])["meta_info"]
    raise RuntimeError("the stream ended without a token")


def distributions(
    server: Server, prompt: list[int], forced: list[int], vocab: int, params: dict[str, Any]
) -> Iterator[np.ndarray]:
    """Log-probabilities, float64 [vocab], of the token at each position of ``forced``, given all tokens before it."""
    for known in range(len(forced)):
        fields = {"return_logprob": True, "token_ids_logprob": list(range(vocab))}
        answer = server.generate(prompt + forced[:known], fields=fields, max_new_tokens=1, custom_params=params)
        row = answer["meta_info"]["output_token_ids_logprobs"][0]
        yield np.array([value for value, *_ in row], dtype=np.float64)


def kl(reference: np.ndarray, other: np.ndarray) -> float:
    return float(np.sum(np.exp(reference) * (reference - other)))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    model = str(args.model or ensure_model(MODEL))
    tokenizer = AutoTokenizer.from_pretrained(model)
    vocab = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    prompts = Prompts(tokenizer, args)
    shared = ["--dtype", args.dtype, "--max-total-tokens", args.pool]
    relay_env = {
        "SGLANG_RELAY_LAYER_RANGE": args.layer_range,
        "SGLANG_RELAY_TAU_DEV": str(args.tau_dev),
        "SGLANG_RELAY_SUFFIX": str(args.suffix),
        "SGLANG_RELAY_DONATE": "none",
        "SGLANG_RELAY_AUDIT_EVERY": "0",  # an audited request is served exactly, and takes both times
        "SGLANG_RELAY_COST_MODEL": "false",  # what it would decline is measured, too
    }
    with ExitStack() as stack:
        stock = stack.enter_context(Server(model, *shared))
        relay = stack.enter_context(
            Server(model, *shared, "--radix-cache-backend", "relay", *args.server_args.split(), env=relay_env)
        )
        print(f"decoding the donor's {args.reused} tokens", file=sys.stderr)
        donated = {"relay_donate": "output"}
        sampling = {"temperature": args.temperature, "ignore_eos": True, "custom_params": donated}
        answer = relay.generate(prompts.donor(), max_new_tokens=args.reused + 1, **sampling)
        reused = answer["output_ids"][: args.reused]

        labels = [choice.label for choice in args.policies]
        times: dict[str, list[float]] = {name: [] for name in ("stock", *labels)}
        reports: dict[str, list[dict[str, Any]]] = {name: [] for name in labels}
        for repeat in range(args.repeats + 1):
            prompt = prompts.consumer(reused)
            seconds, _ = first_token_s(stock, prompt, {})
            if repeat:  # the first request of a kind pays for what every later one finds warm
                times["stock"].append(seconds)
            for label, params in args.policies:
                seconds, meta = first_token_s(relay, prompt, dict(params))
                if repeat:
                    times[label].append(seconds)
                    reports[label].append(meta["relay"])
            print(f"repeat {repeat} of {args.repeats}: {_row(times)}", file=sys.stderr)
        counters = relay.get("/server_info")["internal_states"][0]["relay"]["stats"]
        divergence = _divergence(args, stock, relay, prompts.consumer(reused), vocab)
    return _result(args, times, reports, divergence, counters)


def _row(times: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {1e3 * values[-1]:.0f} ms" for name, values in times.items() if values)


def _divergence(
    args: argparse.Namespace, stock: Server, relay: Server, prompt: list[int], vocab: int
) -> dict[str, list[float]]:
    forced = stock.generate(prompt, max_new_tokens=max(1, args.forced))["output_ids"][: args.forced]
    reference = list(distributions(stock, prompt, forced, vocab, {}))
    found = {}
    for policy, params in args.policies:
        # The first request relays the prompt; the later ones find it as their prefix in the policy's namespace.
        rows = distributions(relay, prompt, forced, vocab, dict(params))
        found[policy] = [kl(a, b) for a, b in zip(reference, rows, strict=True)]
        print(f"KL {policy}: mean {statistics.mean(found[policy]):.2e}", file=sys.stderr)
    return found


def _result(
    args: argparse.Namespace,
    times: dict[str, list[float]],
    reports: dict[str, list[dict[str, Any]]],
    divergence: dict[str, list[float]],
    counters: dict[str, Any],
) -> dict[str, Any]:
    base = statistics.median(times["stock"])
    rows: dict[str, Any] = {"stock": {"ttft_ms": 1e3 * base, "all_ms": [1e3 * t for t in times["stock"]]}}
    for policy in (choice.label for choice in args.policies):
        middle = statistics.median(times[policy])
        counts = reports[policy]
        placed = sum(r["relayed"] + r["recomputed"] for r in counts)
        rows[policy] = {
            "ttft_ms": 1e3 * middle,
            "ratio": base / middle,
            "all_ms": [1e3 * t for t in times[policy]],
            "reused": placed / len(counts),
            "selected_share": sum(r["recomputed"] for r in counts) / placed if placed else 0.0,
            "match_ms": statistics.median(r["match_ms"] for r in counts),
            "kl_mean": statistics.mean(divergence[policy]) if divergence[policy] else None,
            "kl_max": max(divergence[policy], default=None),
            "declined": sorted({str(r["declined"]) for r in counts if r["declined"]}),
        }
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    settings["policies"] = [choice.label for choice in args.policies]
    return {"settings": settings, "machine": platform.processor() or platform.machine(), "rows": rows, "host": counters}


def _table(result: dict[str, Any]) -> str:
    lines = [f"{'':<12}{'TTFT ms':>9}{'ratio':>8}{'reused':>8}{'selected':>10}{'KL mean':>11}{'match ms':>10}"]
    for name, row in result["rows"].items():
        line = f"{name:<12}{row['ttft_ms']:>9.0f}"
        if "ratio" in row:
            divergence = "-" if row["kl_mean"] is None else f"{row['kl_mean']:.2e}"
            line += f"{row['ratio']:>7.2f}x{row['reused']:>8.0f}{row['selected_share']:>10.1%}{divergence:>11}"
            line += f"{row['match_ms']:>10.2f}"
        lines.append(line)
    host = result["host"]
    batches = max(1, host["batches"])
    cost = ", ".join(f"{name} {1e3 * value / batches:.2f} ms" for name, value in host["seconds"].items())
    lines.append(f"host time per relayed batch: {cost}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help=f"a checkpoint folder (default: {MODEL}, which is fetched)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--prefix", type=int, default=512, help="fresh tokens before the reused text (%(default)s)")
    parser.add_argument("--reused", type=int, default=2048, help="tokens of the donor's output (%(default)s)")
    parser.add_argument("--question", type=int, default=16, help="fresh tokens behind it (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed prompts per side (%(default)s)")
    parser.add_argument("--forced", type=int, default=16, help="positions of the KL divergence (%(default)s)")
    parser.add_argument(
        "--policies",
        type=policies_argument,
        default=policies_argument("rotate,relay,probe@0.1,probe@0.2"),
        metavar="P,P,...",
    )
    parser.add_argument("--layer-range", default="2,3,20", help="of policy relay (%(default)s)")
    parser.add_argument("--tau-dev", type=float, default=1.5, help="of policy relay (%(default)s)")
    parser.add_argument("--suffix", type=int, default=10, help="of policy relay (%(default)s)")
    flags = "further flags of the relay server, e.g. '--relay-influence auto --relay-entry hidden'"
    parser.add_argument("--server-args", default="", metavar="'--FLAG VALUE ...'", help=flags)
    parser.add_argument("--pool", type=int, default=65536, help="KV pool of each server, tokens (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="of the donor's decoding (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args()
    result = measure(args)
    print(_table(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
