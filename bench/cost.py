"""How many requests the relay makes slower than stock prefill, with the cost model deciding.

    python -m bench.cost --json results/cost.json
    python -m bench.cost --cost-model false        # what it spares

One server. A mix of requests (short and long heads, segments and suffixes, several policies), each sent with relay off
and on, interleaved, ``--repeats`` times with a new head every time, so that neither finds a prefix. A request is slower
when the median time to its first token is above ``--slower`` times that of stock. Requests that were declined run the
same forward on both sides: how many of them count as slower says how far the machine's noise goes.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from bench.ttft import MODEL, TOPIC, first_token_s
from sglang_relay.fetch_model import ensure_model
from sglang_relay.measure.divergence import Choice, parse_choice
from sglang_relay.measure.server import Server

STOCK = {"relay": "off"}


class Shape(NamedTuple):
    """Tokens before, of, and behind the reused text."""

    head: int
    segment: int
    suffix: int


class Mix:
    """Prompts around one decoded text; heads and suffixes are random tokens, which no donor holds."""

    def __init__(self, text: list[int], vocab: int, rng: random.Random) -> None:
        self._text, self._vocab, self._rng = text, vocab, rng

    def shape(self) -> Shape:
        suffix = self._rng.choice((16, 32, 128))
        return Shape(self._length(16, 512), self._length(64, len(self._text)), suffix)

    def prompt(self, shape: Shape) -> list[int]:
        start = self._rng.randrange(len(self._text) - shape.segment + 1)
        return [*self._fresh(shape.head), *self._text[start : start + shape.segment], *self._fresh(shape.suffix)]

    def _length(self, low: int, high: int) -> int:
        return round(math.exp(self._rng.uniform(math.log(low), math.log(high))))

    def _fresh(self, n: int) -> list[int]:
        return [self._rng.randrange(1000, self._vocab) for _ in range(n)]


def decode(server: Server, model: str, length: int) -> list[int]:
    encode = AutoTokenizer.from_pretrained(model).encode
    ids = encode(f"<|im_start|>user\n{TOPIC}<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    sampling = {"temperature": 0.7, "ignore_eos": True, "custom_params": {"relay": "exact"}}
    return server.generate(ids, max_new_tokens=length + 1, **sampling)["output_ids"][:length]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    model = str(args.model or ensure_model(MODEL))
    vocab = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    flags = ("--radix-cache-backend", "relay", "--dtype", args.dtype, "--max-total-tokens", args.pool)
    env = {"SGLANG_RELAY_AUDIT_EVERY": "0", "SGLANG_RELAY_COST_MODEL": args.cost_model}
    rows = []
    with Server(model, *flags, env=env) as server:
        print(f"decoding {args.text} tokens", file=sys.stderr)
        rng = random.Random(args.seed)
        mix = Mix(decode(server, model, args.text), vocab, rng)
        start = _cost(server)
        for number in range(args.requests):
            row = _time(server, mix, mix.shape(), args.policies[number % len(args.policies)], args, rng)
            print(f"{number + 1} of {args.requests}: {_line(row)}", file=sys.stderr)
            rows.append(row)
        states = {"at start": start, "at the end": _cost(server)}
    settings = {k: str(v) for k, v in vars(args).items()} | {"policies": [c.label for c in args.policies]}
    machine = platform.processor() or platform.machine()
    return {"settings": settings, "machine": machine, "summary": _summary(rows), "rows": rows, "cost_model": states}


def _time(
    server: Server, mix: Mix, shape: Shape, choice: Choice, args: argparse.Namespace, rng: random.Random
) -> dict[str, Any]:
    sides = {"stock": STOCK, "relay": dict(choice.params)}
    times: dict[str, list[float]] = {side: [] for side in sides}
    reports = []
    for _ in range(args.repeats):
        for side in rng.sample(list(sides), 2):
            seconds, meta = first_token_s(server, mix.prompt(shape), {**sides[side], "relay_donate": "none"})
            times[side].append(1e3 * seconds)
            if side == "relay":
                reports.append(meta["relay"])
    medians = {side: statistics.median(values) for side, values in times.items()}
    declines = [r["declined"] for r in reports]
    return {
        "policy": choice.label,
        **shape._asdict(),
        **{f"{side}_ms": value for side, value in medians.items()},
        "ratio": medians["relay"] / medians["stock"],
        "slower": medians["relay"] > args.slower * medians["stock"],
        "declined": statistics.mode(declines),
        "declines": declines,
        "predicted_ms": next((r["predicted_ms"] for r in reports if "predicted_ms" in r), None),
        "all_ms": times,
    }


def _cost(server: Server) -> dict[str, Any] | None:
    return server.get("/server_info")["internal_states"][0]["relay"]["cost"]


def _line(row: dict[str, Any]) -> str:
    shape = f"{row['policy']} {row['head']}+{row['segment']}+{row['suffix']}"
    times = f"stock {row['stock_ms']:.0f} ms, relay {row['relay_ms']:.0f} ms ({row['ratio']:.2f}x)"
    return f"{shape}: {times}" + (f", {row['declined']}" if row["declined"] else "")


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    relayed = [r for r in rows if r["declined"] is None]
    declined = [r for r in rows if r["declined"] is not None]
    reasons = [r["declined"] for r in declined]
    return {
        "requests": len(rows),
        "slower": sum(r["slower"] for r in rows),
        "relayed": len(relayed),
        "relayed_slower": sum(r["slower"] for r in relayed),
        "relayed_ratio": statistics.median(r["ratio"] for r in relayed) if relayed else None,
        "declined": {reason: reasons.count(reason) for reason in sorted(set(reasons))},
        "declined_slower": sum(r["slower"] for r in declined),
    }


def _text(result: dict[str, Any]) -> str:
    s = result["summary"]
    ratio = "-" if s["relayed_ratio"] is None else f"{s['relayed_ratio']:.2f}x"
    reasons = ", ".join(f"{reason} {count}" for reason, count in s["declined"].items()) or "none"
    declined = sum(s["declined"].values())
    return "\n".join(
        [
            f"slower than {result['settings']['slower']}x stock: {s['slower']} of {s['requests']} requests",
            f"  relayed: {s['relayed_slower']} of {s['relayed']}; their median takes {ratio} of the stock time",
            f"  declined (the same forward on both sides, so noise): {s['declined_slower']} of {declined}",
            f"declined: {reasons}",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help=f"a checkpoint folder (default: {MODEL}, which is fetched)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--cost-model", default="true", choices=("true", "false"), help="whether it decides")
    parser.add_argument("--requests", type=int, default=60, help="of the mix (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed prompts per request and side (%(default)s)")
    parser.add_argument("--text", type=int, default=1024, help="tokens that the donor decodes (%(default)s)")
    parser.add_argument("--slower", type=float, default=1.05, help="times the stock time (%(default)s)")
    parser.add_argument(
        "--policies",
        type=lambda text: [parse_choice(label) for label in text.split(",")],
        default="probe@0.2,relay,rotate",
        help="taken in turn (%(default)s)",
    )
    parser.add_argument("--pool", type=int, default=65536, help="KV pool of the server, tokens (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args()
    result = measure(args)
    print(_text(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
