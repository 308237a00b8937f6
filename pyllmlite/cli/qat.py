"""``pyllmlite qat``: a quantized model learns beside its float original."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from pyllmlite.cli.options import parse_extra
from pyllmlite.cli.output import print_json, size


def qat(
    model: Annotated[
        str | None, typer.Argument(help="Alias, hub id or path.", show_default="smollm2-135m")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="Directory that is made.", show_default=False),
    ] = None,
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8; 2 and 3 are stored in 4.")] = 4,
    group_size: Annotated[
        int, typer.Option(min=0, help="Columns that share a scale; 0: the row.")
    ] = 64,
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help="Without zero points, or with.")
    ] = False,
    start: Annotated[
        str,
        typer.Option(
            help="rtn, gptq or awq-gptq (pyllmlite plugins), or a directory that pyllmlite "
            "quantize made."
        ),
    ] = "gptq",
    layout: Annotated[
        str | None,
        typer.Option(
            help="compressed-tensors (pack-quantized), int-quantized, gptq or gptq_v2.",
            show_default="compressed-tensors",
        ),
    ] = None,
    out_dtype: Annotated[
        str | None,
        typer.Option(help="Of all other tensors: f32, bf16, f16.", show_default="the model's"),
    ] = None,
    text: Annotated[
        str,
        typer.Option(
            help="Text to train on: self (the model writes it), a .txt or .jsonl file, or the name "
            "of a data set."
        ),
    ] = "self",
    num_sequences: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 256,
    seq_len: Annotated[int, typer.Option(help="Tokens of each.")] = 256,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Windows of a micro-batch.")] = 8,
    grad_accumulation: Annotated[int, typer.Option(help="Micro-batches of a step.")] = 1,
    learning_rate: Annotated[
        float,
        typer.Option("--learning-rate", "--lr", help="Of the scales, as shares of their size."),
    ] = 1e-3,
    weight_rate: Annotated[
        float,
        typer.Option(help="Of the weights, in steps of the grid, times --lr; 0: they stay."),
    ] = 5.0,
    norm_rate: Annotated[
        float, typer.Option(help="Of norms and biases, times --lr; 0: they stay.")
    ] = 0.3,
    task_weight: Annotated[
        float, typer.Option(help="Share of the next token's cross entropy in the loss.")
    ] = 0.0,
    dtype: Annotated[
        str, typer.Option(help="Of the products in training: float32 or bfloat16.")
    ] = "float32",
    save_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints.")] = 25,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    extra: Annotated[
        list[str] | None,
        typer.Option(help="NAME=VALUE for the start's own option; may be repeated."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace --out, when the new one is complete.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an interrupted run left.")
    ] = False,
    eval_windows: Annotated[
        int, typer.Option(min=0, help="Windows of text the loss is measured on; 0: it is not.")
    ] = 8,
    eval_length: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 512,
    eval_text: Annotated[
        str | None, typer.Option(help="A file of text.", show_default="Python's own help")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of the measurement.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train a quantized model to give the distributions of its float original.

    Interrupted, the same command goes on at its last checkpoint.  The directory gets its name when
    it is complete; it is what pyllmlite quantize would write.
    """
    from pyllmlite.compress.learn.qat import QatSettings, qat_model
    from pyllmlite.core.errors import ConfigError

    if out is None:
        raise ConfigError("say where the new model goes: --out DIR")
    settings = QatSettings(
        bits=bits, group_size=group_size, symmetric=symmetric, start=start, layout=layout,
        dtype=out_dtype, text=text, num_sequences=num_sequences, seq_len=seq_len, seed=seed,
        steps=steps, batch_size=batch_size, grad_accumulation=grad_accumulation,
        learning_rate=learning_rate, weight_rate=weight_rate, norm_rate=norm_rate,
        task_weight=task_weight, precision=dtype, save_every=save_every, device=device,
        extra=parse_extra(extra),
    )  # fmt: skip
    result = qat_model(
        model,
        out,
        settings,
        force=force,
        restart=restart,
        eval_windows=eval_windows,
        eval_length=eval_length,
        eval_text=eval_text,
        note=Notes(),
        threads=threads,
    )
    total = sum(f.stat().st_size for f in result.path.rglob("*") if f.is_file())
    if json:
        print_json(
            {"path": str(result.path), "bytes": total, "seconds": result.seconds, **result.facts}
        )
        return
    trained = result.facts["training"]
    print(
        f"{result.path}: {size(total)}, {result.facts['bits_per_weight']:.2f} bits per weight; "
        f"trained on {trained['tokens']} tokens"
    )
    measured = result.facts["measured"]
    if measured:
        print(
            f"KL divergence {measured['kl']:.4f} ± {measured['kl_error']:.4f} nats per token, same "
            f"likeliest token {measured['top1_agreement']:.1%}, perplexity "
            f"{measured['perplexity']:.2f} (was {measured['reference_perplexity']:.2f})"
        )
        if measured["warning"]:
            print(f"beware: {measured['warning']}")


class Notes:
    """What is going on, on standard error: each kind of work once."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, text: str) -> None:
        kind = text.partition(":")[0]
        if kind != self._last:
            self._last = kind
            print(text, file=sys.stderr, flush=True)
