"""``reference``: attention as the formula has it, in NumPy, over gathered keys and values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from pyllmlite.hooks.attention import Attention, AttentionLayer, AttentionNeeds
from pyllmlite.hooks.cache import KVView
from pyllmlite.hooks.sink import OpSink
from pyllmlite_plugins.layout import buffers, gather, unreadable


class Reference(Attention):
    """A Python op, one sequence and head at a time: slow, exact in float64, and the place to try
    an idea in.  Only by name."""

    name = "reference"
    priority = -10

    @classmethod
    def supports(cls, need: AttentionNeeds) -> str | None:
        return unreadable(need)

    def add_ops(self, sink: OpSink, layer: AttentionLayer, qkv: Any, out: Any, kv: KVView) -> None:
        op = attention_op(layer, kv.group, kv.block_size)
        sink.op(op, [qkv, out, *buffers(kv)], f"layers.{layer.index}.attention")


def attention_op(layer: AttentionLayer, group: int, block_size: int) -> Callable[..., None]:
    """``f(batch, qkv, out, *caches)``: softmax(scale * q.k + bias) . v per query."""
    heads, dim = layer.num_heads, layer.head_dim
    per_kv_head = heads // layer.num_kv_heads

    def attend(batch: Any, qkv: np.ndarray, out: np.ndarray, *caches: np.ndarray) -> None:
        tables = batch.block_table(group)
        starts, lengths = batch.query_start_loc, batch.seq_lens
        for i, length in enumerate(lengths.tolist()):
            first, last = int(starts[i]), int(starts[i + 1])
            positions = np.arange(length - (last - first), length)
            # The window's oldest key; what stands before it may have left the cache.
            low = 0 if layer.window is None else max(0, int(positions[0]) - layer.window + 1)
            keys, values = gather(caches, tables[i], block_size, dim, low, length)
            distance = np.arange(low, length)[None, :] - positions[:, None]  # key - query
            hidden = distance > 0
            if layer.window is not None:
                hidden |= distance <= -layer.window
            for head in range(heads):
                q = qkv[first:last, head * dim : (head + 1) * dim].astype(np.float64)
                scores = layer.scale * (q @ keys[:, head // per_kv_head].T)
                if layer.softcap > 0:
                    scores = layer.softcap * np.tanh(scores / layer.softcap)
                if layer.alibi_slopes is not None:
                    scores += float(layer.alibi_slopes[head]) * distance
                scores[hidden] = -np.inf
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                weights /= weights.sum(axis=1, keepdims=True)
                out[first:last, head * dim : (head + 1) * dim] = (
                    weights @ values[:, head // per_kv_head]
                )

    return attend
