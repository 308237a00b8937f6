"""``pyllmlite plan``: what a machine holds of a model, its best batch size, what a token costs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pyllmlite.cli.output import print_json, print_table, size

if TYPE_CHECKING:
    from pyllmlite.model.source import ModelSource
    from pyllmlite.sizing.footprint import Weights
    from pyllmlite.sizing.plan import Plan

MEMORY_SHARE = 0.9  # of a device; the rest is for activations, graphs and the runtime
SWEEP = (1, 4, 16, 64)


def plan(
    model: Annotated[
        str | None,
        typer.Argument(help="Alias, hub id, path, or config.json.", show_default="smollm2-135m"),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="A GPU by name (h100, l4, ...) in place of this machine.")
    ] = None,
    format: Annotated[
        str | None,
        typer.Option("--format", help="stored, f32, bf16, int8, int4, nf4.", show_default="stored"),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each sequence.", show_default="1024")
    ] = None,
    kv_dtype: Annotated[str, typer.Option(help="f32, bf16 or int8.")] = "bf16",
    memory: Annotated[
        str | None,
        typer.Option(help="For weights and KV, as 16GB.", show_default="0.9 of what is free"),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option("--batch", "-b", min=1, help="Batch size; more than once: each."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0.0, help="Of the machine: adds cost per million tokens.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Time this machine's kernels, and run the sweep.")
    ] = False,
    plot: Annotated[str | None, typer.Option(help="Draw it: a .png, .svg or .pdf.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what fits, how fast it will be and what it costs, before a model is loaded."""
    from pyllmlite.cli.plot_file import check_plot
    from pyllmlite.core.config import parse_bytes
    from pyllmlite.core.errors import ConfigError
    from pyllmlite.sizing.devices import find_device
    from pyllmlite.sizing.plan import BATCHES, as_dict, make_plan
    from pyllmlite.sizing.plot import draw

    if plot is not None:
        check_plot(plot)
    if gpu is not None and (measure or threads is not None):
        option = "--measure" if measure else "--threads"
        raise ConfigError(f"{option} is about this machine, not about a GPU; leave out --gpu")
    if kv_dtype not in ("f32", "bf16", "int8"):
        raise ConfigError(f"--kv-dtype is f32, bf16 or int8, got {kv_dtype!r}")
    spec, source = open_headers(model, whole=measure)
    if gpu is not None:
        find_device(gpu)  # a typing mistake is said first
    if context is None:
        context = min(1024, spec.max_position_embeddings)
    if context > spec.max_position_embeddings:
        raise ConfigError(
            f"--context {context} is more than the model's {spec.max_position_embeddings} positions"
        )
    if measure:
        if source is None:
            raise ConfigError("--measure needs the weights, not a config alone")
        check_runs_in(source, format)
    chosen, others = formats_of(spec, source, format, on_gpu=gpu is not None)
    where, machine, efficiency, available = describe_machine(
        spec, chosen, gpu, threads, measure, kv_dtype
    )
    made = make_plan(
        spec,
        chosen,
        machine,
        efficiency,
        available if memory is None else parse_bytes(memory),
        where=where,
        formats=others,
        context=context,
        kv_dtype=kv_dtype,
        batches=tuple(sorted(set(batch))) if batch else BATCHES,
        price_per_hour=price_per_hour,
    )
    measured = _sweep(model, made, batch, threads) if measure else []
    if plot is not None:
        draw(made, plot, [(row["batch"], row["seconds"]) for row in measured])
    if json:
        result = as_dict(made)
        if measure:
            result["measured"] = _measured_dict(made, measured)
        print_json(result)
        return
    _print(made, measured, price_per_hour is not None)


def open_headers(model: str | None, whole: bool = False) -> tuple[Any, ModelSource | None]:
    """The spec, and the checkpoint if there is one: a config alone will do, and of a model on the
    hub it is all that is fetched (``whole``: it is fetched entirely)."""
    from pyllmlite.model.hub import hub_config
    from pyllmlite.model.source import open_model, spec_of_config

    path = None if model is None else Path(model)
    if model is not None and not whole:
        path = hub_config(model) or path
    if path is not None and path.is_dir() and (path / "config.json").is_file():
        if not any(path.glob("*.safetensors")) and not any(path.glob("*.bin")):
            path = path / "config.json"
    if path is not None and path.is_file() and path.suffix == ".json":
        return spec_of_config(path), None
    source = open_model(model)
    return source.spec, source


