"""The least time that a model's weights, KV and operations leave on this machine.

    python benchmarks/limits.py model.gguf [--threads 2] [--metrics decode_b1,...] [--json]

Loads the model as pyllmlite runs it (packed weights, KV dtype), measures the machine's peaks and
prints for every metric of workload.py the highest tokens per second possible: a step takes at
least its bytes / measured bandwidth, and at least the sum of its multiply-accumulates, each at the
measured peak of its dtype; whichever is longer.  Activations count as free.  Reading counts at
DRAM's bandwidth unless all of a step's bytes fit the last-level cache; both figures are printed.
``model?option=value&...`` hands options to the engine: ``model?quantizer=rtn&bits=4``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import workload
from rich.console import Console
from rich.table import Table

from pyllmlite.core.config import EngineConfig
from pyllmlite.model.build import Built, build
from pyllmlite.runtime.program import OpEntry
from pyllmlite.sizing import Limit, Machine, Step, Work, decode, limit, measure_machine, prefill
from pyllmlite.sizing import work as work_of_step

METRICS = "decode_b1,decode_b4,decode_b16,decode_b32,prefill_1024,mixed"


@dataclass(frozen=True)
class Part:
    """So many steps of the same work."""

    steps: int
    work: Work


def steps_of(metric: str) -> list[tuple[int, Step]]:
    """The fewest steps that a metric can be done in, those alike taken together."""
    kind, number = workload.parse(metric)
    if kind == "decode":
        context = workload.PROMPT_TOKENS + (workload.NEW_TOKENS + 1) // 2
        return [(workload.NEW_TOKENS, decode(number, context))]
    if kind == "prefill":
        return [(1, prefill(number))]
    prompts = workload.mixed_lengths()
    decodes = workload.MIXED_NEW_TOKENS - 1  # the first token comes out of the prompt's step
    half = workload.MIXED_NEW_TOKENS // 2
    together = Step(tuple((1, prompt + half) for prompt in prompts), len(prompts))
    return [(1, prefill(*prompts)), (decodes, together)]


def tokens_of(metric: str) -> int:
    """What the metric counts, in the steps of :func:`steps_of`."""
    kind, number = workload.parse(metric)
    if kind == "decode":
        return number * workload.NEW_TOKENS
    return number if kind == "prefill" else workload.MIXED_REQUESTS * workload.MIXED_NEW_TOKENS


def work_of(ops: Iterable[OpEntry], metric: str) -> list[Part]:
    ops = list(ops)
    return [Part(count, work_of_step(ops, step)) for count, step in steps_of(metric)]


@dataclass(frozen=True)
class MetricLimit:
    """Tokens per second at most.  ``bound``: what the largest part waits for.

    ``dram``, ``cache``: the same with all bytes read from there (``cache`` None: not measured).
    """

    metric: str
    tokens_per_s: float
    bound: str
    in_cache: bool
    dram: float
    cache: float | None
    step_bytes: float  # of the part with the most steps
    macs: dict[str, float]


def metric_limit(metric: str, parts: list[Part], machine: Machine) -> MetricLimit:
    limits = [(part.steps, limit(part.work, machine)) for part in parts]
    tokens = tokens_of(metric)

    def rate(seconds_of_step: Any) -> float:
        return tokens / max(sum(steps * seconds_of_step(one) for steps, one in limits), 1e-12)

    def from_cache(one: Limit) -> float:
        return max(one.cache_seconds or 0.0, one.compute_seconds)

    most = max(parts, key=lambda part: part.steps)
    longest = max(limits, key=lambda pair: pair[0] * pair[1].seconds)[1]
    return MetricLimit(
        metric=metric,
        tokens_per_s=rate(lambda one: one.seconds),
        bound=longest.bound,
        in_cache=all(one.in_cache for _, one in limits),
        dram=rate(lambda one: max(one.dram_seconds, one.compute_seconds)),
        cache=rate(from_cache) if machine.cache_bandwidth else None,
        step_bytes=most.work.bytes,
        macs=most.work.macs,
    )


def where_bytes_lie(weight_bytes: float, machine: Machine) -> str:
    """One line: which bandwidth the limit is drawn with, and why."""
    if not machine.cache_bytes:
        return "The last-level cache's size is not known: limits are drawn with DRAM's bandwidth."
    size = f"{machine.cache_bytes / 1e6:.0f} MB last-level cache"
    weights = f"{weight_bytes / 1e6:.0f} MB of weights"
    if weight_bytes > machine.cache_bytes:
        return (
            f"{weights} do not fit the {size}, and are read in the same order every step: "
            "limits are drawn with DRAM's bandwidth."
        )
    return (
        f"All {weights} fit the {size}: a step whose weights and KV fit it together is held to the "
        "cache's bandwidth, the others to DRAM's."
    )


def load(model: str, threads: int | None) -> Built:
    path, options = split_options(model)
    settings = {"skip_tokenizer_init": True, "max_model_len": 2048, **options}
    return build(path, EngineConfig.from_kwargs(model=path, threads=threads, **settings))


def split_options(model: str) -> tuple[str, dict[str, Any]]:
    """``path?name=value&...``; values are JSON where they can be read as such."""
    path, _, query = model.partition("?")
    options: dict[str, Any] = {}
    for pair in filter(None, query.split("&")):
        name, _, value = pair.partition("=")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return path, options


def table(limits: list[MetricLimit]) -> Table:
    grid = Table(title="Tokens per second at most")
    for heading in ("metric", "limit", "bound by", "MB a step", "GMAC a step", "DRAM", "cache"):
        grid.add_column(heading, justify="left" if heading in ("metric", "bound by") else "right")
    for one in limits:
        macs = ", ".join(f"{name} {count / 1e9:.2f}" for name, count in one.macs.items())
        cache = "" if one.cache is None else f"{one.cache:.0f}"
        cells = (f"{one.tokens_per_s:.0f}", one.bound, f"{one.step_bytes / 1e6:.1f}", macs)
        grid.add_row(one.metric, *cells, f"{one.dram:.0f}", cache)
    return grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="path, alias or hub id, with options behind a '?'")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--metrics", default=METRICS)
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    metrics = args.metrics.split(",")
    tokens = [tokens_of(metric) for metric in metrics]  # an unknown one ends here
    assert tokens
    with Console(stderr=True).status("loading the model, measuring the machine"):
        built = load(args.model, args.threads)
        machine = measure_machine(built.threads, args.seconds)
    limits = [
        metric_limit(metric, work_of(built.program.entries, metric), machine) for metric in metrics
    ]
    weights = work_of_step(built.program.entries, decode(1, 1)).weight_bytes
    if args.json:
        result = {"machine": asdict(machine), "weight_bytes": weights}
        print(json.dumps(result | {"limits": [asdict(one) for one in limits]}, indent=1))
        return
    console = Console(width=110)
    console.print(str(machine), where_bytes_lie(weights, machine), sep="\n", highlight=False)
    console.print(table(limits))


if __name__ == "__main__":
    main()
