"""The attention op beside the machine's measured peaks: decode over the context, and prefill.

    python benchmarks/bench_attention.py [--shapes smollm2,1b] [--dtypes bf16,int8] [--threads 2]
    python benchmarks/bench_attention.py --shapes 32x8x128 --contexts 1024-16384 --batches 1
    python benchmarks/bench_attention.py --only prefill --prefill 1024 --dtypes bf16

Decode: for every shape (heads x KV heads x head size), batch and context the time of one layer, the
bytes of K and V (and scales) that it must read, GB/s, and the share of the bandwidth that the same
threads read memory with, measured right before and after.  As many layers run one after the other
as it takes for their KV not to stay in the last-level cache, as in a model.  At the end the line
through the times of a shape, batch and dtype, seconds = fixed + bytes / slope, and how far the
times lie from it: attention that waits for memory alone is such a line at the memory's bandwidth.

Prefill: GMAC/s of exactly the (query, key) pairs that are visible, and the share of the peak of the
dtype that is multiplied (int8 KV: 16-bit queries and weights, two products each).  Dtypes of a case
run in turn and the best call of each counts, so that they meet the same machine.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass

import numpy as np

from pyllmlite import _native
from pyllmlite.sizing import Machine, dram_bandwidth, measure_machine
from pyllmlite_plugins.layout import allocate, block_bytes

SHAPES = {"smollm2": (9, 3, 64), "1b": (32, 8, 64), "8b": (32, 8, 128)}
MOST_LAYERS = 256
MOST_BYTES = 6 << 30


@dataclass(frozen=True)
class Shape:
    name: str
    heads: int
    kv_heads: int
    head_dim: int

    def token_bytes(self, dtype: str, block_size: int) -> float:
        """Of K, V and scales of one token in one layer."""
        return block_bytes(self.kv_heads, self.head_dim, block_size, dtype) / block_size


class Case:
    """Some layers' attention as the ops of one Program: ``seqs`` sequences of ``context`` tokens,
    the last ``queries`` of each asking."""

    def __init__(
        self, shape: Shape, dtype: str, seqs: int, context: int, queries: int, layers: int,
        block_size: int, pool: _native.ThreadPool,
    ) -> None:  # fmt: skip
        rng = np.random.default_rng(0)
        columns = -(-context // block_size)
        table = rng.permutation(seqs * columns).astype(np.int32).reshape(seqs, columns)
        tokens, self.layers = seqs * queries, layers
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_dim
        self.program = _native.Program(tokens, 1, pool)
        qkv = self.program.add_buffer("qkv", "tokens", width)
        out = self.program.add_buffer("out", "tokens", shape.heads * shape.head_dim)
        size = (seqs * columns, shape.kv_heads, shape.head_dim, block_size, dtype)
        layout = _native.KVLayout(
            dtype, seqs * columns, shape.kv_heads, shape.head_dim, block_size
        )
        # All layers in one array: as large as an engine's, and so in huge pages.
        arrays = allocate(layers * size[0], *size[1:])
        for array in arrays.values():
            fill(rng, array)
        for i in range(layers):
            ids = []
            for name, array in arrays.items():
                part = array[i * size[0] : (i + 1) * size[0]]
                word = "f32" if name == "scales" else dtype
                ids.append(self.program.add_tensor(f"{i}.{name}", part, word))
            op = _native.attention(shape.heads, layout, scale=shape.head_dim**-0.5)
            self.program.add_op(op, [qkv, out, *ids], "attention")
        self.program.finish()
        self.program.buffer(qkv)[:] = rng.standard_normal((tokens, width), np.float32)
        self.batch = _native.Batch(
            seqs, context, tokens, 1, 10, 1, [(block_size, table)]
        )
        self.batch.set_step(
            range(seqs), [context - queries] * seqs, [queries] * seqs, [0] * seqs
        )
        self.times: list[float] = []
        self.program.run(self.batch)

    def call(self) -> None:
        start = time.perf_counter()
        self.program.run(self.batch)
        self.times.append((time.perf_counter() - start) / self.layers)


def fill(rng: np.random.Generator, array: np.ndarray) -> None:
    """Values of about 1, the same ones every few hundred thousand."""
    flat = array.reshape(-1)
    count = min(flat.size, 1 << 18)
    if array.dtype == np.int8:
        some = rng.integers(-127, 128, count).astype(np.int8)
    else:
        some = rng.standard_normal(count, np.float32)
        if array.ndim == 4 and array.shape[2] == 2 and array.dtype == np.float32:
            some = np.abs(some) / 127
        if array.dtype == np.uint16:  # bf16 bits
            some = (some.view(np.uint32) >> 16).astype(np.uint16)
    for first in range(0, flat.size, count):
        flat[first : first + count] = some[: flat.size - first]


def in_turn(cases: list[Case], seconds: float) -> None:
    end = time.perf_counter() + seconds * len(cases)
    while True:
        for case in cases:
            case.call()
        if time.perf_counter() >= end:
            return


def decode(args: argparse.Namespace, machine: Machine, pool: _native.ThreadPool) -> None:
    """A table, and the line through every shape's, batch's and dtype's times."""
    for shape in args.shapes:
        for batch in args.batches:
            points: dict[str, list[tuple[float, float]]] = {dtype: [] for dtype in args.dtypes}
            bandwidths = []
            for context in args.contexts:
                sizes = [
                    batch * context * shape.token_bytes(dtype, args.block_size)
                    for dtype in args.dtypes
                ]
                cases = []
                for dtype, size in zip(args.dtypes, sizes, strict=True):
                    apart = 4 * machine.cache_bytes / size
                    layers = int(min(max(2, apart), MOST_LAYERS, max(1, MOST_BYTES / size)))
                    cases.append(
                        Case(shape, dtype, batch, context, 1, layers, args.block_size, pool)
                    )
                bandwidth = dram_bandwidth(pool)
                in_turn(cases, args.seconds)
                bandwidth = max(bandwidth, dram_bandwidth(pool))
                bandwidths.append(bandwidth)
                for dtype, size, case in zip(args.dtypes, sizes, cases, strict=True):
                    best, middle = min(case.times), float(np.median(case.times))
                    points[dtype].append((size, best))
                    print(
                        f"decode  {shape.name:<8} {batch:2d} x {context:5d}  {dtype:<5}"
                        f"{case.layers:4d} layers {size / 1e6:8.2f} MB "
                        f"{best * 1e6:9.1f} us (median {middle * 1e6:9.1f}) "
                        f"{size / best / 1e9:6.1f} GB/s, {size / best / bandwidth:4.0%} of "
                        f"{bandwidth / 1e9:.1f}",
                        flush=True,
                    )
            for dtype, pairs in points.items():
                if len(pairs) > 2:
                    print(line(f"{shape.name} batch {batch} {dtype}", pairs, max(bandwidths)))


