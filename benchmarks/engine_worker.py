"""One engine in its own interpreter, asked by compare.py: JSON lines in, JSON lines out.

Runs where the engine is installed, so it imports nothing but the adapter and the workload.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workload import measure, warm_up

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """A worker that is stopped would outlive whoever stopped it."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError):
        pass  # no Linux


def peak_bytes() -> int:
    """Largest resident size so far.  Not getrusage's, which begins with the parent's size."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def answer(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    if "warm_up" in request:
        warm_up(engine, request["warm_up"])
        return {"peak_bytes": peak_bytes()}
    rate = measure(engine, request["metric"], request["seed"])
    return {"tokens_per_s": rate, "peak_bytes": peak_bytes()}


def serve(reply: Callable[[dict[str, Any]], None], name: str, model: str, threads: int) -> None:
    start = time.perf_counter()
    adapter = importlib.import_module(f"engines.{name}_engine")
    engine = adapter.Engine(model, threads)
    facts = engine.facts() if hasattr(engine, "facts") else {}
    version = adapter.version()
    reply({"ready": time.perf_counter() - start, "version": version, "facts": facts})
    for line in sys.stdin:
        reply(answer(engine, json.loads(line)))


def main() -> None:
    die_with_parent()
    name, model, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what engines print goes to the log

    def reply(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        serve(reply, name, model, threads)
    except Exception as error:
        reply({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
        raise


if __name__ == "__main__":
    main()
