"""The platform class that SGLang instantiates."""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from sglang_torch_cpu.defaults import set_server_defaults

DISPATCH_KEY = "relay_cpu"
"""Key of this platform's ops in `BaseFusedOp`'s registry."""


class TorchCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """CPU without SGLang's CPU kernels: no Triton, no graphs, no pinned memory, collectives over gloo."""

    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_device(self, device_id: int | None = 0) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return ``"cpu"``: SGLang compares the device with strings, which a `torch.device` never equals."""
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        set_server_defaults(server_args)

    def get_dispatch_key_name(self) -> str:
        return DISPATCH_KEY

    def init_backend(self) -> None:
        """Register ops and attention; called once per worker while `model_executor.model_runner` is imported."""
        from sglang_torch_cpu import attention, ops, pinning

        ops.register(DISPATCH_KEY)
        attention.register()
        pinning.register()
