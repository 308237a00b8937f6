"""The linear op per weight format, beside the machine's measured peaks.

    python benchmarks/bench_linear.py [--shapes smollm2] [--rows 1,4,16,64,256,1024]
    python benchmarks/bench_linear.py --shapes llama3-8b --rows 1-1024 --check
    python benchmarks/bench_linear.py --shapes 4096x4096,down=4096x14336 --formats int4 --json

For every layer shape, number of rows and format: the time of one call, GB/s of packed weights read
(and its share of the bandwidth at that time), GMAC/s (and its share of the peak of the dtype that
is multiplied; a multiply-accumulate is two operations).  Formats of a shape and number of rows are
called in turn and the best call of each counts, so that they meet the same machine.  Weights stand
in memory as often as it takes to be read from there and not from a cache, as in a model;
``--cached``: once.

``x int8``: rows are quantized to int8 inside the op; ``x bf16``: they are rounded to bf16;
``x float``: they stay floats.  ``--check`` prints every case in which int4 with int8 or bf16 rows
is slower than bf16 weights (by more than ``--tolerance``), and ends with status 1 if any.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from pyllmlite import _native
from pyllmlite.sizing import Machine, dram_bandwidth, measure_machine

SHAPES = {
    "smollm2": {
        "qkv": (960, 576),
        "attn_out": (576, 576),
        "gate_up": (3072, 576),
        "mlp_down": (576, 1536),
        "head": (49152, 576),
    },
    "1b": {
        "qkv": (3072, 2048),
        "attn_out": (2048, 2048),
        "gate_up": (16384, 2048),
        "mlp_down": (2048, 8192),
        "head": (49152, 2048),
    },
    "llama3-8b": {
        "qkv": (6144, 4096),
        "attn_out": (4096, 4096),
        "gate_up": (28672, 4096),
        "mlp_down": (4096, 14336),
        "head": (128256, 4096),
    },
}
CHUNK_ROWS = 512  # weights are made and packed in pieces of so many rows
MOST_COPIES = 512


@dataclass(frozen=True)
class Format:
    """A weight format with or without minima, and what rows become: int8, bf16 or float."""

    name: str
    weight: str
    group: int
    mins: bool
    rows: str

    @property
    def mac_dtype(self) -> str:
        return "f32" if self.rows == "float" else self.rows

    @property
    def op_arguments(self) -> dict[str, bool]:
        own = self.weight != "bf16"  # which rounds its rows by itself
        return {
            "int8_activations": self.rows == "int8",
            "bf16_activations": self.rows == "bf16" and own,
        }


def all_formats() -> list[Format]:
    formats = [Format("f32", "f32", 0, False, "float"), Format("bf16", "bf16", 0, False, "bf16")]
    for rows in ("int8", "bf16", "float"):
        formats.append(Format(f"int8 x {rows}", "int8", 0, False, rows))
        formats.append(Format(f"int8 g32 x {rows}", "int8", 32, False, rows))
        for group in (32, 64, 128):
            for mins in (False, True):
                name = f"int4 g{group}{' mins' if mins else ''} x {rows}"
                formats.append(Format(name, "int4", group, mins, rows))
        if rows != "int8":
            formats.append(Format(f"nf4 g64 x {rows}", "codebook4", 64, False, rows))
    return formats


def make_weight(
    rng: np.random.Generator, fmt: str, n: int, k: int, group: int, mins: bool
) -> _native.PackedLinear:
    """A packed ``[n, k]`` matrix; its values repeat every few hundred rows."""
    codebook = np.linspace(-1, 1, 16, dtype=np.float32) if fmt == "codebook4" else None
    packed = _native.PackedLinear.empty(fmt, n, k, group, mins, codebook=codebook)
    rows = min(n, CHUNK_ROWS)
    scales = None
    if fmt in ("f32", "bf16"):
        values: Any = rng.standard_normal((rows, k), np.float32)
    else:
        values = rng.integers(0, 128 if fmt == "int8" else 16, (rows, k), np.uint8)
        values = values.view(np.int8) if fmt == "int8" else values
        scales = np.full((rows, -(-k // (group or k))), 0.01, np.float16)
    for first in range(0, n, rows):
        count = min(rows, n - first)
        some = None if scales is None else scales[:count]
        packed.set_rows(first, values[:count], some, some if mins else None)
    return packed


class Bench:
    """Some copies of a weight as the ops of one Program, ready to be timed."""

    def __init__(
        self,
        weights: list[_native.PackedLinear],
        op_arguments: dict[str, bool],
        rows: int,
        pool: _native.ThreadPool,
    ) -> None:
        n, k = weights[0].shape
        self.copies = len(weights)
        self.program = _native.Program(rows, 1, pool)
        x = self.program.add_buffer("x", "tokens", k)
        out = self.program.add_buffer("out", "tokens", n)
        for weight in weights:
            self.program.add_op(_native.linear(weight, **op_arguments), [x, out], "linear")
        self.program.finish()
        self.program.buffer(x)[:] = np.random.default_rng(1).standard_normal((rows, k), np.float32)
        self.batch = _native.Batch(1, rows + 1, rows, 1, 2, 0, [])
        self.batch.set_step([0], [0], [rows], [1])
        self.best = float("inf")
        self.program.run(self.batch)

    def call(self) -> None:
        start = time.perf_counter()
        self.program.run(self.batch)
        self.best = min(self.best, (time.perf_counter() - start) / self.copies)


def time_op(
    weight: _native.PackedLinear, int8: bool, rows: int, pool: _native.ThreadPool, seconds: float
) -> float:
    """Seconds of the best call with one weight, over about ``seconds``."""
    return in_turn([Bench([weight], {"int8_activations": int8}, rows, pool)], seconds)[0]


def in_turn(benches: list[Bench], seconds: float) -> list[float]:
    """Best seconds of one op of each, over about ``seconds`` for each."""
    end = time.perf_counter() + seconds * len(benches)
    while True:
        for bench in benches:
            bench.call()
        if time.perf_counter() >= end:
            return [bench.best for bench in benches]


@dataclass(frozen=True)
class Result:
    shape: str
    n: int
    k: int
    rows: int
    format: str
    copies: int
    seconds: float
    bytes_per_s: float
    macs_per_s: float
    bandwidth_share: float
    peak_share: float

    def __str__(self) -> str:
        return (
            f"{self.shape:<9} {self.n}x{self.k:<6} rows {self.rows:<5}{self.format:<22}"
            f"{self.seconds * 1e6:11.1f} us {self.bytes_per_s / 1e9:7.1f} GB/s "
            f"{self.bandwidth_share:5.0%} "
            f"{self.macs_per_s / 1e9:7.1f} GMAC/s {self.peak_share:5.0%}"
        )


def measure_shape(
    args: argparse.Namespace, name: str, shape: tuple[int, int], formats: list[Format],
    machine: Machine, pool: _native.ThreadPool, progress: Progress,
) -> list[Result]:
    """All formats and numbers of rows of one shape; results are printed as they come."""
    n, k = shape
    rng = np.random.default_rng(0)
    weights: list[list[_native.PackedLinear]] = []
    bar = progress.add_task(f"{name} {n}x{k}: packing", total=len(formats) + len(args.rows))
    for fmt in formats:
        arguments = (fmt.weight, n, k, fmt.group, fmt.mins)
        made = [make_weight(rng, *arguments)]
        apart = 1 if args.cached else -(-4 * machine.cache_bytes // made[0].nbytes)
        while len(made) < min(apart, MOST_COPIES):
            made.append(make_weight(rng, *arguments))
        weights.append(made)
        progress.advance(bar)
    results = []
    for rows in args.rows:
        progress.update(bar, description=f"{name} {n}x{k}: {rows} rows")
        # Many rows make one op last: arithmetic, not memory, is then what is timed.
        benches = [
            Bench(made[: max(1, len(made) // max(1, rows // 64))], fmt.op_arguments, rows, pool)
            for fmt, made in zip(formats, weights, strict=True)
        ]
        bandwidth = dram_bandwidth(pool)
        best = in_turn(benches, args.seconds)
        bandwidth = max(bandwidth, dram_bandwidth(pool))
        for fmt, made, bench, seconds in zip(formats, weights, benches, best, strict=True):
            read, macs = made[0].nbytes / seconds, rows * n * k / seconds
            shares = (read / bandwidth, macs / machine.macs[fmt.mac_dtype])
            one = Result(name, n, k, rows, fmt.name, bench.copies, seconds, read, macs, *shares)
            results.append(one)
            if not args.json:
                progress.console.print(str(one), highlight=False)
        progress.advance(bar)
    progress.remove_task(bar)
    return results


def slower_than_bf16(results: list[Result], tolerance: float) -> list[str]:
    """Every int4 case with int8 or bf16 rows that takes longer than bf16 weights at the same shape
    and rows, and more than ``tolerance`` times it besides."""
    bf16 = {(one.shape, one.rows): one.seconds for one in results if one.format == "bf16"}
    lines = []
    for one in results:
        if not one.format.startswith("int4") or one.format.endswith("x float"):
            continue
        limit = bf16.get((one.shape, one.rows))
        if limit is not None and one.seconds > limit * (1 + tolerance):
            lines.append(
                f"{one.shape} {one.n}x{one.k}, {one.rows} rows: {one.format} takes "
                f"{one.seconds * 1e6:.1f} us, bf16 {limit * 1e6:.1f} us "
                f"({one.seconds / limit:.2f} times as long)"
            )
    return lines


def parse_shapes(text: str) -> dict[str, tuple[int, int]]:
    """A model's name, or ``NxK`` and ``name=NxK``, with commas between."""
    if text in SHAPES:
        return SHAPES[text]
    shapes = {}
    try:
        for part in text.split(","):
            name, _, size = part.rpartition("=")
            n, k = map(int, size.split("x"))
            shapes[name or size] = (n, k)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither NxK,... nor one of {', '.join(SHAPES)}"
        ) from None
    return shapes


