"""``pyllmlite bench``: tokens per second, where the time goes, and what the engine costs."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any

import typer

from pyllmlite.cli.generate import load
from pyllmlite.cli.options import ENGINE, shared
from pyllmlite.cli.output import print_json, print_table

app = typer.Typer(add_completion=False, rich_markup_mode=None, invoke_without_command=True)


def profile_by_op(profile: list[tuple[str, int, float]]) -> list[dict[str, Any]]:
    """Time per op, the layers' ops taken together (``layers.*.qkv``), the longest first."""
    total: dict[str, list[float]] = {}
    for name, calls, seconds in profile:
        entry = total.setdefault(re.sub(r"^layers\.\d+\.", "layers.*.", name), [0, 0.0])
        entry[0] += calls
        entry[1] += seconds
    everything = sum(seconds for _, seconds in total.values()) or 1.0
    return [
        {"op": op, "calls": int(calls), "seconds": seconds, "share": seconds / everything}
        for op, (calls, seconds) in sorted(total.items(), key=lambda item: -item[1][1])
    ]


@app.callback()
@shared(engine=ENGINE)
def bench(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Alias, hub id or path.", show_default="smollm2-135m"),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            "--batch", "-b", min=1, help="Batch size; more than once: each.", show_default="1 8 32"
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of each prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated from each.")] = 64,
    profile: Annotated[bool, typer.Option("--profile", help="Time per op, too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    *,
    engine: dict[str, Any],
) -> None:
    """Measure prefill, decode, and the engine itself (bench overhead)."""
    if context.invoked_subcommand is not None:
        return
    from pyllmlite.engine.speed import measure

    batches = batch or [1, 8, 32]
    engine.setdefault("max_num_seqs", max(batches))
    engine.setdefault("max_model_len", prompt_tokens + new_tokens)
    engine.setdefault("enable_prefix_caching", False)
    llm = load(model, engine)
    measure(llm, 1, prompt_tokens, 2)  # first touch of the weights
    rows, profiles = [], {}
    for size in batches:
        if sys.stderr.isatty():
            print(f"batch {size} ...", end="\r", file=sys.stderr, flush=True)
        if profile:
            llm.built.program.set_profiling(True)
        rows.append(measure(llm, size, prompt_tokens, new_tokens))
        if profile:
            profiles[size] = profile_by_op(llm.built.program.profile())
            llm.built.program.set_profiling(False)
    if json:
        result: dict[str, Any] = {"model": llm.model, "dtype": llm.built.dtype}
        result |= {"threads": llm.built.threads, "results": rows}
        if profile:
            result["profile"] = [{"batch": size, "ops": ops} for size, ops in profiles.items()]
        print_json(result)
        return
    print_table(
        ("batch", "prefill tok/s", "decode tok/s", "TTFT ms", "step ms", "decode GB/s"),
        [
            (
                row["batch"],
                round(row["prefill_tokens_per_second"], 1),
                round(row["decode_tokens_per_second"], 1),
                round(1e3 * row["time_to_first_token"], 1),
                round(1e3 * row["seconds_per_step"], 2),
                round(row["decode_bytes_per_second"] / 1e9, 1),
            )
            for row in rows
        ],
    )
    for size, ops in profiles.items():
        print(f"\nbatch {size}: time per op, prefill and decode together")
        print_table(
            ("op", "calls", "ms", "us a call", "%"),
            [
                (
                    op["op"],
                    op["calls"],
                    round(1e3 * op["seconds"], 1),
                    round(1e6 * op["seconds"] / max(1, op["calls"]), 1),
                    round(100 * op["share"], 1),
                )
                for op in ops
            ],
        )


@app.command("overhead")
def overhead(
    batch: Annotated[
        list[int] | None,
        typer.Option(
            "--batch", "-b", min=1, help="Batch size; more than once: each.", show_default="1 16 64"
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a round.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    scheduler: Annotated[str, typer.Option(help="Scheduler by name.")] = "auto",
    cache: Annotated[str, typer.Option(help="KV cache by name.")] = "auto",
    decoder: Annotated[str, typer.Option(help="Decoder by name.")] = "sample",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What the engine itself costs: steps of a model of 2 layers, hidden size 64."""
    from pyllmlite.engine.overhead import BATCHES, measure_overhead

    result = measure_overhead(
        tuple(batch or BATCHES),
        steps,
        rounds,
        threads,
        scheduler=scheduler,
        cache=cache,
        decoder=decoder,
    )
    if json:
        print_json(result)
        return
    print_table(
        ("batch", "step us", "native us", "engine us", "step us (p10)"),
        [
            (r["batch"], r["step_us"], r["native_us"], r["engine_us"], r["step_us_p10"])
            for r in result["results"]
        ],
    )
