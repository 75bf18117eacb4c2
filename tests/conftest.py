"""What every test finds in its environment, in whatever order the files run, and fixtures of several files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from plugins import Inspector
from reference import Reference
from tiny_model import make_tiny_llama

from sglang_relay.measure.server import Server

# SGLang's modules need a platform to be imported on a machine without an accelerator.
if not torch.cuda.is_available():
    os.environ.setdefault("SGLANG_PLATFORM", "relay_cpu")
# An audited request is served exactly, and which ones are audited is random: tests of audits turn them on themselves.
os.environ.setdefault("SGLANG_RELAY_AUDIT_EVERY", "0")
# For the tests' tiny models relaying seldom saves time: tests of the cost model turn it on themselves.
os.environ.setdefault("SGLANG_RELAY_COST_MODEL", "false")

# Nothing that the tests ask takes that long: a request that is lost shall not hold up the run.
Server.answer_limit = 300.0


@pytest.fixture(autouse=True)
def sglang_environment() -> Iterator[None]:
    """Undo what a test leaves in the environment: flags of the relay become variables, which later servers inherit."""
    before = {k: v for k, v in os.environ.items() if k.startswith("SGLANG_")}
    yield
    for name in [k for k in os.environ if k.startswith("SGLANG_") and k not in before]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama as it comes; nobody may write to it. A file whose model is another has a fixture of its own."""
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def reference(model: Path) -> Reference:
    return Reference(model)


@pytest.fixture(scope="module")
def inspector(tmp_path_factory: pytest.TempPathFactory) -> Inspector:
    """Of a module's server, which has to be started with its ``env``."""
    return Inspector(tmp_path_factory.mktemp("inspector"))
