"""What the subcommands that start a private server share."""

import sys
from pathlib import Path

MODEL = "a checkpoint folder, a model of fetch-model, or a name on the Hub"
DATA = 'JSONL: {"role": ..., "task": ...}, perhaps "reader" and "question"'


def say(text: str) -> None:
    """Progress, on stderr: stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


def resolve(model: str) -> str | Path:
    """``model``, or the folder of the fetched model of that name. Raises ModelError when that cannot be fetched."""
    from sglang_relay.fetch_model import ensure_model
    from sglang_relay.models.sources import SOURCES

    return ensure_model(model) if model in SOURCES and not Path(model).is_dir() else model