def line(what: str, points: list[tuple[float, float]], bandwidth: float) -> str:
    """Least squares of (bytes, seconds), each point weighted by 1 / seconds."""
    sizes, seconds = np.array(points).T
    weights = 1 / seconds
    columns = np.stack([np.ones_like(sizes), sizes], axis=1)
    (fixed, slope), *_ = np.linalg.lstsq(columns * weights[:, None], seconds * weights, rcond=None)
    off = np.abs((columns @ (fixed, slope) - seconds) / seconds).max()
    return (
        f"  line of {what}: {fixed * 1e6:.1f} us + bytes at {1 / slope / 1e9:.1f} GB/s "
        f"({1 / slope / bandwidth:.0%} of {bandwidth / 1e9:.1f}), every time within {off:.0%} of it"
    )


def prefill(args: argparse.Namespace, machine: Machine, pool: _native.ThreadPool) -> None:
    for shape in args.shapes:
        for tokens in args.prefill:
            cases = [
                Case(shape, dtype, 1, tokens, tokens, 2, args.block_size, pool)
                for dtype in args.dtypes
            ]
            in_turn(cases, args.seconds)
            macs = tokens * (tokens + 1) * shape.heads * shape.head_dim
            for dtype, case in zip(args.dtypes, cases, strict=True):
                rate = macs / min(case.times)
                peak = machine.macs[dtype] / (2 if dtype == "int8" else 1)
                print(
                    f"prefill {shape.name:<8} {tokens:5d} tokens {dtype:<5}"
                    f"{min(case.times) * 1e3:9.3f} ms a layer "
                    f"(median {np.median(case.times) * 1e3:9.3f}) "
                    f"{rate / 1e9:6.1f} GMAC/s, {rate / peak:4.0%} of {peak / 1e9:.0f}",
                    flush=True,
                )


def parse_shapes(text: str) -> list[Shape]:
    """Names of SHAPES, or HEADSxKV_HEADSxHEAD_DIM, with commas between."""
    shapes = []
    for part in text.split(","):
        try:
            heads, kv_heads, head_dim = SHAPES.get(part) or map(int, part.split("x"))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{part!r} is neither HEADSxKV_HEADSxHEAD_DIM nor one of {', '.join(SHAPES)}"
            ) from None
        shapes.append(Shape(part, heads, kv_heads, head_dim))
    return shapes


def parse_counts(text: str) -> list[int]:
    """``1,8``, or ``512-8192``: doubling from one to the other."""
    first, dash, last = text.partition("-")
    if not dash:
        return [int(part) for part in text.split(",")]
    counts = [int(first)]
    while counts[-1] * 2 <= int(last):
        counts.append(counts[-1] * 2)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=parse_shapes, default="smollm2,1b")
    parser.add_argument("--dtypes", default="bf16,int8", help="of f32, bf16, int8")
    parser.add_argument("--batches", type=parse_counts, default="1,8")
    parser.add_argument("--contexts", type=parse_counts, default="1024-8192")
    parser.add_argument("--prefill", type=parse_counts, default="256,1024,4096")
    parser.add_argument("--only", choices=["decode", "prefill"])
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=0.4, help="per measurement")
    parser.add_argument("--isa", help="see `pyllmlite info`")
    args = parser.parse_args()
    args.dtypes = args.dtypes.split(",")
    if args.isa:
        _native.set_isa(args.isa)
    pool = _native.ThreadPool(args.threads)
    machine = measure_machine(pool=pool)
    print(machine)
    if args.only != "prefill":
        decode(args, machine, pool)
    if args.only != "decode":
        prefill(args, machine, pool)


if __name__ == "__main__":
    main()
