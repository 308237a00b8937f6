"""What is left of the speed when another process keeps one core busy.

    python benchmarks/busy_core.py pyllmlite=model.gguf \\
        llamacpp=PEERS/llamacpp/bin/python:model-Q4_0.gguf

Engines and metrics are named as for ``compare.py``.  Every metric is taken idle and busy in turn,
``--rounds`` times; the neighbour shares the CPUs that the engine may use.  Prints the medians of
tokens per second and the share that is left.  The system gives each of its runnable threads as
much, so that with T threads on T CPUs a fair share is T / (T + 1).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from compare import Worker, engine
from limits import tokens_of

METRICS = "decode_b1,decode_b4,decode_b16,prefill_512"
SETTLE_SECONDS = 0.2
NEIGHBOUR = "import os\nos.sched_setaffinity(0, {cpus})\nwhile True: pass"


@contextlib.contextmanager
def busy_neighbour(threads: int) -> Iterator[None]:
    cpus = set(sorted(os.sched_getaffinity(0))[:threads])
    neighbour = subprocess.Popen([sys.executable, "-S", "-c", NEIGHBOUR.format(cpus=cpus)])
    try:
        time.sleep(SETTLE_SECONDS)
        yield
    finally:
        neighbour.kill()
        neighbour.wait()


def measure(worker: Worker, args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """Per metric, a pair of idle and busy tokens per second for each round."""
    metrics = args.metrics.split(",")
    pairs: dict[str, list[tuple[float, float]]] = {metric: [] for metric in metrics}
    worker.ask(None, args.timeout)
    worker.ask({"warm_up": metrics}, args.timeout)
    for number in range(args.rounds):
        for metric in metrics:
            request = {"metric": metric, "seed": number}
            idle = worker.ask(request, args.timeout)["tokens_per_s"]
            with busy_neighbour(args.threads):
                busy = worker.ask(request, args.timeout)["tokens_per_s"]
            pairs[metric].append((idle, busy))
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("engines", nargs="+", type=engine, metavar="name=[python:]model")
    parser.add_argument("--metrics", default=METRICS, help="decode_bN, prefill_N, mixed")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=300, help="seconds of a measurement")
    args = parser.parse_args()
    for metric in args.metrics.split(","):
        tokens_of(metric)  # an unknown one ends here
    print(f"{'tokens per second':<28}{'idle':>8}{'busy':>8}{'share':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for name, (python, model) in args.engines:
            log = Path(folder) / f"{name}.log"
            worker = Worker(name, python, model, args.threads, {}, log)
            try:
                pairs = measure(worker, args)
            finally:
                worker.end()
            for metric, rounds in pairs.items():
                idle, busy = (statistics.median(column) for column in zip(*rounds, strict=True))
                label = f"{name} {metric}"
                print(f"{label:<28}{idle:>8.0f}{busy:>8.0f}{busy / idle:>8.0%}", flush=True)


if __name__ == "__main__":
    main()
