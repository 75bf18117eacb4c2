"""Time per decoded token of an answer that quotes its prompt: stock, and relay with and without repair of quotes.

    python -m bench.quotes --json results/quotes.json

A donor decodes ``--reused`` tokens on the relay server. Then every repeat sends one prompt (a prefix that no cache
knows, the donor's text, a question, and the first ``--begun`` tokens of a passage of that text, which the model goes on
with) to a stock server and, once per policy, to the relay server: same settings, interleaved. Reported are medians of
the time per token behind the first one, against stock, the tokens recomputed while decoding, and how many tokens of an
answer go on with the passage. Policies are written as in bench/fidelity.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import requests
from transformers import AutoTokenizer

from bench.fidelity import policies_argument
from bench.ttft import MODEL, Prompts
from sglang_relay.fetch_model import ensure_model
from sglang_relay.measure.server import Server


class Answer(NamedTuple):
    """seconds: per token behind the first chunk's. tokens: what was decoded."""

    seconds: float
    tokens: list[int]


def decode(server: Server, prompt: list[int], tokens: int, params: dict[str, Any]) -> Answer:
    """Stream ``tokens`` greedy tokens."""
    body = {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True, "custom_params": params},
        "stream": True,
    }
    chunks: list[tuple[float, dict[str, Any]]] = []
    with requests.post(server.url + "/generate", json=body, stream=True, timeout=server.answer_limit) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith(b"data: {"):
                chunks.append((time.perf_counter(), json.loads(line[6:])))
    (began, first), (ended, last) = chunks[0], chunks[-1]
    counts = [chunk["meta_info"]["completion_tokens"] for chunk in (first, last)]
    return Answer((ended - began) / (counts[1] - counts[0]), last["output_ids"])


def agreement(answer: list[int], passage: list[int]) -> int:
    """Tokens up to the first that is not the passage's."""
    same = [a == b for a, b in zip(answer, passage, strict=False)]
    return same.index(False) if False in same else len(same)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    model = str(args.model or ensure_model(MODEL))
    prompts = Prompts(AutoTokenizer.from_pretrained(model), args)
    shared = ["--dtype", args.dtype, "--max-total-tokens", args.pool]
    relay_env = {
        "SGLANG_RELAY_DONATE": "none",
        "SGLANG_RELAY_AUDIT_EVERY": "0",
        "SGLANG_RELAY_COST_MODEL": "false",
    }
    labels = ["stock", *(choice.label for choice in args.policies)]
    rows: dict[str, dict[str, list[float]]] = {name: {"ms": [], "quoted": [], "agreed": []} for name in labels}
    with ExitStack() as stack:
        stock = stack.enter_context(Server(model, *shared))
        relay = stack.enter_context(Server(model, *shared, "--radix-cache-backend", "relay", env=relay_env))
        print(f"decoding the donor's {args.reused} tokens", file=sys.stderr)
        sampling = {"temperature": args.temperature, "ignore_eos": True}
        donated = {"relay_donate": "output"}
        donor = relay.generate(prompts.donor(), max_new_tokens=args.reused + 1, custom_params=donated, **sampling)
        reused, middle = donor["output_ids"][: args.reused], args.reused // 2
        behind = reused[middle + args.begun :]
        for repeat in range(args.repeats + 1):
            prompt = prompts.consumer(reused) + reused[middle : middle + args.begun]
            for name, params in [("stock", None), *args.policies]:
                before = _quoted(relay)
                answer = decode(stock if params is None else relay, prompt, args.tokens, dict(params or {}))
                if repeat:  # the first of a kind pays for what every later one finds warm
                    rows[name]["ms"].append(1e3 * answer.seconds)
                    rows[name]["quoted"].append(_quoted(relay) - before)
                    rows[name]["agreed"].append(agreement(answer.tokens, behind))
            print(f"repeat {repeat} of {args.repeats}", file=sys.stderr)
    base = statistics.median(rows["stock"]["ms"])
    medians = {name: {key: statistics.median(values) for key, values in row.items()} for name, row in rows.items()}
    ratios = {name: row["ms"] / base for name, row in medians.items()}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()} | {"policies": labels[1:]}
    machine = platform.processor() or platform.machine()
    return {"settings": settings, "machine": machine, "medians": medians, "ratios": ratios, "all": rows}


def _quoted(relay: Server) -> int:
    return relay.get("/server_info")["internal_states"][0]["relay"]["stats"]["quoted"]


def _table(result: dict[str, Any]) -> str:
    width = max(map(len, result["medians"])) + 2
    lines = [f"{'':<{width}}{'ms per token':>13}{'ratio':>8}{'recomputed':>12}{'agreed':>8}"]
    for name, row in result["medians"].items():
        ratio = f"{result['ratios'][name]:.2f}x"
        lines.append(f"{name:<{width}}{row['ms']:>13.1f}{ratio:>8}{row['quoted']:>12.0f}{row['agreed']:>8.0f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help=f"a checkpoint folder (default: {MODEL}, which is fetched)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--prefix", type=int, default=128, help="fresh tokens before the reused text (%(default)s)")
    parser.add_argument("--reused", type=int, default=768, help="tokens of the donor's output (%(default)s)")
    parser.add_argument("--question", type=int, default=16, help="fresh tokens behind it (%(default)s)")
    parser.add_argument("--begun", type=int, default=16, help="tokens of the quote in the prompt (%(default)s)")
    parser.add_argument("--tokens", type=int, default=64, help="decoded per answer (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed answers per side (%(default)s)")
    policies = "probe@0.2+quote_tokens=0,probe@0.2"
    parser.add_argument("--policies", type=policies_argument, default=policies_argument(policies), metavar="P,P,...")
    parser.add_argument("--pool", type=int, default=16384, help="KV pool of each server, tokens (%(default)s)")
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
