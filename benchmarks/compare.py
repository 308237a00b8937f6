"""pyllmlite and its peers on one workload, in turn, in one run.

    python benchmarks/compare.py pyllmlite=model.gguf \\
        llamacpp=PEERS/llamacpp/bin/python:model-Q4_0.gguf \\
        openvino=PEERS/openvino/bin/python:model-ov4 \\
        vllm=PEERS/vllm/bin/python:model --rounds 5 --out benchmarks/results/smollm2

Each engine is ``name=[python:]model``; its adapter is ``engines/NAME_engine.py`` (``NAME-label``
takes NAME's, for a second one of a kind), its python one where the engine is installed (without:
this one).  All are loaded, each in a process of its own with as many CPUs as threads, and all but
the one being timed are stopped.  Every round takes every metric of every engine in turn, so that
what a machine does from minute to minute meets all alike; the order of engines moves on by one
every round.  Memory bandwidth is measured between any two measurements: the limits are drawn with
what it was then.

``--out`` gets ``compare.json``, written after each measurement: started again with the same
words, a run goes on where it ended.  An engine that fails, or takes longer than ``--timeout`` for a
measurement, is a line below the table.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compare_report import plot, summary, table
from limits import METRICS, tokens_of
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pyllmlite import _native
from pyllmlite.sizing import dram_bandwidth, measure_machine

HERE = Path(__file__).resolve().parent
SETTLE_SECONDS = 0.05


class EngineFailed(Exception):
    """An engine died, said that it failed, or took too long: one line."""


class Worker:
    """An engine's process, stopped unless it is asked something."""

    def __init__(self, name: str, python: str, model: str, threads: int, env: dict[str, str],
                 log: Path) -> None:
        self.name, self.log = name, log
        count = str(threads)
        limits = {"OMP_NUM_THREADS": count, "MKL_NUM_THREADS": count, "HF_HUB_OFFLINE": "1"}
        command = [python, str(HERE / "engine_worker.py"), name.partition("-")[0], model, count]
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **limits, **env},
                start_new_session=True,
            )
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass

    def ask(self, request: dict[str, Any] | None, timeout: float) -> dict[str, Any]:
        """The answer to a request; None: what the engine says once it is loaded."""
        self._signal(signal.SIGCONT)
        try:
            if request is not None:
                assert self.process.stdin is not None
                self.process.stdin.write(json.dumps(request) + "\n")
                self.process.stdin.flush()
            line = self.answers.get(timeout=timeout)
        except queue.Empty:
            raise EngineFailed(f"took longer than {timeout:.0f} s") from None
        except OSError:
            line = ""
        if not line:
            lines = self.log.read_text(errors="replace").strip().splitlines()
            raise EngineFailed(f"ended: {(lines or ['no message'])[-1][:300]}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineFailed(answer["error"])
        time.sleep(SETTLE_SECONDS)  # threads that spin for a while after their work
        self._signal(signal.SIGSTOP)
        return answer

    def end(self) -> None:
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGKILL)
        self.process.wait()


