"""What the examples share: their server, either one that runs already (``--url``) or an own one, and its model."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn

import requests

from sglang_relay.fetch_model import ensure_model
from sglang_relay.measure.server import Server, ServerError
from sglang_relay.models.sources import ModelError

DEFAULT_MODEL = "smollm2-135m"


def say(message: str) -> None:
    """Progress goes to stderr; stdout is for results."""
    print(message, file=sys.stderr, flush=True)


def fail(message: str) -> NoReturn:
    """End the example with a message instead of a traceback."""
    say(f"\n{message}")
    sys.exit(1)


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """``--url`` and ``--model``."""
    parser.add_argument("--url", help="a running server, e.g. http://127.0.0.1:30000 (default: start an own one)")
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help="for the own server: a checkpoint folder, a Hub name, or %(default)s, which is fetched (the default)",
    )


@contextlib.contextmanager
def server(args: argparse.Namespace) -> Iterator[str]:
    """The URL of the server that the arguments ask for; an own one ends with the context."""
    if args.url:
        url = args.url.rstrip("/").removesuffix("/v1")
        if not _healthy(url):
            fail(f"no SGLang server answers at {url}")
        yield url
    else:
        with _own_server(_checkpoint(args.model)) as url:
            yield url


def _checkpoint(model: str) -> str:
    if model != DEFAULT_MODEL:
        return model
    try:
        return str(ensure_model(model))
    except ModelError as error:
        fail(str(error))


@contextlib.contextmanager
def _own_server(model: str) -> Iterator[str]:
    """A stock SGLang server with the relay extension on a free port."""
    with contextlib.ExitStack() as stack:
        # Without audits: an audited request is served exactly, which is not what the examples show.
        # There is no certificate for the model, and the default budget is a cautious one; this one is for speed.
        policy = ("--relay-policy", "probe", "--relay-budget", "fast")
        relay = ("--radix-cache-backend", "relay", "--relay-audit-every", 0, *policy)
        own = Server(model, *relay, progress=_tell)
        say(f"starting the server: {own.command}")
        try:
            stack.enter_context(own)
        except ServerError as error:
            fail(str(error))
        say("  ready")
        yield own.url


def _tell(seconds: float, last_line: str) -> None:
    say(f"  {seconds:3.0f} s  {last_line[:100]}")


def _healthy(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=10).status_code == 200
    except requests.RequestException:
        return False
