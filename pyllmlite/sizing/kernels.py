"""What this machine's kernels reach, measured one by one on the shapes of a model.

Weights are zeros, but written: no time depends on their values.  Matrices stand in memory as often
as it takes to be read from there and not from a cache, as in a model; the model is not loaded.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from pyllmlite.core.spec import LayerSpec, ModelSpec
from pyllmlite.hooks.attention import AttentionLayer, AttentionNeeds
from pyllmlite.hooks.cache import CacheNeeds, KVGroup, StoreLayer
from pyllmlite.hooks.registry import Registry
from pyllmlite.model.builder import attention_cost
from pyllmlite.model.weights import ExpectedMatrix
from pyllmlite.runtime.native import native
from pyllmlite.runtime.program import ProgramBuilder
from pyllmlite.sizing.footprint import Weights
from pyllmlite.sizing.machine import Machine, last_level_cache
from pyllmlite.sizing.roofline import pairs
from pyllmlite.sizing.steptime import CPU, Curve, Efficiency

# Rows that are timed; times in between are interpolated.
ROWS = (1, 2, 8, 24, 96, 512)
MIN_BYTES = 64 << 20
MAX_COPIES = 64
SECONDS = 0.15  # for each number of rows
RESIDUAL = ("attn_out", "mlp_down")  # kinds whose result is added to the residual stream
ATTENTION_BATCH = 8
ATTENTION_CONTEXT = 512


def measure_kernels(
    spec: ModelSpec, weights: Weights, machine: Machine, pool: Any, kv_dtype: str = "bf16"
) -> Efficiency:
    """The efficiencies of the kernels that a model of this spec would run; takes a few seconds.

    Args:
        machine: Peaks measured just before, which the shares of attention refer to.
        pool: A ``_native.ThreadPool``, the machine's threads.
    """
    curves = linear_curves(weights, pool)
    decode, prefill = attention_seconds(spec, pool, kv_dtype)
    cost = attention_cost(spec, kv_dtype, LayerSpec())
    read = ATTENTION_BATCH * ATTENTION_CONTEXT * cost.context_bytes
    products = pairs(ATTENTION_CONTEXT, ATTENTION_CONTEXT) * cost.context_macs
    return replace(
        CPU,
        curves=curves,
        attention_bandwidth=read / machine.dram_bandwidth / decode,
        attention_macs=products / machine.macs[cost.mac_dtype] / prefill,
        source="this machine's kernels on the model's shapes",
    )


def linear_curves(weights: Weights, pool: Any, rows: tuple[int, ...] = ROWS) -> dict[str, Curve]:
    """Seconds of one call by number of rows, for every kind of matrix whose layout is known."""
    first: dict[str, ExpectedMatrix] = {}
    for matrix in weights.matrices:
        if matrix.allocate is not None:
            first.setdefault(matrix.shape.kind, matrix)
    big = {"embed", "head"}
    layer = [matrix for kind, matrix in first.items() if kind not in big]
    curves: dict[str, Curve] = {}
    groups = [layer] + [[first[kind]] for kind in sorted(big & set(first))]
    for group in groups:
        if group:
            curves |= _time_rows(group, pool, rows)
    if "head" not in curves and "embed" in curves:  # tied: the head is the embedding's matrix
        curves["head"] = curves["embed"]
    return curves


def _time_rows(
    matrices: list[ExpectedMatrix], pool: Any, rows: tuple[int, ...]
) -> dict[str, Curve]:
    size = sum(matrix.nbytes for matrix in matrices)
    enough = max(MIN_BYTES, 2 * last_level_cache())
    copies = min(MAX_COPIES, max(1, -(-enough // size)))
    program = native().Program(max(rows), 1, pool)
    buffers: dict[tuple[str, int], int] = {}

    def buffer(what: str, width: int) -> int:
        if (what, width) not in buffers:
            buffers[what, width] = program.add_buffer(f"{what}{width}", "tokens", width)
        return buffers[what, width]

    for _ in range(copies):
        for matrix in matrices:
            assert matrix.allocate is not None
            n, k = matrix.shape.out_features, matrix.shape.in_features
            arguments = matrix.allocate().op_arguments()
            if matrix.shape.kind in RESIDUAL:
                arguments["residual"] = True
            else:  # what comes out of the residual stream is normed inside the op
                norm = native().NormArgs("rms", 1e-5, np.ones(k, np.float32), None)
                arguments["norm"] = norm
            if matrix.shape.gated:
                arguments |= {"gated": True, "activation": "silu"}
                n //= 2
            op = native().linear(**arguments)
            program.add_op(op, [buffer("in", k), buffer("out", n)], matrix.shape.kind)
    program.finish()
    batch = native().Batch(1, max(rows) + 1, max(rows), 1, 2, 0, [])
    kinds = [matrix.shape.kind for matrix in matrices]
    points: dict[str, list[tuple[int, float]]] = {kind: [] for kind in kinds}
    for count in rows:
        batch.set_step([0], [0], [count], [1])
        program.run(batch)  # first touch
        calls: dict[str, list[float]] = {kind: [] for kind in kinds}
        end = time.perf_counter() + SECONDS
        while not calls[kinds[0]] or time.perf_counter() < end:
            program.set_profiling(True)
            program.run(batch)
            totals = dict.fromkeys(kinds, 0.0)
            for name, _, seconds in program.profile():
                totals[name] += seconds
            for kind in kinds:
                calls[kind].append(totals[kind] / copies)
        program.set_profiling(False)
        for kind in kinds:
            points[kind].append((count, statistics.median(calls[kind])))
    return {kind: tuple(curve) for kind, curve in points.items()}


def attention_seconds(
    spec: ModelSpec,
    pool: Any,
    kv_dtype: str = "bf16",
    batch: int = ATTENTION_BATCH,
    context: int = ATTENTION_CONTEXT,
) -> tuple[float, float]:
    """Seconds of one layer's attention: a decode step of ``batch`` sequences at ``context`` tokens,
    and the prefill of one prompt of ``context`` tokens.  Cache and attention are what ``auto``
    chooses; keys and values are zeros."""
    registry = Registry.load()
    length = context + 16
    one_layer = 2 * 2 * spec.kv_size * context * batch
    layers = min(MAX_COPIES, max(2, -(-max(MIN_BYTES, 2 * last_level_cache()) // one_layer)))
    per_token = 4 * 2 * layers * spec.kv_size
    needs = CacheNeeds(
        device="cpu",
        dtype="f32" if kv_dtype == "f32" else "bf16",
        groups=(KVGroup(tuple(range(layers)), None),),
        num_layers=layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_model_len=length,
        max_rows=batch,
        max_num_batched_tokens=context,
        max_bytes=per_token * length * batch,
        kv_dtype=kv_dtype,
        prefix_caching=False,
    )
    cache = registry.select("cache", None, needs).cls(needs)
    wanted = AttentionNeeds(
        device="cpu",
        dtype=needs.dtype,
        head_dim=spec.head_dim,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        kv_layout=cache.layout,
        kv_dtype=cache.kv_dtype,
        block_size=cache.block_size,
        alibi=False,
        softcap=spec.attention_softcap > 0,
        window=False,
    )
    attention = registry.select("attention", None, wanted).cls()
    sink = ProgramBuilder(context, batch, pool)
    views = cache.add_tensors(sink)
    qkv = sink.buffer("qkv", spec.q_size + 2 * spec.kv_size)
    out = sink.buffer("out", spec.q_size)
    names = set()
    for i, view in enumerate(views):
        heads = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
        cache.add_store_op(sink, StoreLayer(i, *heads, 0, None, None, None, None, 0.0), qkv, view)
        before = len(sink.entries)
        attention.add_ops(
            sink,
            AttentionLayer(i, *heads, spec.scale, None, spec.attention_softcap, None),
            qkv,
            out,
            view,
        )
        names |= {entry.name for entry in sink.entries[before:]}
    program = sink.finish()
    state = native().Batch(
        batch, length, context, batch, 2, 0, [(cache.block_size, t) for t in cache.block_tables]
    )
    zeros = np.zeros(context, int).tolist()
    for row in range(batch):
        cache.acquire(row, row, zeros)
        assert cache.reserve(row, context + 1)
    every = list(range(batch))

    def one(rows: list[int], starts: list[int], counts: list[int]) -> float:
        state.set_step(rows, starts, counts, [1] * len(rows))
        return _median(lambda: _named(program, state, names)) / layers

    for row in every[1:]:  # writes their keys and values
        state.set_step([row], [0], [context], [1])
        program.run(state)
    prefill = one([0], [0], [context])
    return one(every, [context - 1] * batch, [1] * batch), prefill


def _named(program: Any, batch: Any, names: set[str]) -> float:
    program.set_profiling(True)
    program.run(batch)
    seconds = sum(s for name, _, s in program.profile() if name in names)
    program.set_profiling(False)
    return seconds


def _median(call: Callable[[], float], seconds: float = SECONDS) -> float:
    call()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while not found or time.perf_counter() < end:
        found.append(call())
    return statistics.median(found)