def busy_seconds() -> float:
    """CPU seconds that the whole machine has been busy for, stolen time included."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def used_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Comparison:
    """The state of a run, and the file it is kept in."""

    def __init__(self, args: argparse.Namespace, engines: dict[str, tuple[str, str]]) -> None:
        self.args, self.engines = args, engines
        self.metrics = args.metrics.split(",")
        self.out: Path | None = args.out
        settings = {"engines": {name: model for name, (_, model) in engines.items()}}
        settings |= {"metrics": self.metrics, "threads": args.threads}
        self.state: dict[str, Any] = {"settings": settings, "engines": {}, "machine": []}
        self.state |= {"measurements": [], "failures": []}
        self.workers: dict[str, Worker] = {}
        if self.file is not None and self.file.exists() and not args.fresh:
            old = json.loads(self.file.read_text())
            if old.get("settings") != settings:
                raise SystemExit(
                    f"{self.file} was made with other engines, metrics or threads: "
                    "--fresh overwrites it"
                )
            self.state = old
        self.pool = _native.ThreadPool(args.threads)

    @property
    def file(self) -> Path | None:
        return None if self.out is None else self.out / "compare.json"

    def save(self) -> None:
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.state, indent=1) + "\n")
        part.replace(self.file)

    def done(self, number: int, metric: str, name: str) -> bool:
        return any(
            (one["round"], one["metric"], one["engine"]) == (number, metric, name)
            for one in self.state["measurements"]
        )

    def fail(self, name: str, doing: str, error: EngineFailed) -> None:
        self.state["failures"].append({"engine": name, "doing": doing, "reason": str(error)})
        worker = self.workers.pop(name, None)
        if worker is not None:
            worker.end()
        self.save()

    def start(self, name: str) -> None:
        python, model = self.engines[name]
        env = dict(pair.split("=", 1) for label, pair in self.args.env if label == name)
        folder = self.out if self.out is not None else Path(self.args.logs)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            worker = Worker(name, python, model, self.args.threads, env, folder / f"{name}.log")
        except OSError as error:
            self.fail(name, "starting", EngineFailed(f"{python}: {error.strerror}"))
            return
        self.workers[name] = worker
        try:
            facts = worker.ask(None, self.args.load_timeout)
            facts |= worker.ask({"warm_up": self.metrics}, self.args.load_timeout)
        except EngineFailed as error:
            self.fail(name, "loading", error)
            return
        self.state["engines"][name] = facts
        self.save()

    def measure(self, number: int, metric: str, name: str) -> None:
        """One measurement, with the bandwidth before and after it and what others did meanwhile."""
        worker = self.workers[name]
        before = dram_bandwidth(self.pool)
        busy, used = busy_seconds(), used_seconds(worker.process.pid)
        start = time.perf_counter()
        request = {"metric": metric, "seed": number}
        try:
            answer = worker.ask(request, self.args.timeout)
        except EngineFailed as error:
            self.fail(name, f"{metric}, round {number + 1}", error)
            return
        wall = time.perf_counter() - start
        others = busy_seconds() - busy - (used_seconds(worker.process.pid) - used)
        capacity = wall * (os.cpu_count() or 1)
        self.state["engines"][name]["peak_bytes"] = answer["peak_bytes"]
        self.state["measurements"].append(
            {
                "round": number,
                "metric": metric,
                "engine": name,
                "tokens_per_s": answer["tokens_per_s"],
                "dram_bandwidth": (before + dram_bandwidth(self.pool)) / 2,
                "others": max(0.0, others / capacity),
            }
        )
        self.save()

    def run(self, progress: Progress) -> None:
        names = list(self.engines)
        todo = [
            (number, metric, name)
            for number in range(self.args.rounds)
            for metric in self.metrics
            for name in names[number % len(names) :] + names[: number % len(names)]
            if not self.done(number, metric, name)
        ]
        if not todo:
            return
        bar = progress.add_task("", total=len(todo))
        for name in names:
            progress.update(bar, description=f"loading {name}")
            self.start(name)
        last = -1
        for number, metric, name in todo:
            if number != last:
                machine = asdict(measure_machine(seconds=0.3, pool=self.pool))
                self.state["machine"].append({"round": number, **machine})
                last = number
            progress.update(bar, description=f"round {number + 1}: {metric}, {name}")
            if name in self.workers:
                self.measure(number, metric, name)
            progress.advance(bar)

    def end(self) -> None:
        for worker in self.workers.values():
            worker.end()


def engine(text: str) -> tuple[str, tuple[str, str]]:
    name, _, rest = text.partition("=")
    python, _, model = rest.rpartition(":")
    if not (HERE / "engines" / f"{name.partition('-')[0]}_engine.py").exists() or not model:
        known = sorted(p.name.removesuffix("_engine.py") for p in HERE.glob("engines/*_engine.py"))
        raise argparse.ArgumentTypeError(
            f"{text!r} is not name=[python:]model with a name of {', '.join(known)}"
        )
    return name, (python or sys.executable, model)


def environment(text: str) -> tuple[str, str]:
    name, found, pair = text.partition(":")
    if not found or "=" not in pair:
        raise argparse.ArgumentTypeError(f"{text!r} is not engine:NAME=value")
    return name, pair


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("engines", nargs="+", type=engine, metavar="name=[python:]model")
    parser.add_argument("--metrics", default=METRICS, help="decode_bN, prefill_N, mixed")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=300, help="seconds of a measurement")
    parser.add_argument("--load-timeout", type=float, default=900, help="loading, first use")
    parser.add_argument("--env", type=environment, action="append", default=[],
                        metavar="engine:NAME=value", help="of one engine's process")
    parser.add_argument("--out", type=Path, help="folder for compare.json, plot and logs")
    parser.add_argument("--logs", default="build/compare", help="folder for logs without --out")
    parser.add_argument("--fresh", action="store_true", help="begin anew what --out holds")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    args = parser.parse_args()
    for metric in args.metrics.split(","):
        tokens_of(metric)  # an unknown one ends here
    comparison = Comparison(args, dict(args.engines))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    try:
        with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
            comparison.run(progress)
    finally:
        comparison.end()
    result = summary(comparison.state)
    print(json.dumps(result, indent=1) if args.json else table(result))
    if args.out:
        (args.out / "compare.md").write_text(table(result) + "\n")
        plot(result, args.out / "compare.png")


if __name__ == "__main__":
    main()
