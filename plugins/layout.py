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
    from pyllmlite.hooks.attention import AttentionNeeds
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


def unreadable(need: AttentionNeeds) -> str | None:
    """Why an attention over this layout cannot do what is needed; None: it can."""
    if need.device != "cpu":
        return f"runs on the CPU, not on {need.device!r}"
    if need.kv_layout != PAGED_KT:
        return f"reads KV layout {PAGED_KT!r}, not {need.kv_layout!r}"
    if need.kv_dtype not in ELEMENT_BYTES:
        return f"reads {', '.join(ELEMENT_BYTES)}, not kv_dtype {need.kv_dtype!r}"
    if need.block_size % BLOCK_MULTIPLE:
        return f"block_size must be a multiple of {BLOCK_MULTIPLE}, got {need.block_size}"
    if need.num_heads % need.num_kv_heads:
        return f"{need.num_heads} heads do not share {need.num_kv_heads} KV heads evenly"
    return None


def gather(
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    block_table: np.ndarray,
    block_size: int,
    first: int,
    last: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of positions ``first`` to ``last`` of one sequence, float64
    ``[positions, num_kv_heads, head_dim]``."""
    start = first // block_size
    blocks = block_table[start : -(-last // block_size)]
    kv_heads, head_dim = k_cache.shape[1:3]
    keys = _floats(k_cache[blocks]).transpose(0, 3, 1, 2).reshape(-1, kv_heads, head_dim)
    values = _floats(v_cache[blocks]).transpose(0, 2, 1, 3).reshape(-1, kv_heads, head_dim)
    offset = start * block_size
    return keys[first - offset : last - offset], values[first - offset : last - offset]


def _floats(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint16:  # bf16 bits
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def _zeros(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    element = np.dtype(np.float32 if dtype == "f32" else np.uint16)
    size = int(np.prod(shape)) * element.itemsize
    raw = np.zeros(size + 63, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(element).reshape(shape)
