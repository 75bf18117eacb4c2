"""Between host and device: copies that nobody waits for, and the read-back that a forward may wait for once."""

from __future__ import annotations

import numpy as np
import torch


def on_device(values: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """``values`` of the host on ``device``, in their dtype.

    A CUDA device copies from page-locked memory, without the host: it would wait for a copy from other memory, and so
    for everything launched before. PyTorch keeps the page-locked block until the copy is over. On a CPU the result may
    share the memory of ``values``.
    """
    host = torch.from_numpy(np.ascontiguousarray(values)) if isinstance(values, np.ndarray) else values
    if device.type != "cuda" or not host.numel():
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def read_back(tensors: list[torch.Tensor]) -> list[np.ndarray]:
    """The values of one-dimensional tensors of one dtype and device, in one copy. On an accelerator the host waits for
    it, and for everything launched before: the relay calls this at most once in a forward."""
    if not tensors:
        return []
    whole = torch.cat(tensors).cpu().numpy()
    return np.split(whole, np.cumsum([t.numel() for t in tensors[:-1]]))
