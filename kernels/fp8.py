"""e4m3 (OCP "fn": no infinities, largest value 448) to and from fp32, in registers.

KV buffers of fp8 reach the kernels as bytes. Compute capability 8.9 and later converts them in hardware; before that
the bits are moved by hand, since Triton refuses the type there.
"""

import torch
import triton
import triton.language as tl


def native_fp8(device: torch.device) -> bool:
    """Whether the device converts e4m3 in hardware."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def decode_e4m3(bits, NATIVE: tl.constexpr):
    """uint8 bytes to fp32, exactly."""
    if NATIVE:
        return bits.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    magnitude = (bits & 0x7F).to(tl.uint16)
    # The same exponent and mantissa bits one format wider: fp16 has bias 15 where e4m3 has 7, hence 2^8.
    value = (magnitude << 7).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(bits >= 0x80, -value, value)


@triton.jit
def encode_e4m3(value, NATIVE: tl.constexpr):
    """fp32 to uint8 bytes: nearest, ties to even; past 448 saturated; NaN stays NaN."""
    value = tl.where(value > 448.0, 448.0, value)
    value = tl.where(value < -448.0, -448.0, value)
    if NATIVE:
        return value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    size = tl.abs(value)
    bits = size.to(tl.uint32, bitcast=True)
    # Normal values: round at mantissa bit 20, then move the exponent's bias from 127 to 7.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 values are multiples of 2^-9, which is the unit in the last place of 2^14: the sum rounds to it.
    small = (size + 16384.0).to(tl.uint32, bitcast=True) & 0xF
    magnitude = tl.where(size < 0.015625, small, normal)
    magnitude = tl.where(value != value, 0x7F, magnitude)
    sign = (value.to(tl.uint32, bitcast=True) >> 24) & 0x80
    return (magnitude | sign).to(tl.uint8)
