"""What being a plugin costs: a copy op from this package beside the built-in one, per call.

    python examples/cpp-plugin/measure.py

Both are added to a Program 200 times; the medians of 2,000 runs are compared.
"""

import json
import statistics
import time

import numpy as np
from pyllmlite_cpp_example import _ops

from pyllmlite import _native

OPS, RUNS, WIDTH = 200, 2000, 64


def program(make):
    made = _native.Program(8, 8, _native.ThreadPool(1))
    x, out = made.add_buffer("x", "tokens", WIDTH), made.add_buffer("out", "tokens", WIDTH)
    for i in range(OPS):
        made.add_op(make(), [x, out], f"copy{i}")
    made.finish()
    return made


def main():
    batch = _native.Batch(1, 8, 8, 8, 16, 0, [(16, np.zeros((1, 1), np.int32))])
    batch.set_step([0], [0], [1], [1])
    programs = {
        "plugin": program(lambda: _native.Op.from_capsule(_ops.copy())),
        "built_in": program(lambda: _native.norm(_native.NormArgs("none"), WIDTH)),
    }
    times = {name: [] for name in programs}
    for _ in range(RUNS):  # in turns, so that both meet the same neighbours
        for name, made in programs.items():
            start = time.perf_counter_ns()
            made.run(batch)
            times[name].append((time.perf_counter_ns() - start) / 1e3 / OPS)
    result = {name: statistics.median(values) for name, values in times.items()}
    result["plugin_more"] = result["plugin"] - result["built_in"]
    print(json.dumps({f"{name}_us_per_call": round(v, 4) for name, v in result.items()}))


if __name__ == "__main__":
    main()
