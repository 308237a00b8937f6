"""Speed of the linear op beside what the machine can do.

Prints, per weight format and number of rows, GB/s of weights read and GOP/s (a multiply-add is
two).  The peaks beside them: reading is measured by summing a large array on all threads,
arithmetic is the best that torch's f32 matrix product reaches (where torch is installed).

    python benchmarks/bench_linear.py --threads 2 --n 4096 --k 4096 --rows 1,8,64,256
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pyllmlite import _native

# name, format, group_size, mins, int8 activations
FORMATS = [
    ("f32", "f32", 0, False, False),
    ("bf16", "bf16", 0, False, False),
    ("int8", "int8", 0, False, False),
    ("int8 x int8", "int8", 0, False, True),
    ("int4 g64", "int4", 64, False, False),
    ("int4 g64 x int8", "int4", 64, False, True),
    ("int4 g64 mins x int8", "int4", 64, True, True),
]


def best_of(function, seconds: float) -> float:
    """Least time of one call, over about `seconds`."""
    function()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return best


def read_peak(threads: int, seconds: float) -> float:
    parts = [np.ones(16 << 20, np.int64) for _ in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        taken = best_of(lambda: list(pool.map(np.bitwise_or.reduce, parts)), seconds)
    return sum(p.nbytes for p in parts) / taken / 1e9


def f32_peak(threads: int, seconds: float) -> float | None:
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / best_of(lambda: a @ b, seconds) / 1e9


def make_weight(rng, fmt: str, n: int, k: int, group: int, mins: bool):
    if fmt in ("f32", "bf16"):
        return _native.PackedLinear(fmt, rng.standard_normal((n, k), np.float32))
    codes = rng.integers(0, 16 if fmt == "int4" else 128, (n, k), np.uint8)
    codes = codes if fmt == "int4" else codes.view(np.int8)
    groups = -(-k // (group or k))
    scales = np.full((n, groups), 0.01, np.float16)
    return _native.PackedLinear(fmt, codes, scales, scales if mins else None, group_size=group)


def time_op(weight, int8: bool, rows: int, pool, seconds: float) -> float:
    n, k = weight.shape
    program = _native.Program(rows, 1, pool)
    x = program.add_buffer("x", "tokens", k)
    out = program.add_buffer("out", "tokens", n)
    program.add_op(_native.linear(weight, int8_activations=int8), [x, out], "linear")
    program.finish()
    program.buffer(x)[:] = np.random.default_rng(1).standard_normal((rows, k), np.float32)
    batch = _native.Batch(1, rows + 1, rows, 1, 2, 0, [])
    batch.set_step([0], [0], [rows], [1])
    return best_of(lambda: program.run(batch), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--rows", default="1,4,16,64,256")
    parser.add_argument("--formats", default="", help="only formats whose name holds this")
    parser.add_argument("--isa", default=None, help="see `pyllmlite info`")
    parser.add_argument("--seconds", type=float, default=0.5, help="per measurement")
    args = parser.parse_args()
    if args.isa:
        _native.set_isa(args.isa)
    pool = _native.ThreadPool(args.threads)
    read, f32 = read_peak(args.threads, args.seconds), f32_peak(args.threads, args.seconds)
    peak = f", torch f32 matmul {f32:.0f} GFLOP/s" if f32 else ""
    print(f"{_native.info()['isa']}, {args.threads} threads; memory read {read:.1f} GB/s{peak}")
    rng = np.random.default_rng(0)
    for name, fmt, group, mins, int8 in FORMATS:
        if args.formats not in name:
            continue
        weight = make_weight(rng, fmt, args.n, args.k, group, mins)
        for rows in map(int, args.rows.split(",")):
            taken = time_op(weight, int8, rows, pool, args.seconds)
            operations = 2 * rows * args.n * args.k / taken / 1e9
            print(
                f"{name:<22} rows {rows:<4} {taken * 1e3:9.3f} ms"
                f" {weight.nbytes / taken / 1e9:8.1f} GB/s {operations:9.1f} GOP/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
