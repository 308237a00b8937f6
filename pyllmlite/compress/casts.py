"""Floats on their way into a file: rounded to 16 bits, refused where they are none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from pyllmlite.compress.shard import Entry
from pyllmlite.core.errors import ModelError

if TYPE_CHECKING:
    from pyllmlite.compress.hf_view import HFTensor

FLOATS = ("f32", "bf16", "f16")
STORED_FLOATS = (*FLOATS, "f64")
COPY_BYTES = 16 << 20


def rounded(name: str, values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 as ``f32``, ``f16`` or the bits of ``bf16`` (nearest, ties to even).

    Raises:
        ModelError: NaN or infinity, or a value that becomes infinite.
    """
    if not np.isfinite(values).all():
        raise ModelError(
            f"{name} holds NaN or infinity: the checkpoint is damaged or was saved from a diverged "
            "run"
        )
    if dtype == "f32":
        return np.ascontiguousarray(values, np.float32)
    made: np.ndarray
    if dtype == "f16":
        with np.errstate(over="ignore"):
            made = values.astype(np.float16)
        finite = bool(np.isfinite(made).all())
    else:
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        made = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        finite = not bool(((made & 0x7FFF) == 0x7F80).any())
    if not finite:
        raise ModelError(f"{name} holds values too large for {dtype}; use --dtype f32")
    return made


def tensor_entry(tensor: HFTensor, dtype: str) -> Entry:
    """A tensor as it is, or its floats in another type; read some rows at a time."""
    codes = tensor.dtype not in STORED_FLOATS
    if codes and tensor.stored() is not None and tensor.dtype in PLAIN_INTEGERS:
        return Entry(tensor.name, tensor.shape, tensor.dtype, lambda: _bytes(tensor))
    if tensor.dtype == dtype and tensor.stored() is not None:
        return Entry(tensor.name, tensor.shape, dtype, lambda: _checked_bytes(tensor))
    return Entry(tensor.name, tensor.shape, dtype, lambda: _cast(tensor, dtype))


PLAIN_INTEGERS = ("i8", "u8", "i16", "u16", "i32", "u32", "i64", "u64", "bool")


def _bytes(tensor: HFTensor) -> Iterator[np.ndarray]:
    data = tensor.stored()
    assert data is not None
    for first in range(0, data.size, COPY_BYTES):
        yield data[first : first + COPY_BYTES]
    tensor.release()


def _checked_bytes(tensor: HFTensor) -> Iterator[np.ndarray]:
    for piece in tensor.pieces():
        rounded(tensor.name, piece, "f32")
    yield from _bytes(tensor)


def _cast(tensor: HFTensor, dtype: str) -> Iterator[np.ndarray]:
    for piece in tensor.pieces():
        yield rounded(tensor.name, piece, dtype)
    tensor.release()