def check_runs_in(source: ModelSource, format: str | None) -> None:
    """``ConfigError`` where the engine would keep the checkpoint's codes whatever is asked."""
    from pyllmlite.core.errors import ConfigError

    if format in ("bf16", "f32") and source.quantized:
        raise ConfigError(
            f"the checkpoint is stored in {source.stored_dtype} codes, which the engine keeps; "
            f"to run it in {format}, take one that was not quantized"
        )


def formats_of(
    spec: Any, source: ModelSource | None, name: str | None, on_gpu: bool
) -> tuple[Weights, list[Weights]]:
    from pyllmlite.core.errors import ConfigError
    from pyllmlite.hooks.registry import Registry
    from pyllmlite.sizing.footprint import FORMATS, as_on_gpu, weights_in

    registry = Registry.load()
    made = {
        key: weights_in(spec, options, None, key, registry) for key, options in FORMATS.items()
    }
    if source is not None:
        made = {"stored": weights_in(spec, {}, source, "stored", registry), **made}
    if name is None:
        name = "stored" if source is not None else "bf16"
    if name not in made:
        raise ConfigError(f"--format is one of {', '.join(made)}, got {name!r}")
    if on_gpu:
        made = {key: as_on_gpu(weights) for key, weights in made.items()}
    chosen = made.pop(name)
    return chosen, list(made.values())


def describe_machine(
    spec: Any,
    weights: Weights,
    gpu: str | None,
    threads: int | None = None,
    measure: bool = False,
    kv_dtype: str = "bf16",
) -> tuple[str, Any, Any, float]:
    """In words, its peaks, what kernels reach of them, and the bytes that may be used."""
    import os

    from pyllmlite.model.build import available_memory
    from pyllmlite.runtime.native import native
    from pyllmlite.sizing import measure_machine
    from pyllmlite.sizing.devices import find_device
    from pyllmlite.sizing.kernels import measure_kernels
    from pyllmlite.sizing.steptime import CPU, GPU

    if gpu is not None:
        device = find_device(gpu)
        where = f"{device.name} ({device.source})"
        return where, device.machine, GPU, MEMORY_SHARE * device.memory_bytes
    pool = native().ThreadPool(threads or len(os.sched_getaffinity(0)))
    machine = measure_machine(pool=pool, seconds=0.5 if measure else 0.15)
    efficiency = CPU
    if measure:
        efficiency = measure_kernels(spec, weights, machine, pool, kv_dtype)
    return f"this machine ({machine})", machine, efficiency, MEMORY_SHARE * available_memory()


