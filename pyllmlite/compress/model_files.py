"""The files beside the weights: config, generation config, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from pyllmlite.compress.hf_config import gguf_to_hf_config
from pyllmlite.compress.hf_view import HFView
from pyllmlite.compress.shard import disk_errors, write_text
from pyllmlite.model.gguf import GGUFCheckpoint
from pyllmlite.model.source import ModelSource

PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece*.model", "*.tiktoken",
    "tekken.json", "chat_template*", "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*",
    "USE_POLICY*",
)  # fmt: skip
DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def write_model_files(
    view: HFView, directory: Path, quantization: dict[str, Any] | None, dtype: str
) -> None:
    """Everything but the weights.

    Args:
        quantization: ``quantization_config``; None: nothing is quantized.
        dtype: Of the float tensors.
    """
    source = view.source
    write_tokenizer_files(source, directory)
    if isinstance(source.checkpoint, GGUFCheckpoint):
        config = gguf_to_hf_config(source)
        generation = {
            "bos_token_id": config.get("bos_token_id"),
            "eos_token_id": config.get("eos_token_id"),
        }
        chosen = {word: value for word, value in generation.items() if value is not None}
        _write_json(directory / "generation_config.json", chosen)
    else:
        config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    for word in {"torch_dtype", "dtype"} & set(config) or {"torch_dtype"}:
        config[word] = DTYPES[dtype]
    if quantization is not None:
        config["quantization_config"] = quantization
    _write_json(directory / "config.json", config)


def write_tokenizer_files(source: ModelSource, directory: Path) -> None:
    """Tokenizer, chat template and what else a checkpoint has beside weights and config."""
    if isinstance(source.checkpoint, GGUFCheckpoint):
        _export_tokenizer(source, directory)
    else:
        _copy_files(source.path, directory)


def _export_tokenizer(source: ModelSource, directory: Path) -> None:
    """A tokenizer.json from the vocabulary in the metadata."""
    checkpoint = source.checkpoint
    assert isinstance(checkpoint, GGUFCheckpoint)
    if "tokenizer.ggml.model" not in checkpoint.metadata:
        return
    tokenizer = source.tokenizer()
    write_text(directory / "tokenizer.json", tokenizer.backend.to_str(pretty=True))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": source.spec.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        **tokenizer.special_tokens,
    }
    if tokenizer.chat_templates:
        named = {"default": tokenizer.chat_template, **tokenizer.chat_templates}
        settings["chat_template"] = [
            {"name": name, "template": text} for name, text in named.items() if text
        ]
    elif tokenizer.chat_template:
        settings["chat_template"] = tokenizer.chat_template
    _write_json(directory / "tokenizer_config.json", settings)


def _copy_files(source: Path, directory: Path) -> None:
    for pattern in PATTERNS:
        for file in sorted(source.glob(pattern)):
            if file.is_file():
                target = directory / file.relative_to(source)
                with disk_errors(target, f"copying {file.name}"):
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, target)


def _write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
