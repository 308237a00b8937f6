"""From the measurements of compare.py to medians, ratios, shares of the limit; table and plot.

    python benchmarks/compare_report.py benchmarks/results/smollm2/compare.json [--json]

prints the table of a run that is over, or still going on.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from limits import metric_limit, steps_of, where_bytes_lie, work_of

from pyllmlite.runtime.cost import OpCost
from pyllmlite.runtime.program import OpEntry
from pyllmlite.sizing import Machine

OURS = "pyllmlite"
BUSY = 0.05  # share of the machine's CPU time that others took


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def operations(engine: dict[str, Any]) -> list[OpEntry]:
    costs = engine.get("facts", {}).get("costs", [])
    return [OpEntry(str(i), "", (), OpCost(**cost)) for i, cost in enumerate(costs)]


def limits_of(state: dict[str, Any], ops: list[OpEntry], metric: str) -> list[tuple[float, float]]:
    """(tokens per second, limit at that time) of each of our measurements of a metric."""
    machines = {one["round"]: {k: v for k, v in one.items() if k != "round"}
                for one in state["machine"]}
    parts = work_of(ops, metric)
    pairs = []
    for one in state["measurements"]:
        if one["engine"] != OURS or one["metric"] != metric:
            continue
        machine = Machine(**{**machines[one["round"]], "dram_bandwidth": one["dram_bandwidth"]})
        pairs.append((one["tokens_per_s"], metric_limit(metric, parts, machine).tokens_per_s))
    return pairs


def memory_of(state: dict[str, Any], ops: list[OpEntry]) -> dict[str, float]:
    """Our peak memory, and what of it the weights and the KV of the largest metric take."""
    engine = state["engines"][OURS]
    per_token = sum(op.cost.context_bytes for op in ops)
    tokens = max(
        sum(context for _, context in step.sequences)
        for metric in state["settings"]["metrics"]
        for _, step in steps_of(metric)
    )
    weights = engine["facts"]["weight_bytes"]
    return {"peak": engine["peak_bytes"], "weights": weights, "kv": per_token * tokens}


def summary(state: dict[str, Any]) -> dict[str, Any]:
    """Medians with least and most; ours over the best peer; shares of the limit."""
    settings = state["settings"]
    values: dict[str, dict[str, list[float]]] = {name: {} for name in settings["engines"]}
    for one in state["measurements"]:
        values[one["engine"]].setdefault(one["metric"], []).append(one["tokens_per_s"])
    rates = {
        name: {metric: spread(found) for metric, found in by_metric.items()}
        for name, by_metric in values.items()
    }
    result: dict[str, Any] = {"settings": settings, "rates": rates, "ratios": {}, "limits": {}}
    result["failures"] = state["failures"]
    result["engines"] = {
        name: {"version": one["version"], "ready": one["ready"], "peak_bytes": one["peak_bytes"]}
        for name, one in state["engines"].items()
    }
    result["rounds"] = len({one["round"] for one in state["measurements"]})
    result["disturbed"] = sum(one["others"] > BUSY for one in state["measurements"])
    result["measurements"] = len(state["measurements"])
    if state["machine"]:
        result["machine"] = str(Machine(**{k: v for k, v in state["machine"][-1].items()
                                           if k != "round"}))
        bandwidths = [one["dram_bandwidth"] for one in state["measurements"]]
        result["dram_bandwidth"] = spread(bandwidths) if bandwidths else None
    ops = operations(state["engines"].get(OURS, {}))
    for metric in settings["metrics"]:
        ours = rates.get(OURS, {}).get(metric)
        peers = {n: r[metric]["median"] for n, r in rates.items() if n != OURS and metric in r}
        if ours and peers:
            best = max(peers, key=lambda name: peers[name])
            result["ratios"][metric] = {"ratio": ours["median"] / peers[best], "peer": best}
        if ours and ops:
            pairs = limits_of(state, ops, metric)
            result["limits"][metric] = {
                "limit": spread([most for _, most in pairs]),
                "share": spread([rate / most for rate, most in pairs]),
            }
    if ops:
        result["memory"] = memory_of(state, ops)
        last = {k: v for k, v in state["machine"][-1].items() if k != "round"}
        result["where"] = where_bytes_lie(result["memory"]["weights"], Machine(**last))
    return result


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    metrics = result["settings"]["metrics"]
    heads = ["", *metrics, "peak memory", "ready after"]
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    for name, rates in result["rates"].items():
        cells = [
            "{median:.0f} ({least:.0f} to {most:.0f})".format(**rates[m]) if m in rates else "—"
            for m in metrics
        ]
        engine = result["engines"].get(name)
        cells += (
            [f"{engine['peak_bytes'] / 1e6:.0f} MB", f"{engine['ready']:.1f} s"]
            if engine
            else ["—", "—"]
        )
        version = f" ({engine['version']})" if engine else ""
        lines.append(f"| {name}{version} | {' | '.join(cells)} | ")
    if result["ratios"]:
        cells = [
            "{ratio:.2f} × {peer}".format(**result["ratios"][m]) if m in result["ratios"] else "—"
            for m in metrics
        ]
        lines.append(f"| **over the best peer** | {' | '.join(cells)} | | |")
    if result["limits"]:
        limits = [result["limits"].get(m) for m in metrics]
        cells = [f"{one['limit']['median']:.0f}" if one else "—" for one in limits]
        lines.append(f"| the limit | {' | '.join(cells)} | | |")
        cells = [
            "{:.0%} ({:.0%} to {:.0%})".format(*one["share"].values()) if one else "—"
            for one in limits
        ]
        lines.append(f"| **share of the limit** | {' | '.join(cells)} | | |")
    lines = [line.rstrip() for line in lines]
    lines += ["", f"Tokens per second, medians of {result['rounds']} rounds (least to most), "
              f"{result['settings']['threads']} threads each."]
    if "machine" in result:
        lines.append(result["machine"] + ".")
        if result["dram_bandwidth"]:
            lines.append("DRAM between the measurements: {:.0f} GB/s ({:.0f} to {:.0f}).".format(
                *(rate / 1e9 for rate in result["dram_bandwidth"].values())))
    if "memory" in result:
        peak, weights, kv = (result["memory"][k] / 1e6 for k in ("peak", "weights", "kv"))
        lines.append(result["where"])
        lines.append(
            f"Peak memory {peak:.0f} MB: packed weights {weights:.0f} MB, KV of the largest metric "
            f"{kv:.0f} MB, all else {peak - weights - kv:.0f} MB."
        )
    if result["disturbed"]:
        lines.append(
            f"Other processes took more than {BUSY:.0%} of the CPU time in "
            f"{result['disturbed']} of {result['measurements']} measurements."
        )
    lines += [f"{one['engine']} failed ({one['doing']}): {one['reason']}"
              for one in result["failures"]]
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Decode: tokens per second over batch size, with least and most, and the limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    decode = [m for m in result["settings"]["metrics"] if m.startswith("decode_b")]
    if not decode:
        return
    batch = {metric: int(metric.removeprefix("decode_b")) for metric in decode}
    figure, axes = pyplot.subplots(figsize=(6.5, 4))
    for name, rates in result["rates"].items():
        found = [m for m in decode if m in rates]
        if not found:
            continue
        middle = [rates[m]["median"] for m in found]
        errors = [[rates[m]["median"] - rates[m]["least"] for m in found],
                  [rates[m]["most"] - rates[m]["median"] for m in found]]
        axes.errorbar([batch[m] for m in found], middle, errors, marker="o", label=name,
                      lw=2.5 if name == OURS else 1.2, capsize=3)
    drawn = [m for m in decode if m in result["limits"]]
    if drawn:
        axes.plot([batch[m] for m in drawn],
                  [result["limits"][m]["limit"]["median"] for m in drawn],
                  color="black", ls="--", lw=1, label="limit (pyllmlite's weights and KV)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(list(batch.values()), [str(size) for size in batch.values()])
    axes.set_xlabel("sequences decoded together")
    axes.set_ylabel("tokens per second")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="compare.json of a run")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    result = summary(json.loads(args.file.read_text()))
    print(json.dumps(result, indent=1) if args.json else table(result))


if __name__ == "__main__":
    main()
