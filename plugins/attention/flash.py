"""``flash``: tiled attention with online softmax over the paged cache, native."""

from __future__ import annotations

from typing import Any

from pyllmlite.hooks.attention import Attention, AttentionLayer, AttentionNeeds
from pyllmlite.hooks.cache import KVView
from pyllmlite.hooks.sink import OpSink
from pyllmlite.runtime.native import native
from pyllmlite_plugins.layout import buffers, native_layout, unreadable

MAX_SINKS = 256  # what the op takes in one go


class Flash(Attention):
    """Online softmax (Milakov & Gimelshein 2018; Dao 2023) in tiles that stand at absolute
    positions: a token's bits depend neither on how its prompt was cut nor on its neighbours.
    Every head size, GQA and MQA, windows, sinks, ALiBi and soft-caps, over keys and values in f32,
    bf16 or int8 (multiplied as they are kept: in f32, bf16 or integers where the machine has the
    products for it)."""

    name = "flash"
    priority = 50
    reads_sinks = True

    @classmethod
    def supports(cls, need: AttentionNeeds) -> str | None:
        if need.sinks > MAX_SINKS:
            return f"takes at most {MAX_SINKS} sinks, not {need.sinks}"
        return unreadable(need)

    def add_ops(self, sink: OpSink, layer: AttentionLayer, qkv: Any, out: Any, kv: KVView) -> None:
        sinks: dict[str, Any] = {}
        if layer.sinks:
            sinks = {"sinks": layer.sinks, "rotary_dim": layer.rotary_dim}
            sinks |= {"cos": layer.cos, "sin": layer.sin}
        op = native().attention(
            num_heads=layer.num_heads,
            kv=native_layout(kv, layer.num_kv_heads, layer.head_dim),
            kv_group=kv.group,
            scale=layer.scale,
            window=layer.window or 0,
            softcap=layer.softcap,
            alibi_slopes=layer.alibi_slopes,
            **sinks,
        )
        sink.op(op, [qkv, out, *buffers(kv)], f"layers.{layer.index}.attention")
