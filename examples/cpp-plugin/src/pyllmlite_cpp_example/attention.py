from __future__ import annotations

from typing import Any

from pyllmlite.hooks.attention import Attention, AttentionLayer, AttentionNeeds
from pyllmlite.hooks.cache import KVView
from pyllmlite.hooks.sink import OpSink
from pyllmlite_cpp_example import _ops


class CppAttention(Attention):
    """One query at a time, online softmax, over the built-in layout in f32."""

    name = "cpp-example"
    priority = -1  # only by name

    @classmethod
    def supports(cls, need: AttentionNeeds) -> str | None:
        if need.device != "cpu":
            return f"runs on the CPU, not on {need.device!r}"
        if (need.kv_layout, need.kv_dtype) != ("paged-kt", "f32"):
            return f"reads 'paged-kt' in f32, not {need.kv_layout!r} in {need.kv_dtype}"
        return None

    def add_ops(self, sink: OpSink, layer: AttentionLayer, qkv: Any, out: Any, kv: KVView) -> None:
        slopes = layer.alibi_slopes
        op = _ops.attention(
            num_heads=layer.num_heads,
            num_kv_heads=layer.num_kv_heads,
            head_dim=layer.head_dim,
            block_size=kv.block_size,
            kv_group=kv.group,
            scale=layer.scale,
            window=layer.window or 0,
            softcap=layer.softcap,
            alibi_slopes=[] if slopes is None else slopes.tolist(),
        )
        sink.op(op, [qkv, out, kv.k, kv.v], f"layers.{layer.index}.attention")
