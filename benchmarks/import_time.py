"""How long ``import pyllmlite`` and ``pyllmlite --help`` take beside ``import numpy``.

    python benchmarks/import_time.py [--repeat 15]

Each in a new interpreter; the median of its wall time, and of the difference to numpy's.
"""

import argparse
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python alone": ["-c", "pass"],
    "import numpy": ["-c", "import numpy"],
    "import pyllmlite": ["-c", "import pyllmlite"],
    "from pyllmlite import LLM": ["-c", "from pyllmlite import LLM"],
    "pyllmlite --help": ["-m", "pyllmlite.cli.main", "--help"],
}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=15)
    repeat = parser.parse_args().repeat
    for arguments in COMMANDS.values():
        seconds(arguments)  # files into the page cache
    # Interleaved, so that a busy moment of the machine falls on all of them.
    runs = [
        {name: seconds(arguments) for name, arguments in COMMANDS.items()} for _ in range(repeat)
    ]
    for name in COMMANDS:
        median = statistics.median(run[name] for run in runs)
        more = statistics.median(run[name] - run["import numpy"] for run in runs)
        print(f"{name:<26} {1e3 * median:7.1f} ms   {1e3 * more:+7.1f} ms beside import numpy")


if __name__ == "__main__":
    main()
