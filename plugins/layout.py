"""The KV layouts of the built-in caches, in one place: their words, arrays and native names.

``paged-kt``: K ``[num_blocks, num_kv_heads, head_dim, block_size]`` (keys transposed, so that
the kernel reads 16 keys as one vector), V ``[num_blocks, num_kv_heads, block_size, head_dim]``,
f32 or bf16.

``paged-int8``: codes with a scale per token and head, ``value = scale * code``, in the order in
which products of bytes take them: K ``[num_blocks, num_kv_heads, ceil(head_dim / 4), block_size,
4]``, V ``[num_blocks, num_kv_heads, block_size / 4, head_dim, 4]``, int8, and float32 scales
``[num_blocks, num_kv_heads, 2, block_size]`` of keys and of values.

block_size is a multiple of 16 (``KVLayout`` in csrc/include/pyllmlite/ops.h).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pyllmlite.runtime.native import native

if TYPE_CHECKING:
    from pyllmlite import _native
    from pyllmlite.hooks.attention import AttentionNeeds
    from pyllmlite.hooks.cache import KVView

PAGED_KT = "paged-kt"
PAGED_INT8 = "paged-int8"
DTYPES = {PAGED_KT: ("f32", "bf16"), PAGED_INT8: ("int8",)}
BLOCK_MULTIPLE = 16
_ITEMS: dict[str, Any] = {"f32": np.float32, "bf16": np.uint16, "int8": np.int8}


def shapes(
    num_blocks: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: str
) -> dict[str, tuple[int, ...]]:
    """Of K, of V and, with int8, of their scales."""
    if dtype != "int8":
        return {
            "k": (num_blocks, num_kv_heads, head_dim, block_size),
            "v": (num_blocks, num_kv_heads, block_size, head_dim),
        }
    return {
        "k": (num_blocks, num_kv_heads, -(-head_dim // 4), block_size, 4),
        "v": (num_blocks, num_kv_heads, block_size // 4, head_dim, 4),
        "scales": (num_blocks, num_kv_heads, 2, block_size),
    }


def block_bytes(num_kv_heads: int, head_dim: int, block_size: int, dtype: str) -> int:
    """Of one block of one layer: K, V and their scales."""
    sizes = shapes(1, num_kv_heads, head_dim, block_size, dtype)
    return sum(
        int(np.prod(shape)) * np.dtype(_ITEMS["f32" if name == "scales" else dtype]).itemsize
        for name, shape in sizes.items()
    )


def allocate(
    num_blocks: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: str
) -> dict[str, np.ndarray]:
    """The arrays of :func:`shapes`, zeroed, on cache-line boundaries; bf16 as uint16.  Pages that
    no block has used yet cost no memory.

    Tensors of a Program have four dimensions: int8 K and V come with the last two as one."""
    arrays = {}
    for name, shape in shapes(num_blocks, num_kv_heads, head_dim, block_size, dtype).items():
        array = _zeros(shape, "f32" if name == "scales" else dtype)
        arrays[name] = array.reshape(*shape[:3], -1) if array.ndim > 4 else array
    return arrays


def native_layout(view: KVView, num_kv_heads: int, head_dim: int) -> _native.KVLayout:
    """The layout as the native ops take it."""
    return native().KVLayout(view.dtype, view.num_blocks, num_kv_heads, head_dim, view.block_size)


def unreadable(need: AttentionNeeds) -> str | None:
    """Why an attention over this layout cannot do what is needed; None: it can."""
    if need.device != "cpu":
        return f"runs on the CPU, not on {need.device!r}"
    if need.kv_layout not in DTYPES:
        known = " and ".join(map(repr, DTYPES))
        return f"reads KV layouts {known}, not {need.kv_layout!r}"
    dtypes = DTYPES[need.kv_layout]
    if need.kv_dtype not in dtypes:
        return f"reads {', '.join(dtypes)} in {need.kv_layout}, not kv_dtype {need.kv_dtype!r}"
    if need.block_size % BLOCK_MULTIPLE:
        return f"block_size must be a multiple of {BLOCK_MULTIPLE}, got {need.block_size}"
    if need.num_heads % need.num_kv_heads:
        return f"{need.num_heads} heads do not share {need.num_kv_heads} KV heads evenly"
    return None


def buffers(view: KVView) -> list[Any]:
    """What the native ops take of a view, in their order."""
    return [view.k, view.v, *view.extra.values()]


def gather(
    caches: tuple[np.ndarray, ...],
    block_table: np.ndarray,
    block_size: int,
    head_dim: int,
    first: int,
    last: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of positions ``first`` to ``last`` of one sequence, float64
    ``[positions, num_kv_heads, head_dim]``.  ``caches``: K, V and, with int8, the scales."""
    start = first // block_size
    blocks = block_table[start : -(-last // block_size)]
    k, v = (cache[blocks] for cache in caches[:2])
    heads = k.shape[1]
    if len(caches) == 3:
        scales = caches[2][blocks].astype(np.float64)
        k = k.reshape(len(blocks), heads, -1, block_size, 4).transpose(0, 1, 2, 4, 3)
        k = k.reshape(len(blocks), heads, -1, block_size)[:, :, :head_dim] * scales[:, :, None, 0]
        v = v.reshape(len(blocks), heads, -1, head_dim, 4).transpose(0, 1, 2, 4, 3)
        v = v.reshape(len(blocks), heads, block_size, head_dim) * scales[:, :, 1, :, None]
    keys = _floats(k).transpose(0, 3, 1, 2).reshape(-1, heads, head_dim)
    values = _floats(v).transpose(0, 2, 1, 3).reshape(-1, heads, head_dim)
    offset = start * block_size
    return keys[first - offset : last - offset], values[first - offset : last - offset]


def quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reference of what the store op keeps in int8: codes, and scales of the last axis (symmetric,
    ``largest magnitude / 127``; NaN where a vector is not finite)."""
    x = np.asarray(x, np.float32)
    largest = np.abs(x).max(axis=-1)
    finite = np.isfinite(x).all(axis=-1)
    usable = finite & (largest >= 1e-30)
    inverse = np.where(usable, 127 / np.where(usable, largest, 1), 0).astype(np.float32)
    codes = np.rint(np.where(finite[..., None], x, 0) * inverse[..., None])
    scales = np.where(finite, largest / np.float32(127), np.nan)
    return codes.astype(np.int8), scales.astype(np.float32)


def _floats(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint16:  # bf16 bits
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def _zeros(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    element = np.dtype(_ITEMS[dtype])
    size = int(np.prod(shape)) * element.itemsize
    raw = np.zeros(size + 63, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(element).reshape(shape)
