"""Out-of-tree SGLang platform `relay_cpu`: the stock wheel on plain PyTorch CPU.

SGLang calls `activate` through the entry point group ``sglang.srt.platforms``, in every process and, while
``SGLANG_PLATFORM`` is unset, also on machines that want another platform. Hence this module imports nothing heavy.
"""

import os

PLATFORM_NAME = "relay_cpu"


def activate() -> str | None:
    """Return the platform's class path if ``SGLANG_PLATFORM=relay_cpu``, else None ("not this machine").

    An explicit request is required: a machine whose GPU driver is broken must not fall back to the CPU silently.
    """
    if os.environ.get("SGLANG_PLATFORM") != PLATFORM_NAME:
        return None
    from sglang_torch_cpu.defaults import set_process_defaults

    set_process_defaults()
    return "sglang_torch_cpu.platform:TorchCpuPlatform"
