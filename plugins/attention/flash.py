"""``flash``: tiled attention with online softmax over the paged cache, native."""

from __future__ import annotations

from typing import Any

from pyllmlite.hooks.attention import Attention, AttentionLayer, AttentionNeeds
from pyllmlite.hooks.cache import KVView
from pyllmlite.hooks.sink import OpSink
from pyllmlite.runtime.native import native
from pyllmlite_plugins.layout import buffers, native_layout, unreadable


class Flash(Attention):
    """Online softmax (Milakov & Gimelshein 2018; Dao 2023) in tiles that stand at absolute
    positions: a token's bits depend neither on how its prompt was cut nor on its neighbours.
    Every head size, GQA and MQA, windows, ALiBi and soft-caps, over keys and values in f32, bf16
    or int8 (multiplied as they are kept: in f32, bf16 or integers where the machine has the
    products for it)."""

    name = "flash"
    priority = 50

    @classmethod
    def supports(cls, need: AttentionNeeds) -> str | None:
        return unreadable(need)

    def add_ops(self, sink: OpSink, layer: AttentionLayer, qkv: Any, out: Any, kv: KVView) -> None:
        op = native().attention(
            num_heads=layer.num_heads,
            kv=native_layout(kv, layer.num_kv_heads, layer.head_dim),
            kv_group=kv.group,
            scale=layer.scale,
            window=layer.window or 0,
            softcap=layer.softcap,
            alibi_slopes=layer.alibi_slopes,
        )
        sink.op(op, [qkv, out, *buffers(kv)], f"layers.{layer.index}.attention")
