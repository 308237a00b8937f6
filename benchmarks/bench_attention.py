"""The attention op alone: GB/s of K and V read in decode, GFLOP/s in prefill.

    python benchmarks/bench_attention.py [--heads 9 --kv-heads 3 --head-dim 64] [--dtype bf16]
                                         [--threads 2] [--isa avx2]

Beside them what this machine gives NumPy: a large copy and a large matrix product.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np

from pyllmlite.runtime.native import native


def best_of(run: Callable[[], object], seconds: float = 0.4) -> float:
    """Seconds of the fastest call."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        run()
        best = min(best, time.perf_counter() - start)
    return best


def measure(args: argparse.Namespace, num_seqs: int, context: int, queries: int) -> float:
    """Seconds of one step: ``num_seqs`` sequences of ``context`` tokens, the last ``queries`` of
    each asking."""
    block = args.block_size
    columns = -(-context // block)
    table = np.random.default_rng(0).permutation(num_seqs * columns).astype(np.int32)
    table = table.reshape(num_seqs, columns)
    shape = (num_seqs * columns, args.kv_heads, args.head_dim * block)
    kind = np.uint16 if args.dtype == "bf16" else np.float32
    k, v = (np.full(shape, 0x3C00 if args.dtype == "bf16" else 0.01, kind) for _ in range(2))
    tokens = num_seqs * queries
    qkv = np.full((tokens, (args.heads + 2 * args.kv_heads) * args.head_dim), 0.1, np.float32)
    out = np.empty((tokens, args.heads * args.head_dim), np.float32)
    batch = native().Batch(num_seqs, context, tokens, 1, 10, 1, [(block, table)])
    batch.set_step(
        range(num_seqs), [context - queries] * num_seqs, [queries] * num_seqs, [0] * num_seqs
    )
    layout = native().KVLayout(args.dtype, shape[0], args.kv_heads, args.head_dim, block)
    program = native().Program(tokens, 1, native().ThreadPool(args.threads))
    arrays = {"qkv": qkv, "out": out, "k": k, "v": v}
    tensors = [program.add_tensor(name, array) for name, array in arrays.items()]
    op = native().attention(args.heads, layout, scale=args.head_dim**-0.5)
    program.add_op(op, tensors, "attention")
    program.finish()
    return best_of(lambda: program.run(batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--isa")
    args = parser.parse_args()
    if args.isa:
        native().set_isa(args.isa)
    source, target = np.ones(1 << 26, np.float32), np.empty(1 << 26, np.float32)
    copy = 2 * source.nbytes / best_of(lambda: np.copyto(target, source)) / 1e9
    square = np.ones((1024, 1024), np.float32)
    product = 2 * 1024**3 / best_of(lambda: square @ square) / 1e9
    print(
        f"{native().info()['isa']}, {args.threads} thread(s), {args.dtype} KV; "
        f"NumPy copies {copy:.1f} GB/s, multiplies {product:.0f} GFLOP/s"
    )
    per_token = 2 * args.kv_heads * args.head_dim * (2 if args.dtype == "bf16" else 4)
    for num_seqs, context in [(1, 128), (1, 1024), (1, 8192), (1, 32768), (32, 512)]:
        seconds = measure(args, num_seqs, context, 1)
        rate = num_seqs * context * per_token / seconds / 1e9
        what = f"decode  {num_seqs:2d} x {context:5d}  "
        print(f"{what}: {seconds * 1e3:9.3f} ms, {rate:6.1f} GB/s")
    for context, queries in [(512, 512), (2048, 2048), (8192, 512)]:
        seconds = measure(args, 1, context, queries)
        pairs = queries * (2 * context - queries + 1) / 2
        rate = 4 * pairs * args.heads * args.head_dim / seconds / 1e9
        what = f"prefill {queries:4d} at {context:5d}"
        print(f"{what}: {seconds * 1e3:9.3f} ms, {rate:6.1f} GFLOP/s")


if __name__ == "__main__":
    main()
