"""The KV layout of the built-in caches, in one place: its word, its arrays, its native name.

``paged-kt``: K ``[num_blocks, num_kv_heads, head_dim, block_size]`` (keys transposed, so that
the kernel reads 16 keys as one vector), V ``[num_blocks, num_kv_heads, block_size, head_dim]``,
f32 or bf16, block_size a multiple of 16 (``KVLayout`` in csrc/include/pyllmlite/ops.h).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyllmlite.runtime.native import native

if TYPE_CHECKING:
    from pyllmlite import _native
    from pyllmlite.hooks.cache import KVView

PAGED_KT = "paged-kt"
BLOCK_MULTIPLE = 16
ELEMENT_BYTES = {"f32": 4, "bf16": 2}


def allocate(
    num_blocks: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """K and V, zeroed, on cache-line boundaries; bf16 as uint16.  Pages that no block has used
    yet cost no memory."""
    k = _zeros((num_blocks, num_kv_heads, head_dim, block_size), dtype)
    v = _zeros((num_blocks, num_kv_heads, block_size, head_dim), dtype)
    return k, v


def native_layout(view: KVView, num_kv_heads: int, head_dim: int) -> _native.KVLayout:
    """The layout as the native ops take it."""
    return native().KVLayout(view.dtype, view.num_blocks, num_kv_heads, head_dim, view.block_size)


def _zeros(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    element = np.dtype(np.float32 if dtype == "f32" else np.uint16)
    size = int(np.prod(shape)) * element.itemsize
    raw = np.zeros(size + 63, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(element).reshape(shape)
