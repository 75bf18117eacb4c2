"""SGLang's LoRA layers ask for pinned host memory without asking whether there is a device to pin it for; PyTorch
raises then. On this platform their tensors are ordinary ones."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch


class _Unpinned(ModuleType):
    """``torch``, whose factories ignore ``pin_memory``."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name not in ("tensor", "zeros", "empty", "ones", "full"):
            return value

        @functools.wraps(value)
        def unpinned(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
            return value(*args, **kwargs)

        return unpinned


def register() -> None:
    """For the LoRA layers and the backend that runs on plain PyTorch (``--lora-backend torch_native``)."""
    from sglang.srt.lora import layers
    from sglang.srt.lora.backend import torch_backend

    for module in (layers, torch_backend):
        module.torch = _Unpinned()  # type: ignore[attr-defined]
    if not torch.cuda.is_available():
        torch.Tensor.pin_memory = _as_it_is  # type: ignore[method-assign]


def _as_it_is(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
    return tensor
