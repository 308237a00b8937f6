"""Packing and unpacking by plain loops, from the layouts' descriptions."""

from __future__ import annotations

import numpy as np


def pack_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """``[n, k]`` codes into int32 ``[n, ceil(k * bits / 32)]``: code i at bit ``i * bits`` of the
    row, lowest first."""
    rows, count = codes.shape
    words = np.zeros((rows, -(-count * bits // 32)), np.uint32)
    for r in range(rows):
        value = sum(int(codes[r, i]) << (bits * i) for i in range(count))
        for w in range(words.shape[1]):
            words[r, w] = (value >> (32 * w)) & 0xFFFFFFFF
    return words.view(np.int32)


def unpack_rows(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The ``count`` codes of every row of int32 words."""
    out = np.zeros((len(words), count), np.int64)
    for r, row in enumerate(np.ascontiguousarray(words).view(np.uint32)):
        value = sum(int(word) << (32 * i) for i, word in enumerate(row))
        for i in range(count):
            out[r, i] = (value >> (bits * i)) & ((1 << bits) - 1)
    return out
