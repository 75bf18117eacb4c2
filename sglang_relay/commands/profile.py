"""``sglang-relay profile``."""

import argparse
import sys
from pathlib import Path
from typing import Any

from sglang_relay.commands.common import DATA, MODEL, add_start_limit, require_writable, resolve, say


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "profile",
        allow_abbrev=False,
        usage="sglang-relay profile MODEL [--data FILE] [--cases N] [--out DIR] [--start-limit S] [SERVER FLAGS]",
        help="find the layer range of a model, and where its reused values deviate",
        description="Start a private server, let agents write texts, and compare the values that they have of these "
        "texts with those of a full prefill. Writes profile.json, profile.txt and, with matplotlib, profile.png. Flags "
        "that are not listed here go to the server, e.g. --dtype float16.",
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("--data", type=Path, metavar="FILE", help=DATA)
    parser.add_argument("--cases", type=int, metavar="N", help="only the first N tasks")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: sglang-relay/profiles in the user's cache folder"
    )
    add_start_limit(parser)
    parser.set_defaults(run=_run, server_args=[])


def _run(args: argparse.Namespace) -> int:
    from sglang_relay.identity import IdentityError, user_cache
    from sglang_relay.measure.server import ServerError
    from sglang_relay.models.sources import ModelError
    from sglang_relay.profile import picture, run
    from sglang_relay.profile.file import ProfileError

    try:
        require_writable(args.out or user_cache("profiles"))
        model = resolve(args.model)
        found = run.profile(
            model,
            data=args.data,
            cases=args.cases,
            server_args=args.server_args,
            start_limit=args.start_limit,
            progress=say,
        )
        out = args.out or user_cache("profiles", found.identity.weights.rpartition(":")[2][:24])
        found.save(out / "profile.json")
        (out / "profile.txt").write_text(picture.table(found) + "\n", encoding="utf-8")
    except (ModelError, IdentityError, ProfileError, ServerError, OSError) as error:
        print(f"sglang-relay profile: {error}", file=sys.stderr)
        return 1
    try:
        picture.draw(found, out / "profile.png")
    except ProfileError as error:
        say(f"profile.png is not written: {error}")
    print(picture.table(found))
    print(out)
    return 0
