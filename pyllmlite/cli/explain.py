"""``pyllmlite explain``: what was selected for each hook and why, and the Program that runs."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pyllmlite.cli.generate import load
from pyllmlite.cli.options import ENGINE, shared
from pyllmlite.cli.output import count, print_json, print_table, size


def selections(built: Any) -> list[dict[str, Any]]:
    """For each hook the strategy, where it comes from, why, and why not the others."""
    return [
        {
            "hook": hook,
            "name": chosen.cls.name,
            "distribution": chosen.distribution,
            "version": chosen.version,
            "why": chosen.why,
            "rejected": [{"name": name, "reason": reason} for name, reason in chosen.rejected],
        }
        for hook, chosen in built.selections.items()
    ]


@shared(engine=ENGINE)
def explain(
    model: Annotated[
        str | None, typer.Argument(help="Alias, hub id or path.", show_default="smollm2-135m")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of the decode step shown.")] = 1,
    context: Annotated[int, typer.Option(min=1, help="Tokens each of them has so far.")] = 128,
    all: Annotated[bool, typer.Option("--all", help="Every layer, not only the first.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    *,
    engine: dict[str, Any],
) -> None:
    """Say what was selected for each hook; list the Program.

    For each op: its buffers, and the bytes and multiply-accumulates of one decode step.
    """
    built = load(model, engine).built
    ops = built.program.describe(batch, context)
    total_bytes, total_macs = sum(op["bytes"] for op in ops), sum(op["macs"] for op in ops)
    if json:
        print_json(
            {
                "architecture": built.spec.architecture,
                "num_layers": built.spec.num_layers,
                "dtype": built.dtype,
                "threads": built.threads,
                "max_model_len": built.max_model_len,
                "max_num_seqs": built.max_num_seqs,
                "max_num_batched_tokens": built.max_num_batched_tokens,
                "weight_bytes": built.weight_bytes,
                "weight_formats": built.weight_formats,
                "kv_bytes": built.cache.nbytes,
                "buffer_bytes": built.program.buffer_bytes,
                "selections": selections(built),
                "step": {"batch": batch, "context": context},
                "program": ops,
                "bytes": total_bytes,
                "macs": total_macs,
            }
        )
        return
    print(built.explain())
    shown = ops if all else [op for op in ops if not _is_repeat(op["op"])]
    print(f"\nprogram     decode step of {batch} at {context} tokens of context")
    print_table(
        ("op", "kind", "bytes", "macs", "buffers"),
        [
            (
                op["op"],
                op["kind"],
                size(op["bytes"]),
                count(op["macs"]),
                " ".join(op["buffers"][:4]) + (" ..." if len(op["buffers"]) > 4 else ""),
            )
            for op in shown
        ],
    )
    if len(shown) < len(ops):
        print(
            f"... and {len(ops) - len(shown)} ops of layers 1 to {built.spec.num_layers - 1} "
            "(--all lists them)"
        )
    print(f"{len(ops)} ops: {size(total_bytes)}, {count(total_macs)} multiply-accumulates")


def _is_repeat(name: str) -> bool:
    return name.startswith("layers.") and not name.startswith("layers.0.")