def parse_rows(text: str) -> list[int]:
    """``1,4,16``, or ``1-1024``: the powers of two from one to the other."""
    try:
        if "-" in text:
            first, last = map(int, text.split("-"))
            rows = [1 << i for i in range(last.bit_length()) if first <= 1 << i <= last]
        else:
            rows = [int(part) for part in text.split(",")]
    except ValueError:
        rows = []
    if not rows or min(rows) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 1,4,16 or 1-1024")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", type=parse_shapes, default="smollm2",
                        help=f"{', '.join(SHAPES)}, or NxK,name=NxK,...")
    parser.add_argument("--layers", default="", help="only shapes whose name holds this")
    parser.add_argument("--rows", type=parse_rows, default="1,4,16,64,256,1024")
    parser.add_argument("--formats", default="", help="only formats whose name holds one of these")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--isa", help="see `pyllmlite info`")
    parser.add_argument("--seconds", type=float, default=0.2, help="per measurement")
    parser.add_argument("--cached", action="store_true", help="weights may stay in a cache")
    parser.add_argument("--check", action="store_true", help="is int4 slower than bf16 anywhere?")
    parser.add_argument("--tolerance", type=float, default=0.0, help="of --check: 0.05 is 5 %%")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.isa:
        _native.set_isa(args.isa)
    parts = args.formats.split(",")
    formats = [fmt for fmt in all_formats() if any(part in fmt.name for part in parts)]
    if args.check:
        formats = [f for f in all_formats() if f.name == "bf16" or f in formats]
    pool = _native.ThreadPool(args.threads)
    machine = measure_machine(pool=pool)
    if not args.json:
        print(machine)
    results = []
    with Progress(console=Console(stderr=args.json, width=120), transient=True) as progress:
        for name, shape in args.shapes.items():
            if args.layers in name:
                results += measure_shape(args, name, shape, formats, machine, pool, progress)
    slower = slower_than_bf16(results, args.tolerance)
    if args.json:
        result = {"machine": asdict(machine), "results": [asdict(one) for one in results]}
        print(json.dumps(result | {"slower_than_bf16": slower}, indent=1))
    elif args.check:
        print(*(slower or ["int4 with int8 or bf16 rows is nowhere slower than bf16"]), sep="\n")
    if args.check and slower:
        sys.exit(1)


if __name__ == "__main__":
    main()
