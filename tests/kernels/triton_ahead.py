"""Compile kernels for GPUs that are not there, and read what the machine code uses."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90, 100)
REGISTERS_PER_SM = 65536
SHARED_PER_SM = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
"""Bytes of shared memory of one streaming multiprocessor; one block may use 1 KiB less."""

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Built(NamedTuple):
    registers: int
    """Per thread."""
    stack: int
    local: int
    shared: int
    """Bytes per block, static and dynamic."""
    ptx: str
    widths: Counter[str]
    """How often the PTX has each instruction between global memory and registers, or shared memory."""

    def assert_no_spills(self) -> None:
        assert (self.stack, self.local) == (0, 0)


def build(
    kernel, signature: dict[str, str], constants: dict, capability: int, *, aligned=(), warps=4, stages=3
) -> Built:
    """Compile `kernel`.

    signature: Triton type of each runtime argument, such as ``*bf16`` or ``i32``. constants: value of each constexpr.
    aligned: pointers divisible by 16 bytes, as the launcher finds them.
    """
    names = kernel.arg_names
    assert set(signature) | set(constants) == set(names) and not set(signature) & set(constants)
    source = ASTSource(
        kernel,
        {name: signature.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    with TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [str(CUOBJDUMP), "--dump-resource-usage", str(cubin)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    ptx = compiled.asm["ptx"]
    built = Built(
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        shared=max(usage["SHARED"], compiled.metadata.shared),
        ptx=ptx,
        widths=Counter(re.findall(r"\b((?:ld|st)\.global[\w.:]*|cp\.async\.c[ag]\S*)", ptx)),
    )
    print(f"sm_{capability} {kernel.__name__}: {built.registers} registers, {built.shared} bytes shared, {warps} warps")
    return built
