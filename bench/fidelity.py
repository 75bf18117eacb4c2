"""How far every policy's answers are from full prefill, and what it costs: policy-by-policy, on agent chains.

    python -m bench.fidelity --policies rotate,relay --split development --json results/fidelity.json --plot out.png

One server runs the model. Producers decode once (their texts are kept in the user's cache); then every policy reads
every chain's prompt, and the KL divergence of its next-token distributions from full prefill is taken at the positions
of the exact greedy continuation (sglang_relay/measure/divergence.py). The noise floor, full prefill in two chunks
instead of one, is measured in the same run.

A policy is NAME[@BUDGET][+KEY=VALUE...]: ``probe@0.2`` asks for relay_policy and relay_budget, and a KEY for relay_KEY.
The server's settings hold for all policies; --route-above sets the one that sends long suffixes to full prefill.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sglang_relay.fetch_model import ensure_model
from sglang_relay.measure.chains import FORCED, Decoding, build_chains
from sglang_relay.measure.divergence import FLOOR, SERVER_ARGS, Case, Choice, measure, parse_choice
from sglang_relay.measure.server import Server
from sglang_relay.measure.statistics import Estimate, gap_closed, paired, summarise
from sglang_relay.measure.tasks import SPLITS, load_tasks

MODEL = "smollm2-135m"
WRITE = Decoding()
BASELINE = "rotate"
"""Its mean KL is the gap that the other policies close."""

SHORT = 0.25
"""Fresh suffix over reused segments below which a suffix counts as short."""

GROUPS: dict[str, Callable[[Case], bool]] = {
    "all": lambda case: True,
    f"suffix/segments < {SHORT:g}": lambda case: case.ratio < SHORT,
    f"suffix/segments >= {SHORT:g}": lambda case: case.ratio >= SHORT,
    **{kind: (lambda case, kind=kind: case.kind == kind) for kind in ("single", "several", "dependent", "judge")},
}


def run(args: argparse.Namespace) -> list[Case]:
    """Build the chains of the split and measure every policy on each of them."""
    model = str(args.model or ensure_model(MODEL))
    tasks = load_tasks(args.split)[: args.cases]
    decoding = Decoding(args.min_tokens, args.max_tokens, args.temperature, args.seed)
    settings = ["--dtype", args.dtype, "--max-total-tokens", args.pool, "--random-seed", args.seed]
    env = {} if args.route_above is None else {"SGLANG_RELAY_ROUTE_ABOVE": str(args.route_above)}
    with Server(model, *SERVER_ARGS, *settings, *args.server_args.split(), env=env) as server:
        chains = build_chains(server, model, tasks, decoding, dtype=args.dtype, progress=_say)
        return measure(server, chains, args.policies, progress=_say)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def table(cases: Sequence[Case]) -> dict[str, dict[str, Any]]:
    """Figures of every policy over ``cases``, in the order in which the policies were measured.

    cost: pooled, i.e. of all reused tokens together. gap_closed is None without a baseline to compare with. paired:
    mean KL minus that of every other policy, on the same chains.
    """
    of: dict[str, list[Case]] = {}
    for case in cases:
        of.setdefault(case.policy, []).append(case)
    kl = {policy: [case.kl_mean for case in rows] for policy, rows in of.items()}
    rows: dict[str, dict[str, Any]] = {}
    for policy, mine in of.items():
        reused = np.array([case.reused for case in mine])
        rows[policy] = {
            "cost": float(np.dot(reused, [case.cost for case in mine]) / reused.sum()),
            "kl": {name: _plain(value) for name, value in summarise(kl[policy])._asdict().items()},
            "gap_closed": _plain(gap_closed(kl[policy], kl[BASELINE])) if BASELINE in kl else None,
            "top1": float(np.mean([case.top1 for case in mine])),
            "first": float(np.mean([case.first for case in mine])),
            "exact_length": float(np.mean([case.exact_length for case in mine])),
            "declined": sum(case.declined is not None for case in mine),
            "paired": {
                other: {name: _plain(value) for name, value in paired(kl[policy], kl[other])._asdict().items()}
                for other in of
                if other != policy
            },
        }
    return rows


def _plain(value: Any) -> Any:
    return value._asdict() if isinstance(value, Estimate) else value


def render(rows: dict[str, dict[str, Any]]) -> str:
    """The table as text; the interval of the mean stands behind it."""
    width = max(len(policy) for policy in rows) + 2
    head = f"{'cost %':>8}{'KL mean (95 % interval)':>30}{'median':>10}{'p90':>10}{'max':>10}"
    lines = [f"{'policy':<{width}}{head}{'gap closed %':>14}{'top-1 %':>9}{'first %':>9}{'exact':>7}{'declined':>10}"]
    for policy, row in rows.items():
        kl, mean = row["kl"], row["kl"]["mean"]
        interval = f"{mean['value']:.2e} ({mean['low']:.1e}..{mean['high']:.1e})"
        closed = "-" if row["gap_closed"] is None else f"{100 * row['gap_closed']['value']:.0f}"
        lines.append(
            f"{policy:<{width}}{100 * row['cost']:>8.1f}{interval:>30}{kl['median']['value']:>10.1e}"
            f"{kl['p90']['value']:>10.1e}{kl['max']:>10.1e}{closed:>14}{100 * row['top1']:>9.1f}"
            f"{100 * row['first']:>9.0f}{row['exact_length']:>7.1f}{row['declined']:>10}"
        )
    return "\n".join(lines)


def plot(rows: dict[str, dict[str, Any]], title: str, file: Path) -> None:
    """Mean KL with its interval over cost; the noise floor is a line."""
    from matplotlib.figure import Figure  # optional, and slow to import

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for policy, row in rows.items():
        mean = row["kl"]["mean"]
        if policy == FLOOR:
            axes.axhline(mean["value"], color="grey", linestyle="--", label="noise floor")
            continue
        ends = [[mean["value"] - mean["low"]], [mean["high"] - mean["value"]]]
        axes.errorbar(100 * row["cost"], mean["value"], yerr=ends, fmt="o", capsize=3)
        axes.annotate(policy, (100 * row["cost"], mean["value"]), xytext=(6, 4), textcoords="offset points")
    axes.set(xlabel="recomputed share of reused token-layers, %", ylabel="KL to full prefill, mean, nats", title=title)
    axes.set_yscale("log")
    axes.legend(loc="best") if FLOOR in rows else None
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def policies_argument(text: str) -> list[Choice]:
    try:
        return [parse_choice(label) for label in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help=f"a checkpoint folder (default: {MODEL}, which is fetched)")
    parser.add_argument(
        "--policies", type=policies_argument, default=policies_argument("rotate,relay"), metavar="P,P,..."
    )
    parser.add_argument("--split", default="development", choices=SPLITS, help="of the tasks (%(default)s)")
    parser.add_argument("--cases", type=int, help="only the first so many tasks")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument(
        "--min-tokens", type=int, default=WRITE.min_tokens, help="each producer writes at least (%(default)s)"
    )
    parser.add_argument("--max-tokens", type=int, default=WRITE.max_tokens, help="and at most (%(default)s)")
    parser.add_argument("--temperature", type=float, default=WRITE.temperature, help="of the producers (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=32768, help="KV pool, tokens (%(default)s)")
    parser.add_argument("--route-above", type=float, help="the server's route_above (default: its own)")
    parser.add_argument("--server-args", default="", metavar="'--FLAG VALUE ...'", help="further flags of the server")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures, and every case, to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture (needs matplotlib)")
    args = parser.parse_args()

    began = time.monotonic()
    cases = run(args)
    groups = {name: [case for case in cases if member(case)] for name, member in GROUPS.items()}
    tables = {name: table(members) for name, members in groups.items() if members}
    seconds = time.monotonic() - began
    for name in list(GROUPS)[:2]:
        if name in tables:
            count = len({case.chain for case in groups[name]})
            print(f"{name}: {count} chains, up to {FORCED} positions each\n{render(tables[name])}\n")
    _say(f"{seconds:.0f} s")
    if args.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "policies"}
        settings["policies"] = {choice.label: choice.params for choice in args.policies}
        figures = {"settings": settings, "machine": platform.processor() or platform.machine(), "seconds": seconds}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures | {"groups": tables, "cases": [asdict(c) for c in cases]}, indent=1))
    if args.plot:
        chains = len({case.chain for case in cases})
        model = args.model.name if args.model else MODEL
        plot(tables["all"], f"{model}, {args.dtype}: {chains} chains of {args.split}", args.plot)


if __name__ == "__main__":
    main()
