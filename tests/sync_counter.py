"""Find where a relay forward would make the host wait for the device, without a device.

On a CPU nothing waits, so waiting is told by what is called: reading a value back (`.item()`, `.tolist()`, `.cpu()`,
`bool()`), operations whose result has a shape that depends on values (`nonzero`, masks as indices), and copies to the
device from memory that is not page-locked (a tensor made of numbers, `from_numpy`, a number stored through an index).
Only calls that the relay or its kernels make themselves count: SGLang's code is stock, and Triton's interpreter stands
in for a device. Must not import from the tests: it runs inside servers, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import sglang_relay_kernels.realign as kernels  # pyright: ignore[reportMissingImports]
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sglang_relay

OURS = (str(Path(sglang_relay.__file__).parent), str(Path(str(kernels.__file__)).parent))
_BETWEEN = (str(Path(torch.__file__).parent), str(Path(__file__)), "unittest/mock.py")
"""Files between a call of ours and what it does."""

PAGE_LOCKED = {
    ("transfer.py", "on_device"),
    ("scattered_attention.py", "plan_scattered"),
    ("probe_scores.py", "plan_probe"),
}
"""Functions that put what they copy into page-locked memory first where the device is a CUDA device."""
ON_HOST = {("selection.py", "_view")}
"""Functions whose tensors made of arrays stay on the host: what needs no signal is selected there."""

_VALUES = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "equal", "allclose")
_CHECKED = ("cholesky_inverse", "linalg_cholesky", "linalg_inv", "linalg_solve")
"""These look whether they succeeded."""
_READERS = ("cpu", "tolist")
_MAKERS = ("from_numpy", "tensor", "as_tensor")


class SyncCounter(TorchDispatchMode):
    """While it is open, `found` gets one entry, ``file:function: what``, for each call that waits.

    host: tensors that lie on the host wherever the device is; reading these is no wait.
    """

    def __init__(self, host: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.found: list[str] = []
        self._host = list(host)
        self._stack = ExitStack()

    def __enter__(self) -> SyncCounter:
        for name in _READERS:
            self._watch(torch.Tensor, name)
        self._watch(torch.Tensor, "new_tensor")
        for name in _MAKERS:
            self._watch(torch, name)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in _VALUES + _CHECKED or _by_value(name, args, kwargs or {}):
            self._note(name, args[0])
        return func(*args, **(kwargs or {}))

    def _watch(self, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            self._note(name, args[0])
            return original(*args, **kwargs)

        self._stack.enter_context(patch.object(owner, name, watched))

    def _note(self, what: str, of: Any) -> None:
        frame: Any = sys._getframe(2)
        while any(part in frame.f_code.co_filename for part in _BETWEEN):
            frame = frame.f_back
        path = frame.f_code.co_filename
        place = Path(path).name, frame.f_code.co_name
        if path.startswith(OURS) and place not in PAGE_LOCKED | ON_HOST and not any(of is t for t in self._host):
            self.found.append(f"{place[0]}:{place[1]}: {what}")


def _by_value(name: str, args: Any, kwargs: Any) -> bool:
    """Whether an operation waits because of what it is given."""
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name not in ("index", "index_put", "index_put_"):
        return False
    if any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
        return True
    return name != "index" and args[2].dim() == 0
