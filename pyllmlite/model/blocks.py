"""GGUF blocks that a packed format holds exactly: taken over bit for bit, never rounded twice.

A block is 32 columns of a row behind its f16 scale (layouts: ggml's ``block_q4_0``,
``block_q4_1``, ``block_q8_0``).  They become codes, scales and mins of group size 32.
"""

from __future__ import annotations

import numpy as np

from pyllmlite.core.weights import LinearWeight

GROUP = 32
_BLOCK_BYTES = {"q4_0": 18, "q4_1": 20, "q8_0": 34}


def fits(dtype: str, columns: int) -> bool:
    """Can rows of this stored type be kept as they are?"""
    return dtype in _BLOCK_BYTES and columns % GROUP == 0


def blocks_to_codes(dtype: str, data: np.ndarray) -> LinearWeight:
    """Stored rows as codes.

    Args:
        dtype: q4_0, q4_1 or q8_0.
        data: uint8 ``[rows, bytes per row]``.
    """
    rows, size = data.shape[0], _BLOCK_BYTES[dtype]
    blocks = np.ascontiguousarray(data).reshape(rows, data.shape[1] // size, size)
    scales = blocks[:, :, 0:2].copy().view(np.float16)[:, :, 0]
    if dtype == "q8_0":
        codes = blocks[:, :, 2:].view(np.int8).reshape(rows, blocks.shape[1] * GROUP)
        return LinearWeight("int8", np.ascontiguousarray(codes), scales, None, GROUP)
    mins = blocks[:, :, 2:4].copy().view(np.float16)[:, :, 0] if dtype == "q4_1" else None
    nibbles = blocks[:, :, 4 if dtype == "q4_1" else 2 :]
    codes = np.empty((rows, blocks.shape[1], GROUP), np.uint8)
    np.bitwise_and(nibbles, 15, out=codes[:, :, : GROUP // 2])
    np.right_shift(nibbles, 4, out=codes[:, :, GROUP // 2 :])
    codes = codes.reshape(rows, blocks.shape[1] * GROUP)
    return LinearWeight("int4", codes, scales, mins, GROUP)
