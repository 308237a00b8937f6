"""GGUF blocks that a packed format holds: taken over code for code, never rounded twice.

The codes of a block (layouts: ggml's ``block_q4_0``, ``block_q6_K`` and so on) become int4 or
int8 codes of the same group size.  The scales of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 are f16 and
stay what they are.  K-quants store a group's scale and minimum as a product of two numbers;
here the product is rounded to f16, by at most 2^-11 of itself: an eighth of what bf16 weights
would be rounded by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pyllmlite.core.weights import LinearWeight


@dataclass(frozen=True)
class BlockType:
    """A stored block: its bytes, columns, and the group that its codes are read with."""

    size: int
    columns: int
    format: str
    group: int
    exact: bool
    decode: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray | None]]


def fits(dtype: str, columns: int, exact: bool = False) -> bool:
    """Can rows of this stored type be kept as they are (``exact``: to the last bit)?"""
    kind = _TYPES.get(dtype)
    return kind is not None and columns % kind.columns == 0 and (kind.exact or not exact)


def blocks_to_codes(dtype: str, data: np.ndarray) -> LinearWeight:
    """Stored rows as codes.

    Args:
        dtype: q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k or q6_k.
        data: uint8 ``[rows, bytes per row]``.
    """
    kind = _TYPES[dtype]
    rows, blocks = data.shape[0], data.shape[1] // kind.size
    stored = np.ascontiguousarray(data).reshape(rows * blocks, kind.size)
    codes, scales, mins = kind.decode(stored)
    groups = blocks * kind.columns // kind.group
    return LinearWeight(
        kind.format,
        np.ascontiguousarray(codes).reshape(rows, blocks * kind.columns),
        np.ascontiguousarray(scales).reshape(rows, groups),
        None if mins is None else np.ascontiguousarray(mins).reshape(rows, groups),
        kind.group,
    )


def _f16(blocks: np.ndarray, at: int) -> np.ndarray:
    """The f16 at byte ``at`` of every block, ``[blocks, 1]``."""
    return blocks[:, at : at + 2].copy().view(np.float16)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """``[..., n]`` bytes to ``[..., 2 n]`` codes: all low nibbles, then all high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(blocks: np.ndarray, at: int) -> np.ndarray:
    """Bit j of the 32-bit word at byte ``at`` as 16 for column j, else 0."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << 4


def _q4_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, None]:
    return _nibbles(blocks[:, 2:]), _f16(blocks, 0), None


def _q4_1(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return _nibbles(blocks[:, 4:]), _f16(blocks, 0), _f16(blocks, 2)


def _q5_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, None]:
    codes = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return codes.view(np.int8) - np.int8(16), _f16(blocks, 0), None


def _q5_1(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return codes.view(np.int8), _f16(blocks, 0), _f16(blocks, 2)


def _q8_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, None]:
    return blocks[:, 2:].view(np.int8), _f16(blocks, 0), None


def _k_scales(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales and mins of the eight groups of a Q4_K or Q5_K block: 6-bit numbers in 12 bytes
    behind ``d`` and ``dmin``."""
    d, dmin = (_f16(blocks, at).astype(np.float32) for at in (0, 2))
    low, middle, high = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate([low & 63, (high & 15) | (low >> 6 << 4)], axis=1)
    mins = np.concatenate([middle & 63, (high >> 4) | (middle >> 6 << 4)], axis=1)
    return (d * scales).astype(np.float16), (-dmin * mins).astype(np.float16)


def _q4_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32))
    return codes, *_k_scales(blocks)


def _q5_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    codes = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[:, None]
    fifth = (blocks[:, 16:48, None].swapaxes(1, 2) >> shifts & 1) << 4
    return (codes | fifth).view(np.int8), *_k_scales(blocks)


def _q6_k(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, None]:
    low = blocks[:, :128].reshape(-1, 2, 64)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    four = _nibbles(low).reshape(-1, 2, 4, 32)
    two = (high >> np.array([0, 2, 4, 6], np.uint8)[:, None] & 3) << 4
    scales = _f16(blocks, 208).astype(np.float32) * blocks[:, 192:208].view(np.int8)
    return (four | two).view(np.int8) - np.int8(32), scales.astype(np.float16), None


_TYPES = {
    "q4_0": BlockType(18, 32, "int4", 32, True, _q4_0),
    "q4_1": BlockType(20, 32, "int4", 32, True, _q4_1),
    "q5_0": BlockType(22, 32, "int8", 32, True, _q5_0),
    "q5_1": BlockType(24, 32, "int8", 32, True, _q5_1),
    "q8_0": BlockType(34, 32, "int8", 32, True, _q8_0),
    "q4_k": BlockType(144, 256, "int4", 32, False, _q4_k),
    "q5_k": BlockType(176, 256, "int8", 32, False, _q5_k),
    "q6_k": BlockType(210, 256, "int8", 16, False, _q6_k),
}
