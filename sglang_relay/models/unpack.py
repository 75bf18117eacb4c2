"""GGUF tensors to float32: the block formats that the fetched models use.

An implementation of its own, apart from gguf-py's: a conversion compares the two (`checkpoint.verify`).
Block layouts after ggml's ``ggml-common.h`` (``block_q4_1``, ``block_q8_0``).
"""

import numpy as np

_BLOCK = 32
"""Weights per block, in both formats."""


def unpack(kind: str, data: np.ndarray) -> np.ndarray:
    """Unpack one tensor.

    Parameters
    ----------
    kind
        ggml's name of the block format: ``F32``, ``Q4_1`` or ``Q8_0``.
    data
        For ``F32`` the float32 values; otherwise uint8 ``[rows, bytes per row]``.

    Returns
    -------
    np.ndarray
        float32, ``[rows, weights per row]`` (``F32``: the shape of ``data``).

    Raises
    ------
    ValueError
        For a format that is not implemented here.
    """
    if kind == "F32":
        return data.astype(np.float32)
    if kind == "Q8_0":
        return _q8_0(data)
    if kind == "Q4_1":
        return _q4_1(data)
    raise ValueError(f"GGUF tensor format {kind} is not implemented")


def _q8_0(data: np.ndarray) -> np.ndarray:
    """34 bytes a block: fp16 scale, 32 int8 weights."""
    block = np.dtype([("scale", "<f2"), ("q", "i1", (_BLOCK,))])
    blocks = np.ascontiguousarray(data).view(block)
    values = blocks["q"].astype(np.float32) * blocks["scale"].astype(np.float32)[..., None]
    return values.reshape(len(data), -1)


def _q4_1(data: np.ndarray) -> np.ndarray:
    """20 bytes a block: fp16 scale, fp16 minimum, 16 bytes whose low nibbles are weights 0-15 and high ones 16-31."""
    block = np.dtype([("scale", "<f2"), ("low", "<f2"), ("q", "u1", (_BLOCK // 2,))])
    blocks = np.ascontiguousarray(data).view(block)
    q = np.concatenate([blocks["q"] & 15, blocks["q"] >> 4], axis=-1).astype(np.float32)
    # Product and sum are rounded one after the other, as ggml does; a fused multiply-add would differ in the last bit.
    values = q * blocks["scale"].astype(np.float32)[..., None]
    values += blocks["low"].astype(np.float32)[..., None]
    return values.reshape(len(data), -1)
