"""``pyllmlite distill``: a teacher writes, a smaller student learns."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from pyllmlite.cli.options import parse_extra
from pyllmlite.cli.output import print_json


def distill(
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", "-t", help="Alias, hub id or path.", show_default="smollm2-135m"),
    ] = None,
    student: Annotated[
        str | None,
        typer.Option(
            "--student",
            "-s",
            help="A model of the same vocabulary, or what to keep of the teacher: layers=10, or "
            "layers=10,hidden=384,mlp=1024,heads=6,kv_heads=2.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="Directory that is made.", show_default=False),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="logits: the teacher's distributions; sequence: its words; on-policy: it scores "
            "what the student writes; text: only its words are written."
        ),
    ] = "logits",
    direction: Annotated[
        str | None,
        typer.Option(
            help="Of the KL divergence: forward, reverse, or the share of reverse, as 0.5.",
            show_default="forward; reverse on-policy",
        ),
    ] = None,
    kd_temperature: Annotated[float, typer.Option(help="Of both distributions.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Tokens that a stored distribution keeps.")] = 64,
    task_weight: Annotated[
        float, typer.Option(help="Share of the cross entropy with the teacher's words.")
    ] = 0.0,
    share: Annotated[
        float, typer.Option(help="on-policy: part of the batches that the student writes.")
    ] = 1.0,
    freeze_embeddings: Annotated[
        bool,
        typer.Option("--freeze-embeddings", help="Embedding and output matrix are not trained."),
    ] = False,
    prompts: Annotated[
        str,
        typer.Option(
            help="self (the teacher writes them), or a file: .txt, a prompt a line, or .jsonl with "
            "prompt, text or messages."
        ),
    ] = "self",
    num_sequences: Annotated[
        int | None,
        typer.Option(min=1, help="Answers to write.", show_default="one a prompt; 1000 for self"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 256,
    temperature: Annotated[
        float, typer.Option(help="The teacher writes at this temperature.")
    ] = 1.0,
    top_p: Annotated[float, typer.Option(help="And from these likeliest tokens.")] = 1.0,
    chat: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Prompts go through the chat template.")
    ] = True,
    min_tokens: Annotated[int, typer.Option(help="Shorter answers are dropped.")] = 8,
    max_repetition: Annotated[
        float, typer.Option(help="So are those in which more 4-grams than this came before.")
    ] = 0.5,
    min_confidence: Annotated[
        float, typer.Option(help="And those that the teacher held less likely, a token.")
    ] = 0.0,
    data: Annotated[
        str | None,
        typer.Option(help="A data.jsonl that was written before.", show_default=False),
    ] = None,
    held_out: Annotated[
        int, typer.Option(help="Answers that are measured on and not trained on.")
    ] = 32,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps.", show_default="by --epochs")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the text.")] = 1.0,
    batch_size: Annotated[int, typer.Option(help="Sequences of a micro-batch.")] = 8,
    grad_accumulation: Annotated[int, typer.Option(help="Micro-batches of a step.")] = 1,
    seq_len: Annotated[int, typer.Option(help="Tokens of a sequence, prompt included.")] = 512,
    learning_rate: Annotated[float, typer.Option("--learning-rate", "--lr")] = 5e-4,
    warmup: Annotated[float, typer.Option(help="Steps; below 1: share of all.")] = 0.05,
    schedule: Annotated[str, typer.Option(help="cosine, linear or constant.")] = "cosine",
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 0.0,
    clip_norm: Annotated[float, typer.Option(help="Largest norm of the gradient; 0: any.")] = 1.0,
    dtype: Annotated[
        str, typer.Option(help="Of the products in training: float32 or bfloat16.")
    ] = "float32",
    save_every: Annotated[int, typer.Option(min=0, help="Steps between checkpoints.")] = 100,
    eval_every: Annotated[
        int, typer.Option(min=0, help="Steps between measurements; 0: before and after only.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    teacher_option: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=VALUE of LLM for the teacher while it writes (quantizer=rtn, dtype=bf16); "
            "may be repeated."
        ),
    ] = None,
    scorer_dtype: Annotated[
        str, typer.Option(help="The teacher's weights while it scores: f32 or bf16.")
    ] = "f32",
    out_dtype: Annotated[
        str | None,
        typer.Option(help="Of the student: f32, bf16, f16.", show_default="the teacher's"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace --out, when the new one is complete.")
    ] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Throw away what an interrupted run left.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make a smaller model that answers as a larger one does.

    Interrupted, the same command goes on where it was.  The directory gets its name when it is
    complete.  Several processes: torchrun --nproc-per-node N -m pyllmlite.cli.main distill ...
    """
    from pyllmlite.compress.learn.distill import distill as run
    from pyllmlite.compress.learn.distill_settings import DistillSettings
    from pyllmlite.compress.learn.filters import Filters
    from pyllmlite.compress.learn.teacher_text import TextSettings
    from pyllmlite.core.errors import ConfigError

    if out is None:
        raise ConfigError("say where the new model goes: --out DIR")
    settings = DistillSettings(
        mode=mode,
        direction=_direction(direction),
        temperature=kd_temperature,
        top_k=top_k,
        task_weight=task_weight,
        share=share,
        freeze_embeddings=freeze_embeddings,
        held_out=held_out,
        data=data,
        epochs=epochs,
        text=TextSettings(
            prompts, num_sequences, max_tokens, temperature, top_p, chat, seed,
            Filters(min_tokens, max_repetition, min_confidence),
        ),
        train={
            "steps": steps, "batch_size": batch_size, "grad_accumulation": grad_accumulation,
            "seq_len": seq_len, "learning_rate": learning_rate, "warmup": warmup,
            "schedule": schedule, "weight_decay": weight_decay, "clip_norm": clip_norm,
            "dtype": dtype, "save_every": save_every, "eval_every": eval_every, "seed": seed,
            "device": device,
        },
        teacher_options=parse_extra(teacher_option),
        scorer_dtype=scorer_dtype,
        dtype=out_dtype,
    )  # fmt: skip
    result = run(
        teacher, student, out, settings, force=force, restart=restart, threads=threads, say=_say
    )
    if not result.first:
        return
    if json:
        print_json({"path": str(result.path), **result.facts})
        return
    print(_summary(str(result.path), result.facts))


def _summary(path: str, facts: dict[str, Any]) -> str:
    if "weights" not in facts:
        text = facts["text"]
        return f"{path}: {text['kept']} of {text['records']} answers kept, {text['tokens']} tokens"
    trained = facts["training"]
    lines = [
        f"{path}: {facts['weights'] / 1e6:.1f} M weights, trained on {trained['tokens']} tokens in "
        f"{trained['seconds']:.0f} s"
    ]
    before, after = facts["before"], facts["after"]
    if before and after:
        lines.append(
            f"KL divergence {after['kl']:.4f} ± {after['kl_error']:.4f} nats per token on unseen "
            f"text (was {before['kl']:.4f}), same likeliest token {after['agreement']:.1%} (was "
            f"{before['agreement']:.1%})"
        )
    draft = facts.get("draft")
    if draft and draft["needed_acceptance"] is not None:
        lines.append(
            f"as a draft for its teacher: pays from an acceptance of "
            f"{draft['needed_acceptance']:.0%} on, if both have the same format"
        )
    return "\n".join(lines)


def _direction(text: str | None) -> str | float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return text


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
