"""The ``sglang-relay`` command. Each subcommand imports what it needs when it runs, so that ``--help`` is instant."""

import argparse
import sys
from collections.abc import Sequence

from sglang_relay.commands import certify, doctor, fetch_model, profile


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit status is 0, or 1 after an error that was explained on stderr."""
    parser = argparse.ArgumentParser(prog="sglang-relay", description="Companion tools of the SGLang relay extension.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (doctor, fetch_model, profile, certify):
        command.add(commands)
    args, rest = parser.parse_known_args(argv)
    if rest and not hasattr(args, "server_args"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.server_args = rest
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
