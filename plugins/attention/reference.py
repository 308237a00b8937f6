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
    reads_sinks = True

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
            sinks, inside = 0, positions
            if layer.sinks and layer.window is not None:
                # Keys by themselves, for those queries whose window begins behind them; a query
                # meets them at its position within the cache.
                sinks = min(layer.sinks, length)
                inside = np.minimum(positions, layer.sinks + layer.window - 1)
                at = np.arange(sinks)[None, :]
                first_keys, first_values = gather(caches, tables[i], block_size, dim, 0, sinks)
                keys = np.concatenate([first_keys, keys])
                values = np.concatenate([first_values, values])
                hidden = np.concatenate([at > positions[:, None] - layer.window, hidden], axis=1)
                distance = np.concatenate([at - inside[:, None], distance], axis=1)
            for head in range(heads):
                q = qkv[first:last, head * dim : (head + 1) * dim].astype(np.float64)
                k = keys[:, head // per_kv_head]
                scores = q @ k.T
                if sinks:
                    scores[:, :sinks] = turn_back(q, positions - inside, layer) @ k[:sinks].T
                scores *= layer.scale
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


def turn_back(q: np.ndarray, by: np.ndarray, layer: AttentionLayer) -> np.ndarray:
    """Queries ``[tokens, head_dim]``, rotated at their positions, as they would be ``by[i]``
    positions earlier."""
    if not layer.rotary_dim:
        return q
    assert layer.cos is not None and layer.sin is not None
    half = layer.rotary_dim // 2
    # Tables may carry a factor (YaRN), which the row of position 0 shows.
    cos, sin = (table[by] / layer.cos[0].astype(np.float64) for table in (layer.cos, layer.sin))
    first, second = q[:, :half], q[:, half : 2 * half]
    turned = [first * cos + second * sin, second * cos - first * sin, q[:, 2 * half :]]
    return np.concatenate(turned, axis=1)
