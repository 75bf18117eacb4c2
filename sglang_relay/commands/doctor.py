"""``sglang-relay doctor``."""

import argparse
import sys
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "doctor",
        help="check this installation, or a running server",
        description="Check the installed SGLang against what the relay builds on; with --url ask a running server "
        "whether it relays, which hooks are in force and what it declined. Exit status 1 if anything is wrong.",
    )
    parser.add_argument("--url", metavar="URL", help="base URL of a running server, e.g. http://127.0.0.1:30000")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    import warnings

    warnings.simplefilter("ignore")  # importing SGLang warns about each accelerator that this machine lacks
    from sglang_relay.engine import doctor

    if args.url is None:
        findings = list(doctor.installation())
    else:
        import requests

        try:
            answer = requests.get(args.url.rstrip("/") + "/server_info", timeout=(10, None))
            answer.raise_for_status()
            findings = list(doctor.server(answer.json()))
        except (requests.RequestException, ValueError) as error:
            print(f"sglang-relay doctor: {args.url} does not answer: {error}", file=sys.stderr)
            return 1
        except (AttributeError, KeyError, TypeError) as error:
            print(f"sglang-relay doctor: {args.url} is no server of this version: {error!r}", file=sys.stderr)
            return 1
    for finding in findings:
        print(f"{'ok ' if finding.ok else 'BAD'}  {finding.what}: {finding.detail}")
    return 0 if all(f.ok for f in findings) else 1
