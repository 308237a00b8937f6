"""Stored number formats: plain ones, and the block formats of GGUF, to float32.

The block layouts are those of ggml's ``block_q*`` structs (ggml-common.h).  Each function takes
the blocks of a tensor as uint8 ``[blocks, bytes per block]`` and gives float32 ``[blocks,
elements per block]``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# Plain types by their word; bf16 has no numpy type and is handled by its bits.
PLAIN: dict[str, np.dtype] = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype("<u2"),
    "f64": np.dtype("<f8"),
    "i8": np.dtype("i1"),
    "u8": np.dtype("u1"),
    "i16": np.dtype("<i2"),
    "u16": np.dtype("<u2"),
    "i32": np.dtype("<i4"),
    "u32": np.dtype("<u4"),
    "i64": np.dtype("<i8"),
    "u64": np.dtype("<u8"),
    "bool": np.dtype("?"),
}

# Block types: elements and bytes per block.
BLOCKS: dict[str, tuple[int, int]] = {
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
}


def _f16(blocks: np.ndarray, offset: int) -> np.ndarray:
    """The float16 at ``offset`` of every block as float32 ``[blocks, 1]``."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray) -> np.ndarray:
    """Low nibbles, then high nibbles: uint8 ``[blocks, 2 * bytes]``."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=1)


def _fifth_bits(blocks: np.ndarray, offset: int) -> np.ndarray:
    """32 bits of a little-endian word, each moved to bit 4: uint8 ``[blocks, 32]``."""
    bits = np.unpackbits(blocks[:, offset : offset + 4], axis=1, bitorder="little")
    return bits << 4


def _q4_0(b: np.ndarray) -> np.ndarray:
    return (_nibbles(b[:, 2:]).astype(np.float32) - 8) * _f16(b, 0)


def _q4_1(b: np.ndarray) -> np.ndarray:
    return _nibbles(b[:, 4:]).astype(np.float32) * _f16(b, 0) + _f16(b, 2)


def _q5_0(b: np.ndarray) -> np.ndarray:
    codes = _nibbles(b[:, 6:]) | _fifth_bits(b, 2)
    return (codes.astype(np.float32) - 16) * _f16(b, 0)


def _q5_1(b: np.ndarray) -> np.ndarray:
    codes = _nibbles(b[:, 8:]) | _fifth_bits(b, 4)
    return codes.astype(np.float32) * _f16(b, 0) + _f16(b, 2)


def _q8_0(b: np.ndarray) -> np.ndarray:
    return b[:, 2:].view(np.int8).astype(np.float32) * _f16(b, 0)


def _k_scales(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eight 6-bit scales and minimums of Q4_K and Q5_K, times d and dmin: ``[blocks, 8, 1]``.

    12 bytes hold them: scales 0..3 and minimums 0..3 in the low six bits of bytes 0..7; the others
    have their low nibbles in bytes 8..11 and their upper two bits on top of bytes 0..7.
    """
    s = b[:, 4:16]
    low, mid, high = s[:, 0:4], s[:, 4:8], s[:, 8:12]
    scales = np.concatenate([low & 63, (high & 0x0F) | ((low >> 6) << 4)], axis=1)
    mins = np.concatenate([mid & 63, (high >> 4) | ((mid >> 6) << 4)], axis=1)
    d, dmin = _f16(b, 0), _f16(b, 2)
    return (
        (scales.astype(np.float32) * d)[:, :, None],
        (mins.astype(np.float32) * dmin)[:, :, None],
    )


def _k_nibbles(packed: np.ndarray) -> np.ndarray:
    """Four runs of 32 bytes: low nibbles of a run, then its high ones: ``[blocks, 8, 32]``."""
    runs = packed.reshape(-1, 4, 1, 32)
    return np.concatenate([runs & 0x0F, runs >> 4], axis=2).reshape(-1, 8, 32)


def _q4_k(b: np.ndarray) -> np.ndarray:
    scales, mins = _k_scales(b)
    return (_k_nibbles(b[:, 16:]).astype(np.float32) * scales - mins).reshape(-1, 256)


def _q5_k(b: np.ndarray) -> np.ndarray:
    scales, mins = _k_scales(b)
    # Bit j of byte i of qh is the fifth bit of element i of group j.
    shifts = np.arange(8, dtype=np.uint8).reshape(1, 8, 1)
    fifth = ((b[:, 16:48].reshape(-1, 1, 32) >> shifts) & 1) << 4
    codes = _k_nibbles(b[:, 48:]) | fifth
    return (codes.astype(np.float32) * scales - mins).reshape(-1, 256)


def _q6_k(b: np.ndarray) -> np.ndarray:
    # Two halves of 128 elements: 64 bytes of low nibbles, 32 bytes of upper bit pairs each.
    low = b[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate([low & 0x0F, low >> 4], axis=2).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8).reshape(1, 1, 4, 1)
    high = ((b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3) << 4
    codes = (low | high).reshape(-1, 16, 16).astype(np.float32) - 32
    scales = b[:, 192:208].view(np.int8).astype(np.float32) * _f16(b, 208)
    return (codes * scales[:, :, None]).reshape(-1, 256)


_FUNCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
}


def block_rows_to_float32(kind: str, data: np.ndarray, out: np.ndarray) -> None:
    """uint8 ``[rows, bytes per row]`` of block type ``kind`` into float32 ``[rows, columns]``.

    A damaged file may hold scales that are infinite or NaN; they come out as such, silently.
    """
    _, size = BLOCKS[kind]
    with np.errstate(all="ignore"):
        blocks = np.ascontiguousarray(data).reshape(-1, size)
        out[...] = _FUNCTIONS[kind](blocks).reshape(out.shape)