def _sweep(
    model: str | None, plan: Plan, batches: list[int] | None, threads: int | None
) -> list[dict[str, Any]]:
    """Decode steps of the real engine, with contexts around the plan's, as far as they fit."""
    from pyllmlite.cli.generate import load
    from pyllmlite.engine.speed import measure as run
    from pyllmlite.sizing.roofline import decode

    sizes = [b for b in batches or SWEEP if b <= max(1, plan.max_sequences)]
    steps = min(32, max(2, plan.context // 4))
    longest = plan.spec.max_position_embeddings - steps - 1
    prompt = max(1, min(plan.context - steps // 2, longest))
    engine: dict[str, Any] = {**plan.weights.options, "kv_cache_dtype": plan.kv.dtype}
    engine |= {"max_num_seqs": max(sizes), "max_model_len": prompt + steps + 1}
    engine |= {"enable_prefix_caching": False}
    if threads is not None:
        engine["threads"] = threads
    llm = load(model, engine)
    run(llm, 1, min(prompt, 64), 2)  # first touch of the weights
    rows = []
    for number in sizes:
        if sys.stderr.isatty():
            print(f"batch {number} ...", end="\r", file=sys.stderr, flush=True)
        found = run(llm, number, prompt, steps + 1)
        predicted = plan.model.step(decode(number, plan.context)).seconds
        rows.append(
            {
                "batch": number,
                "seconds": found["seconds_per_step"],
                "predicted_seconds": predicted,
                "ratio": predicted / found["seconds_per_step"],
            }
        )
    built = llm.built
    rows[0]["weight_bytes"] = built.weight_bytes
    return rows


def _measured_dict(plan: Plan, rows: list[dict[str, Any]]) -> dict[str, Any]:
    from pyllmlite.sizing.plan import knee_in

    return {
        "steps": rows,
        "knee": knee_in([(row["batch"], row["seconds"]) for row in rows]),
        "predicted_knee": knee_in([(row["batch"], row["predicted_seconds"]) for row in rows]),
        "weight_bytes": rows[0]["weight_bytes"],
    }


def _print(plan: Plan, measured: list[dict[str, Any]], priced: bool) -> None:
    spec, kv = plan.spec, plan.kv
    print(f"model    {spec.architecture}, {spec.num_layers} layers, hidden {spec.hidden_size}, "
          f"{spec.num_heads} heads, {spec.num_kv_heads} KV heads of {spec.head_dim}")  # fmt: skip
    print(f"machine  {plan.where}")
    print(f"memory   {size(plan.memory_bytes)} for weights and KV\n")
    print_table(
        ("weights", "total", "bits/weight", "layers", "embeddings", "head", "fits"),
        [
            (
                one.name + (" *" if one is plan.weights else ""),
                size(one.nbytes),
                round(one.bits_per_weight, 2),
                *(size(part) for part in one.by_part().values()),
                "yes" if one.nbytes < plan.memory_bytes else "no",
            )
            for one in (plan.weights, *plan.formats)
        ],
    )
    per_token = kv.bytes_per_token
    layers = sum(count for count, _ in kv.windows)
    print(
        f"\nKV       {size(per_token)} a token = {kv.element_bytes:g} bytes x 2 x {layers} layers "
        f"x {kv.num_kv_heads} KV heads x {kv.head_dim}; with MHA {size(per_token * kv.mha_factor)}"
    )
    print(
        f"         {size(kv.sequence_bytes(plan.context))} a sequence of {plan.context} tokens: "
        f"{plan.max_sequences} fit; one alone may have {plan.longest} tokens"
    )
    knee = plan.knee
    print(
        f"B*       {knee.weights_only:.1f} sequences by weights alone at the peaks; with KV "
        f"{_or_never(knee.with_kv)}; with what kernels reach {_or_never(knee.reached)}"
    )
    print(f"prefill  {1e3 * plan.prefill_seconds:.1f} ms for {plan.context} tokens")
    print(f"         kernels: {plan.efficiency.source}\n")
    head = ["batch", "step ms", "waits for", "tok/s", "tok/s each", "KV", "fits"]
    head += ["cost/M tokens"] if priced else []
    print_table(
        head,
        [
            (
                row.batch,
                round(1e3 * row.timing.seconds, 3),
                "memory" if row.timing.memory >= row.timing.compute else "arithmetic",
                round(row.tokens_per_second, 1),
                round(1 / row.timing.seconds, 1),
                size(row.kv_bytes),
                "yes" if row.fits else "no",
                *((round(row.cost_per_million or 0.0, 4),) if priced else ()),
            )
            for row in plan.rows
        ],
    )
    if measured:
        told = _measured_dict(plan, measured)
        print(f"\nmeasured, {size(told['weight_bytes'])} of weights")
        print_table(
            ("batch", "step ms", "predicted ms", "ratio"),
            [
                (
                    row["batch"],
                    round(1e3 * row["seconds"], 2),
                    round(1e3 * row["predicted_seconds"], 2),
                    round(row["ratio"], 2),
                )
                for row in measured
            ],
        )
        print(f"knee: measured {_or_never(told['knee'])}, "
              f"predicted {_or_never(told['predicted_knee'])}")  # fmt: skip


def _or_never(knee: float | None) -> str:
    return "never" if knee is None else f"{knee:.1f}"
