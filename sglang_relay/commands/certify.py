"""``sglang-relay certify``."""

import argparse
import sys
from pathlib import Path
from typing import Any

from sglang_relay.commands.common import DATA, MODEL, add_start_limit, require_writable, resolve, say


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "certify",
        allow_abbrev=False,
        usage="sglang-relay certify MODEL [--bound floor|X] [--policies P,P,...] [--data FILE] [--cases N] [--out DIR] "
        "[--start-limit S] [SERVER FLAGS]",
        help="measure how far each policy is from full prefill, for a server's policy=auto",
        description="Start a private server, let agents write texts, and compare what every policy answers to prompts "
        "that hold them with full prefill. Writes a certificate, which servers of the same weights, dtype and versions "
        "find by themselves, and says which policy they will take, and why. Flags that are not listed here go to the "
        "server: give those that your own server has, e.g. --dtype float16 --page-size 16.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--bound", help="mean KL to full prefill, in nats, or floor (default: the setting's)")
    parser.add_argument(
        "--policies", metavar="P,P,...", help="NAME[@BUDGET][+KEY=VALUE...] each (default: nine of all kinds)"
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help=DATA)
    parser.add_argument("--cases", type=int, metavar="N", help="only N tasks, of all kinds alike")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: where servers look, the user's cache folder")
    add_start_limit(parser)
    parser.set_defaults(run=_run, server_args=[])


def _run(args: argparse.Namespace) -> int:
    from sglang_relay.certificate import CertificateError, default_directory
    from sglang_relay.certify import FEW, POLICIES, certify
    from sglang_relay.config import ConfigError, RelayConfig
    from sglang_relay.engine.certified import choose
    from sglang_relay.identity import IdentityError
    from sglang_relay.measure.divergence import MeasureError
    from sglang_relay.measure.server import ServerError
    from sglang_relay.models.sources import ModelError
    from sglang_relay.profile.file import ProfileError

    try:
        config = RelayConfig() if args.bound is None else RelayConfig(bound=args.bound)
        out = require_writable(args.out or default_directory())
        found = certify(
            resolve(args.model),
            policies=POLICIES if args.policies is None else args.policies.split(","),
            cases=args.cases,
            data=args.data,
            server_args=args.server_args,
            start_limit=args.start_limit,
            progress=say,
        )
        file = found.save(out)
    except (
        *(CertificateError, ConfigError, IdentityError, MeasureError, ModelError, ProfileError, ServerError, OSError),
    ) as error:
        print(f"sglang-relay certify: {error}", file=sys.stderr)
        return 1
    if found.floor.n < FEW:
        say(f"{found.floor.n} prompts are few: below {FEW} the intervals are narrower than what is known")
    chosen = choose(config, found, influence=found.settings.get("relay_influence") not in (None, "off"))
    print(found.table())
    print(f"servers with policy=auto and bound={config.bound} will relay with {chosen.tier}: {chosen.why}")
    print(file)
    return 0
