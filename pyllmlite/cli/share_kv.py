"""``pyllmlite share-kv``: fewer KV heads, and a short training that wins back what it lost."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pyllmlite.cli.output import print_json, print_table
from pyllmlite.cli.qat import Notes


def share_kv(
    model: Annotated[
        str | None, typer.Argument(help="Alias, hub id or path.", show_default="smollm2-135m")
    ] = None,
    kv_heads: Annotated[
        int | None,
        typer.Option(help="KV heads it will have; 1: multi-query.", show_default=False),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="Directory that is made.", show_default=False),
    ] = None,
    pooling: Annotated[
        str, typer.Option(help="mean of the heads; svd: in the bases where it loses least.")
    ] = "mean",
    grouping: Annotated[
        str, typer.Option(help="Heads that share: consecutive, or similar ones.")
    ] = "consecutive",
    tokens: Annotated[
        int | None, typer.Option(min=0, help="Tokens to train on; 0: none.", show_default=False)
    ] = None,
    trained_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="In the place of --tokens: what the model was trained on.",
            show_default=False,
        ),
    ] = None,
    share: Annotated[float, typer.Option(help="Share of --trained-tokens to train on.")] = 0.05,
    text: Annotated[
        str,
        typer.Option(
            help="Text to train on: self (the model writes it), a .txt or .jsonl file, or the name "
            "of a data set."
        ),
    ] = "self",
    num_sequences: Annotated[
        int | None,
        typer.Option(min=1, help="Windows of text.", show_default="none is seen twice"),
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens of each.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Windows of a micro-batch.")] = 8,
    grad_accumulation: Annotated[int, typer.Option(help="Micro-batches of a step.")] = 1,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr")] = 3e-4,
    task_weight: Annotated[
        float,
        typer.Option(
            help="Share of the next token's cross entropy in the loss; the rest is the KL "
            "divergence to the model as it was."
        ),
    ] = 0.0,
    dtype: Annotated[
        str, typer.Option(help="Of the products in training: float32 or bfloat16.")
    ] = "float32",
    out_dtype: Annotated[
        str | None,
        typer.Option(help="Of the result: f32, bf16, f16.", show_default="the model's"),
    ] = None,
    save_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints.")] = 50,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="Replace --out, when the new one is complete.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an interrupted run left.")
    ] = False,
    eval_windows: Annotated[
        int, typer.Option(min=0, help="Windows of text the losses are measured on; 0: they are not")
    ] = 8,
    eval_length: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 256,
    eval_text: Annotated[
        str | None, typer.Option(help="A file of text.", show_default="Python's own help")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Let query heads share key and value heads: the KV cache shrinks.

    Multi-head attention becomes grouped- or multi-query attention (Ainslie et al. 2023): the heads
    of a group are pooled, and a short training wins back most of what that lost.
    """
    from pyllmlite.compress.learn.share_kv import ShareSettings
    from pyllmlite.compress.learn.share_kv import share_kv as run
    from pyllmlite.core.errors import ConfigError

    if out is None or kv_heads is None:
        raise ConfigError("say how many heads and where the new model goes: --kv-heads N --out DIR")
    settings = ShareSettings(
        kv_heads=kv_heads, pooling=pooling, grouping=grouping, tokens=tokens, share=share,
        trained_tokens=trained_tokens, text=text, num_sequences=num_sequences, seq_len=seq_len,
        batch_size=batch_size, grad_accumulation=grad_accumulation, learning_rate=learning_rate,
        task_weight=task_weight, seed=seed, dtype=out_dtype, precision=dtype,
        save_every=save_every, device=device,
    )  # fmt: skip
    result = run(
        model,
        out,
        settings,
        force=force,
        restart=restart,
        eval_windows=eval_windows,
        eval_length=eval_length,
        eval_text=eval_text,
        note=Notes(),
    )
    if json:
        print_json({"path": str(result.path), "seconds": result.seconds, **result.facts})
        return
    _print(str(result.path), result.facts)


def _print(path: str, facts: dict[str, Any]) -> None:
    heads, kv, losses = facts["heads"], facts["kv_bytes_per_token"], facts["losses"]
    print(f"{path}: {heads['query']} query heads, {heads['kv_now']} KV heads (were {heads['kv']})")
    words = (("before", "as it was"), ("pooled", "heads pooled"), ("trained", "and trained"))
    rows: list[list[Any]] = []
    for key, word in words:
        if key in losses:
            found = losses[key]
            size = kv["before"] if key == "before" else kv["after"]
            rows.append(
                [word, round(size), round(found["cross_entropy"], 4), round(found.get("kl", 0), 4)]
            )
    if not rows:
        print(f"KV cache: {kv['after']:.0f} bytes a token in bf16, {kv['before']:.0f} before")
        return
    print_table(["", "KV bytes a token", "loss", "KL"], rows)
    if facts["won_back"] is not None:
        print(
            f"training on {facts['training']['tokens']} tokens won back {facts['won_back']:.0%} of "
            f"the loss that pooling cost; {facts['windows']} windows of {facts['text']}"
        )
