"""Behind the bookkeeping of the built-in caches: arrays of blocks, and the ops that write and copy
them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyllmlite.core.errors import CapacityError
from pyllmlite.hooks.cache import CacheNeeds, KVCache, KVView, StoreLayer
from pyllmlite.hooks.sink import OpSink
from pyllmlite.runtime.native import native
from pyllmlite_plugins.layout import (
    DTYPES,
    PAGED_KT,
    allocate,
    block_bytes,
    buffers,
    native_layout,
)


class BlockStorage(KVCache):
    """The half of a :class:`KVCache` that is asked at load.

    Attributes:
        swap_counts: Per group the blocks of the swap space; empty: there is none.
    """

    layout = PAGED_KT
    kv_dtypes = DTYPES[PAGED_KT]

    @classmethod
    def supports(cls, need: CacheNeeds) -> str | None:
        if need.device != "cpu":
            return f"stores on the CPU, not on {need.device!r}"
        if need.kv_dtype != "auto" and need.kv_dtype not in cls.kv_dtypes:
            return f"stores {', '.join(cls.kv_dtypes)}, not kv_dtype {need.kv_dtype!r}"
        return None

    def __init__(self, needs: CacheNeeds) -> None:
        super().__init__(needs)
        self.block_size = self._choose_block_size(needs)
        self.kv_dtype = self._auto_dtype(needs) if needs.kv_dtype == "auto" else needs.kv_dtype
        one = block_bytes(needs.num_kv_heads, needs.head_dim, self.block_size, self.kv_dtype)
        self._block_bytes = [len(group.layers) * one for group in needs.groups]
        self._counts: list[int] = []
        self.swap_counts: list[int] = []
        self._swap_buffers: dict[int, list[Any]] = {}  # by layer

    def _choose_block_size(self, needs: CacheNeeds) -> int:
        raise NotImplementedError

    def _auto_dtype(self, needs: CacheNeeds) -> str:
        """What ``kv_dtype="auto"`` stores: the model's own dtype."""
        return "f32" if needs.dtype == "f32" else "bf16"

    def _allot(self, counts: list[int]) -> None:
        """``counts``: per group the blocks of the pool; the swap space is divided as they are."""
        self._counts = counts
        if not self.needs.swap_bytes:
            return
        share = self.needs.swap_bytes / self.nbytes
        self.swap_counts = [int(n * share) for n in counts]
        if min(self.swap_counts) < 1:
            raise CapacityError(
                f"{self.needs.swap_bytes} bytes of swap_space do not hold one block of "
                f"{self.block_size} tokens; raise swap_space, or leave it out"
            )

    # -- at load -----------------------------------------------------------------------------
    def add_tensors(self, sink: OpSink) -> list[KVView]:
        needs = self.needs
        views: list[KVView | None] = [None] * needs.num_layers
        for g, group in enumerate(needs.groups):
            for layer in group.layers:
                tensors = self._tensors(sink, f"layers.{layer}.", "cache", self._counts[g])
                if self.swap_counts:
                    swap = self._tensors(sink, f"layers.{layer}.", "swap", self.swap_counts[g])
                    self._swap_buffers[layer] = list(swap.values())
                views[layer] = KVView(
                    layout=self.layout,
                    dtype=self.kv_dtype,
                    group=g,
                    block_size=self.block_size,
                    num_blocks=self._counts[g],
                    k=tensors.pop("k"),
                    v=tensors.pop("v"),
                    extra=tensors,
                )
        missing = [i for i, view in enumerate(views) if view is None]
        if missing:
            raise ValueError(f"layers {missing} are in no KV group")
        return [view for view in views if view is not None]

    def _tensors(self, sink: OpSink, at: str, what: str, num_blocks: int) -> dict[str, Any]:
        needs = self.needs
        arrays = allocate(
            num_blocks, needs.num_kv_heads, needs.head_dim, self.block_size, self.kv_dtype
        )
        dtypes = {name: "f32" if name == "scales" else self.kv_dtype for name in arrays}
        return {
            name: sink.tensor(f"{at}{name}_{what}", array, dtypes[name])
            for name, array in arrays.items()
        }

    def add_store_op(self, sink: OpSink, layer: StoreLayer, qkv: Any, kv: KVView) -> None:
        op = native().rotary_store(
            num_heads=layer.num_heads,
            kv=native_layout(kv, layer.num_kv_heads, layer.head_dim),
            kv_group=kv.group,
            rotary_dim=layer.rotary_dim,
            cos=layer.cos,
            sin=layer.sin,
            q_norm=layer.q_norm,
            k_norm=layer.k_norm,
            qk_norm_eps=layer.qk_norm_eps,
        )
        sink.op(op, [qkv, *buffers(kv)], f"layers.{layer.index}.rotary_store")

    def add_copy_op(self, sink: OpSink, views: list[KVView]) -> None:
        for group in range(len(self._counts)):
            layers = [i for i, view in enumerate(views) if view.group == group]
            caches = [b for i in layers for b in buffers(views[i])]
            swaps = [b for i in layers for b in self._swap_buffers.get(i, ())]
            if caches:
                op = native().copy_blocks(group, bool(swaps))
                sink.op(op, caches + swaps, f"copy_blocks.{group}")

    @property
    def nbytes(self) -> int:
        return self._bytes(self._counts)

    def _bytes(self, counts: Sequence[int]) -> int:
        return sum(n * size for n, size in zip(counts, self._block_bytes, strict=True))
