"""What the subcommands that start a private server share."""

import argparse
import math
import sys
import tempfile
from pathlib import Path

MODEL = "a checkpoint folder, a model of fetch-model, or a name on the Hub"
DATA = 'JSONL: {"role": ..., "task": ...}, perhaps "reader" and "question"'


def add_start_limit(parser: argparse.ArgumentParser) -> None:
    """``--start-limit``."""
    from sglang_relay.measure.vital import START_LIMIT_S

    parser.add_argument(
        "--start-limit",
        type=_seconds,
        default=START_LIMIT_S,
        metavar="S",
        help="give the server up after so many seconds in which it neither worked nor said anything while it started "
        "(default: %(default)g)",
    )


def _seconds(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed is a number of seconds above 0")
    return value


def require_writable(folder: Path) -> Path:
    """``folder``, made if it is missing. Raises OSError, saying what to do, where no file can be written to it: better
    now than after hours of measuring."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(f"{folder}: cannot be written to ({error}); give another folder with --out") from error
    return folder


def say(text: str) -> None:
    """Progress, on stderr: stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


def resolve(model: str) -> str | Path:
    """``model``, or the folder of the fetched model of that name. Raises ModelError when that cannot be fetched."""
    from sglang_relay.fetch_model import ensure_model
    from sglang_relay.models.sources import SOURCES

    return ensure_model(model) if model in SOURCES and not Path(model).is_dir() else model
