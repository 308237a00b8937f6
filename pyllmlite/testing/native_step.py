"""A cache and an attention in a native Program without a model, beside dense NumPy attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyllmlite.hooks.attention import AttentionLayer, AttentionNeeds
from pyllmlite.hooks.cache import CacheNeeds, KVGroup, StoreLayer
from pyllmlite.hooks.registry import Registry
from pyllmlite.runtime.native import native
from pyllmlite.runtime.program import ProgramBuilder

MAX_TOKENS = 64
MAX_ROWS = 4


@dataclass(frozen=True)
class HeadShape:
    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass
class Positional:
    """What bends the scores: a soft-cap, ALiBi slopes, rotary tables."""

    softcap: float = 0.0
    alibi_slopes: np.ndarray | None = None
    rotary_dim: int = 0
    cos: np.ndarray | None = None
    sin: np.ndarray | None = None


class NativeStep:
    """One layer per window: store, then attention, in a Program over a real cache.

    Args:
        cache, attention: Strategy classes; None: what ``auto`` chooses.
    Raises:
        PluginError: The two do not fit together, or not the shape.
    """

    def __init__(
        self,
        cache: type[Any] | None,
        attention: type[Any] | None,
        shape: HeadShape,
        windows: Sequence[int | None],
        positional: Positional,
        dtype: str,
        max_model_len: int = 256,
        threads: int = 1,
        sinks: int = 0,
    ) -> None:
        registry = Registry.load()
        groups = tuple(dict.fromkeys(windows))
        item = 4 if dtype == "f32" else 2
        needs = CacheNeeds(
            device="cpu",
            dtype=dtype,
            groups=tuple(
                KVGroup(
                    tuple(i for i, w in enumerate(windows) if w == group),
                    group,
                    0 if group is None else sinks,
                )
                for group in groups
            ),
            num_layers=len(windows),
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            max_model_len=max_model_len,
            max_rows=MAX_ROWS,
            max_num_batched_tokens=MAX_TOKENS,
            max_bytes=(max_model_len + 16)
            * MAX_ROWS
            * 2
            * shape.num_kv_heads
            * shape.head_dim
            * item
            * len(windows),
        )
        self.cache = registry.select("cache", cache, needs).cls(needs)
        attention_needs = AttentionNeeds(
            device="cpu",
            dtype=dtype,
            head_dim=shape.head_dim,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            kv_layout=self.cache.layout,
            kv_dtype=self.cache.kv_dtype,
            block_size=self.cache.block_size,
            window=any(w is not None for w in windows),
            alibi=positional.alibi_slopes is not None,
            softcap=positional.softcap > 0,
            sinks=max(group.sinks for group in needs.groups),
        )
        made = registry.select("attention", attention, attention_needs).cls()
        sink = ProgramBuilder(MAX_TOKENS, MAX_ROWS, native().ThreadPool(threads))
        views = self.cache.add_tensors(sink)
        assert [v.group for v in views] == [groups.index(w) for w in windows], "views out of order"
        self.cache.add_copy_op(sink, views)
        self._buffers = []
        for i, (view, window) in enumerate(zip(views, windows, strict=True)):
            assert (view.layout, view.dtype) == (self.cache.layout, self.cache.kv_dtype)
            qkv = sink.buffer(f"qkv.{i}", shape.width)
            out = sink.buffer(f"out.{i}", shape.num_heads * shape.head_dim)
            store = StoreLayer(
                i,
                shape.num_heads,
                shape.num_kv_heads,
                shape.head_dim,
                positional.rotary_dim,
                positional.cos,
                positional.sin,
                None,
                None,
                1e-6,
            )
            layer = AttentionLayer(
                i,
                shape.num_heads,
                shape.num_kv_heads,
                shape.head_dim,
                shape.head_dim**-0.5,
                window,
                positional.softcap,
                positional.alibi_slopes,
                positional.rotary_dim,
                positional.cos,
                positional.sin,
                0 if window is None else sinks,
            )
            self.cache.add_store_op(sink, store, qkv, view)
            made.add_ops(sink, layer, qkv, out, view)
            self._buffers.append((qkv.id, out.id))
        self._program = sink.finish()
        self._batch = native().Batch(
            MAX_ROWS,
            max_model_len,
            MAX_TOKENS,
            MAX_ROWS,
            16,
            0,
            [(self.cache.block_size, table) for table in self.cache.block_tables],
        )

    def run(self, parts: Sequence[tuple[int, int, np.ndarray]]) -> list[list[np.ndarray]]:
        """``(row, start, qkv [layers, tokens, width])`` per sequence; out per sequence, layer."""
        native_program = self._program.native
        rows = [row for row, _, _ in parts]
        counts = [qkv.shape[1] for _, _, qkv in parts]
        self._batch.set_step(rows, [start for _, start, _ in parts], counts, [1] * len(parts))
        for group in range(len(self.cache.block_tables)):
            copies = self.cache.take_copies(group)
            if copies:
                self._batch.set_copies(group, copies)
        total = sum(counts)
        for layer, (qkv_id, out_id) in enumerate(self._buffers):
            flat = np.concatenate([qkv[layer] for _, _, qkv in parts])
            native_program.buffer(qkv_id)[:total] = flat
            native_program.buffer(out_id)[:] = np.nan
        self._program.run(self._batch)
        ends = np.cumsum(counts)
        return [
            [
                native_program.buffer(out_id)[end - count : end].copy()
                for _, out_id in self._buffers
            ]
            for end, count in zip(ends, counts, strict=True)
        ]


def dense_attention(
    qkv: np.ndarray,
    shape: HeadShape,
    window: int | None,
    positional: Positional,
    dtype: str,
    sinks: int = 0,
) -> np.ndarray:
    """The formula, in float64: ``qkv [tokens, width]`` of one whole sequence to ``out``.

    With sinks as StreamingLLM has it (Xiao et al. 2023, section 3.2): a query's keys are those that
    a cache of ``sinks`` and ``window`` tokens holds, and both are rotated at their places in it.
    """
    if sinks and window is not None:
        out = np.empty((len(qkv), shape.num_heads * shape.head_dim))
        for t in range(len(qkv)):
            low = max(0, t - window + 1)
            held = [*range(min(sinks, low)), *range(low, t + 1)]
            out[t] = dense_attention(qkv[held], shape, None, positional, dtype)[-1]
        return out
    tokens, heads, kv_heads, dim = len(qkv), shape.num_heads, shape.num_kv_heads, shape.head_dim
    parts = qkv.astype(np.float64).reshape(tokens, heads + 2 * kv_heads, dim)
    q, k, v = parts[:, :heads], parts[:, heads : heads + kv_heads], parts[:, heads + kv_heads :]
    if positional.rotary_dim:
        q, k = _rotated(q, positional), _rotated(k, positional)
    if dtype == "bf16":
        k, v = _as_bf16(k), _as_bf16(v)
    if dtype == "int8":
        k, v = _as_int8(k), _as_int8(v)
    distance = np.arange(tokens)[None, :] - np.arange(tokens)[:, None]
    hidden = distance > 0
    if window is not None:
        hidden = hidden | (distance <= -window)
    out = np.empty((tokens, heads, dim))
    for head in range(heads):
        kv_head = head // (heads // kv_heads)
        scores = dim**-0.5 * q[:, head] @ k[:, kv_head].T
        if positional.softcap > 0:
            scores = positional.softcap * np.tanh(scores / positional.softcap)
        if positional.alibi_slopes is not None:
            scores = scores + float(positional.alibi_slopes[head]) * distance
        scores = np.where(hidden, -np.inf, scores)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, kv_head]
    return out.reshape(tokens, heads * dim)


def check_against_dense(
    cache: type[Any] | None,
    attention: type[Any] | None,
    shape: HeadShape,
    windows: Sequence[int | None],
    softcap: float = 0.0,
    alibi: bool = False,
    dtype: str = "f32",
    rotary_dim: int = 0,
    threads: int = 2,
    tolerance: float | None = None,
    sinks: int = 0,
) -> None:
    """Three sequences in ragged steps (chunks, decode, a fork in mid-block, one that ends and
    another on its row), each step's output beside dense attention over the whole sequence."""
    rng = np.random.default_rng(3)
    positional = Positional(softcap, None, rotary_dim)
    if alibi:
        positional.alibi_slopes = (2.0 ** -np.arange(1, shape.num_heads + 1)).astype(np.float32)
    if rotary_dim:
        angle = np.arange(256)[:, None] * 100.0 ** -np.linspace(0, 1, rotary_dim // 2)
        positional.cos = np.cos(angle).astype(np.float32)
        positional.sin = np.sin(angle).astype(np.float32)
    step = NativeStep(
        cache, attention, shape, windows, positional, dtype, threads=threads, sinks=sinks
    )
    stored = step.cache.kv_dtype
    if tolerance is None:
        tolerance = {"f32": 2e-5, "bf16": 2e-2, "int8": 2e-2}.get(stored, 5e-2)
    known: dict[int, np.ndarray] = {}
    tokens: dict[int, list[int]] = {}
    rows: dict[int, int] = {}
    computed: dict[int, int] = {}

    def begin(seq: int, row: int, length: int) -> None:
        tokens[seq] = [1000 * seq + i for i in range(length)]  # nothing in common
        rows[seq], computed[seq] = row, 0
        shape_of = (len(windows), length, shape.width)
        known[seq] = rng.standard_normal(shape_of).astype(np.float32)
        assert step.cache.acquire(seq, row, tokens[seq]) == 0

    def run(*pieces: tuple[int, int]) -> None:
        for seq, count in pieces:
            assert step.cache.reserve(seq, computed[seq] + count)
        outs = step.run(
            [
                (rows[s], computed[s], known[s][:, computed[s] : computed[s] + n])
                for s, n in pieces
            ]
        )
        for (seq, count), layers in zip(pieces, outs, strict=True):
            first = computed[seq]
            computed[seq] = first + count
            step.cache.commit(seq, tokens[seq], computed[seq])
            for layer, (window, got) in enumerate(zip(windows, layers, strict=True)):
                history = known[seq][layer, : computed[seq]]
                want = dense_attention(history, shape, window, positional, stored, sinks)[first:]
                worst = np.abs(got - want).max() if np.isfinite(got).all() else np.nan
                assert worst <= tolerance, (
                    f"layer {layer}, tokens {first}..{computed[seq] - 1} of sequence {seq}: off by "
                    f"{worst:.3g} ({shape}, window {window}, softcap {softcap}, alibi {alibi}, "
                    f"rotary {rotary_dim}, sinks {sinks}, {stored})"
                )

    begin(1, 0, 90)
    run((1, 33))
    begin(2, 2, 50)
    run((1, 1), (2, 17))
    run((2, 1), (1, 30))
    step.cache.fork(1, 3, 1)
    rows[3], computed[3] = 1, computed[1]
    tokens[3] = tokens[1][: computed[1]] + [5] * 26
    known[3] = known[1].copy()
    known[3][:, computed[1] :] = rng.standard_normal(known[3][:, computed[1] :].shape)
    run((3, 1), (1, 1), (2, 16))
    run((3, 20), (1, 20), (2, 16))
    step.cache.free(1)
    begin(4, 0, 40)
    run((3, 1), (4, 40))
    step.cache.check_integrity()


def _rotated(x: np.ndarray, positional: Positional) -> np.ndarray:
    """Half-split pairs (Su et al. 2021, as in GPT-NeoX)."""
    half = positional.rotary_dim // 2
    assert positional.cos is not None and positional.sin is not None
    cos = positional.cos[: len(x), None].astype(np.float64)
    sin = positional.sin[: len(x), None].astype(np.float64)
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = [first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]]
    return np.concatenate(turned, axis=-1)


def _as_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32).astype(np.float64)


def _as_int8(x: np.ndarray) -> np.ndarray:
    """Symmetric, a scale per token and head."""
    scales = np.abs(x).max(axis=-1, keepdims=True) / 127
    return np.rint(x / scales) * scales
