"""pyllmlite and its peers on one workload, in turn, in one run.

    python benchmarks/compare.py pyllmlite=model.gguf \\
        llamacpp=PEERS/llamacpp/bin/python:model-Q4_0.gguf \\
        openvino=PEERS/openvino/bin/python:model-ov4 --rounds 3 --out benchmarks/results

Each engine is ``name=[python:]model``; its adapter is ``engines/NAME_engine.py``, its python one
where the engine is installed (without: this one).  Every round starts each engine once, one after
the other (A B A B), and takes every metric once.  Prints the medians with their spread and the
ratio to the best peer; ``--out`` gets ``compare.json`` and a plot.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
from pathlib import Path

from workload import measure, warm_up

METRICS = "decode_b1,decode_b4,decode_b16,decode_b32,prefill,mixed"
HERE = Path(__file__).resolve().parent


def worker(arguments: list[str]) -> None:
    """In the engine's own interpreter: one JSON line a metric."""
    name, model, threads, metrics, seed = arguments
    sys.path.insert(0, str(HERE))
    engine = importlib.import_module(f"engines.{name}_engine").Engine(model, int(threads))
    wanted = metrics.split(",")
    warm_up(engine, wanted)
    for metric in wanted:
        print(json.dumps([metric, measure(engine, metric, int(seed))]), flush=True)


def run_engine(name: str, python: str, model: str, args: argparse.Namespace, seed: int) -> dict:
    command = [python, str(HERE / "compare.py"), "--worker", name, model]
    command += [str(args.threads), args.metrics, str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(f"{name} failed: {last}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    return dict(json.loads(line) for line in lines)


def table(results: dict[str, dict[str, list[float]]], metrics: list[str]) -> str:
    """Markdown: median (least to most) of tokens per second, and ours over the best peer."""
    lines = ["| | " + " | ".join(metrics) + " |", "| --- |" + " --- |" * len(metrics)]
    for name, by_metric in results.items():
        cells = []
        for metric in metrics:
            values = by_metric[metric]
            middle = statistics.median(values)
            cells.append(f"{middle:.0f} ({min(values):.0f} to {max(values):.0f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    peers = [name for name in results if name != "pyllmlite"]
    if peers and "pyllmlite" in results:
        cells = []
        for metric in metrics:
            best = max(statistics.median(results[name][metric]) for name in peers)
            cells.append(f"{statistics.median(results['pyllmlite'][metric]) / best:.2f} ×")
        lines.append("| **over the best peer** | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(results: dict[str, dict[str, list[float]]], metrics: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    decode = [m for m in metrics if m.startswith("decode_b")]
    batches = [int(m.removeprefix("decode_b")) for m in decode]
    figure, axes = pyplot.subplots(figsize=(6.5, 4))
    for name, by_metric in results.items():
        middle = [statistics.median(by_metric[m]) for m in decode]
        axes.plot(batches, middle, marker="o", label=name, lw=2.5 if name == "pyllmlite" else 1.2)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlabel("sequences decoded together")
    axes.set_ylabel("tokens per second")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engines", nargs="+", metavar="name=[python:]model")
    parser.add_argument("--metrics", default=METRICS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one engine's turn")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    engines = {}
    for text in args.engines:
        name, _, rest = text.partition("=")
        python, _, model = rest.rpartition(":")
        engines[name] = (python or sys.executable, model)
    metrics = args.metrics.split(",")
    results: dict[str, dict[str, list[float]]] = {n: {m: [] for m in metrics} for n in engines}
    for number in range(args.rounds):
        for name, (python, model) in engines.items():
            print(f"round {number + 1} of {args.rounds}: {name}", file=sys.stderr)
            for metric, value in run_engine(name, python, model, args, number).items():
                results[name][metric].append(value)
    print(table(results, metrics))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "compare.json").write_text(json.dumps(results, indent=1) + "\n")
        plot(results, metrics, args.out / "compare.png")


if __name__ == "__main__":
    main()
