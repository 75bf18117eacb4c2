"""What every test finds in its environment, in whatever order the files run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# SGLang's modules need a platform to be imported on a machine without an accelerator.
if not torch.cuda.is_available():
    os.environ.setdefault("SGLANG_PLATFORM", "relay_cpu")
# An audited request is served exactly, and which ones are audited is random: tests of audits turn them on themselves.
os.environ.setdefault("SGLANG_RELAY_AUDIT_EVERY", "0")
# For the tests' tiny models relaying seldom saves time: tests of the cost model turn it on themselves.
os.environ.setdefault("SGLANG_RELAY_COST_MODEL", "false")


@pytest.fixture(autouse=True)
def sglang_environment() -> Iterator[None]:
    """Undo what a test leaves in the environment: flags of the relay become variables, which later servers inherit."""
    before = {k: v for k, v in os.environ.items() if k.startswith("SGLANG_")}
    yield
    for name in [k for k in os.environ if k.startswith("SGLANG_") and k not in before]:
        del os.environ[name]
    os.environ.update(before)
