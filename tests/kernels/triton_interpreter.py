"""Run the project's Triton kernels on CPU tensors, in the test's own process.

Triton decides between compiling and interpreting when it is imported (``TRITON_INTERPRET``). Other tests of the same
process need the compiler, and so do the ahead-of-time tests of the same kernels. So the launch and the device call of a
compiled function are sent to Triton's interpreter only while `interpreted` is open.

The interpreter (3.8) keeps bfloat16 and fp8 as bit patterns: it truncates where the hardware rounds to nearest even,
and multiplies the patterns in `dot`. Both are mended here with PyTorch's conversions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from triton import knobs
from triton.language import core  # noqa: F401
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

_TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
_functions: dict[object, InterpretedFunction] = {}


def _function(compiled: JITFunction) -> InterpretedFunction:
    # Keyed by the Python function: hashing a JITFunction would parse it while the language is patched.
    if compiled.fn not in _functions:
        _functions[compiled.fn] = InterpretedFunction(compiled.fn)
    return _functions[compiled.fn]


def _run(self: JITFunction, *args, grid, warmup, **options):
    if all(grid):  # an empty grid is a launch error on a device
        return _function(self).run(*args, grid=grid, warmup=warmup, **options)
    raise ValueError(f"empty grid {grid}")


def _call(self: JITFunction, *args, **kwargs):
    return _function(self)(*args, **kwargs)


def _values(handle: TensorHandle) -> torch.Tensor:
    flat = torch.from_numpy(np.ascontiguousarray(handle.data).reshape(-1))
    return flat.view(_TORCH[handle.dtype.scalar]).reshape(handle.data.shape)


def _float_cast(self: InterpreterBuilder, source: TensorHandle, target, rounding=None) -> TensorHandle:
    dtype = target.scalar
    values = _values(source).to(_TORCH[dtype])
    data = values.reshape(-1).view(torch.uint8).numpy().view(interpreter._get_np_dtype(dtype))
    return TensorHandle(data.reshape(values.shape), dtype)


_stock_cast = InterpreterBuilder.cast_impl


def _cast(self: InterpreterBuilder, source: TensorHandle, target) -> TensorHandle:
    if source.dtype.scalar in _TORCH and target.scalar in _TORCH:
        return _float_cast(self, source, target)
    return _stock_cast(self, source, target)


def _dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, c: TensorHandle, *_: object) -> TensorHandle:
    product = torch.matmul(_values(a).float(), _values(b).float()).numpy()
    return TensorHandle(product + c.data, c.dtype.scalar)


def _sees_the_language() -> None:
    """`_patch_lang` patches the modules it finds among this function's globals: `tl` and `core`."""


@contextmanager
def interpreted() -> Iterator[None]:
    """Kernels launched inside run in the interpreter, one program after another."""
    with ExitStack() as stack:
        # Once for all: the interpreter never undoes the patches of device calls, and the compiler would trip over them.
        stack.callback(interpreter._patch_lang(_sees_the_language).restore)
        stack.enter_context(patch.object(interpreter, "_patch_lang", lambda _: interpreter._LangPatchScope()))
        stack.enter_context(knobs.runtime.scope())
        knobs.runtime.interpret = True
        for owner, name, new in (
            (JITFunction, "run", _run),
            (JITFunction, "__call__", _call),
            (InterpreterBuilder, "cast_impl", _cast),
            (InterpreterBuilder, "create_fp_to_fp", _float_cast),
            (InterpreterBuilder, "create_dot", _dot),
        ):
            stack.enter_context(patch.object(owner, name, new))
        yield
