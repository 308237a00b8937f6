"""A trained module as a Hugging Face directory, and the card that says how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyllmlite.compress.model_files import DTYPES, write_tokenizer_files
from pyllmlite.compress.shard import disk_errors, write_text
from pyllmlite.model.hub import DEFAULT_MODEL

if TYPE_CHECKING:
    from pyllmlite.model.source import ModelSource

FACTS = "distill.json"


def name_of(model: str | None, source: ModelSource) -> str:
    """What a card calls the model that was asked for: its alias or hub id, or the name of its
    directory, since a path means nothing elsewhere."""
    if model is not None and Path(model).expanduser().exists():
        return source.path.name
    return model or DEFAULT_MODEL


def write_module(module: Any, tokenizer_of: ModelSource, directory: Path, dtype: str) -> None:
    """Weights (safetensors), config, tokenizer and chat template.

    Args:
        tokenizer_of: The model whose tokenizer it has.
        dtype: f32, bf16 or f16; the module is left in it.
    """
    import torch
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar of its own over one file
    with disk_errors(directory, "writing the student"):
        module.to(getattr(torch, DTYPES[dtype])).save_pretrained(directory)
        write_tokenizer_files(tokenizer_of, directory)
    if shown:
        logging.enable_progress_bar()


def write_card(directory: Path, name: str, facts: dict[str, Any]) -> None:
    """``README.md`` for people and model hubs, ``distill.json`` for programs."""
    write_text(directory / FACTS, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    write_text(directory / "README.md", card(name, facts))


def card(name: str, facts: dict[str, Any]) -> str:
    """README.md in the form that model hubs read."""
    teacher, text, train = facts["teacher"], facts["text"], facts["training"]
    lines = ["---", "library_name: transformers", "tags:", "- distillation"]
    if "/" in teacher:  # a hub id: see name_of
        lines.append(f"base_model: {teacher}")
    lines += ["---", "", f"# {name}", "", f"`{facts['student']}` of `{teacher}`, distilled with "
              f"{facts['made_by']}.", "", "## How", "", "| | |", "| --- | --- |"]  # fmt: skip
    rows = {
        "weights": f"{facts['weights'] / 1e6:.1f} M, {facts['trained'] / 1e6:.1f} M trained",
        "mode": facts["mode"],
        "divergence": facts.get("divergence"),
        "text": f"{text['kept']} of {text['records']} answers that the teacher wrote, "
        f"{text['tokens']} tokens",
        "teacher's distributions": facts.get("stored"),
        "steps": f"{train['steps']} of {train['sequences_per_step']} sequences",
        "tokens trained on": str(train["tokens"]),
        "learning rate": f"{train['learning_rate']:g}, {train['schedule']}",
        "seed": str(train["seed"]),
    }
    lines += [f"| {word} | {value} |" for word, value in rows.items() if value]
    lines += ["", "## Beside its teacher", ""]
    before, after = facts.get("before"), facts.get("after")
    if not before or not after:
        return "\n".join([*lines, "It was not measured."]) + "\n"
    lines += [
        f"On {after['answers']} answers of the teacher that were not trained on "
        f"({after['tokens']} tokens), whole vocabulary.",
        "",
        "| | before | after |",
        "| --- | --- | --- |",
        f"| KL divergence, nats a token | {before['kl']:.4f} | {after['kl']:.4f} "
        f"± {after['kl_error']:.4f} |",
        f"| same likeliest token | {before['agreement']:.1%} | {after['agreement']:.1%} |",
    ]
    draft = facts["draft"]
    needed = draft["needed_acceptance"]
    pays = (
        "cannot pay"
        if needed is None
        else f"pays from an acceptance of {needed:.0%} on, by that estimate"
    )
    lines += [
        "",
        f"As a draft for its teacher, both in the same format, a step reads {draft['cost']:.0%} "
        f"of the teacher's bytes: it {pays}. How often the likeliest tokens agree is what to "
        "expect of the acceptance.",
    ]
    return "\n".join(lines) + "\n"
