"""The files beside the weights: config, generation config, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from pyllmlite.compress.hf_view import HFView
from pyllmlite.compress.shard import disk_errors, write_text
from pyllmlite.core.errors import ModelError
from pyllmlite.model.gguf import GGUFCheckpoint
from pyllmlite.model.source import ModelSource

PATTERNS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece*.model", "*.tiktoken",
    "tekken.json", "chat_template*", "additional_chat_templates/*.jinja", "LICENSE*", "NOTICE*",
    "USE_POLICY*",
)  # fmt: skip
DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
# model_type to the class that transformers loads, and its words where they are not Llama's.
CLASSES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM", "gpt2": "GPT2LMHeadModel", "bloom": "BloomForCausalLM",
    "mpt": "MptForCausalLM",
}  # fmt: skip
TYPES = {"gemma3": "gemma3_text"}
_GPT = {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
WORDS = {
    "gpt2": {
        **_GPT, "hidden_size": "n_embd", "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
    },
    "bloom": _GPT,
    "mpt": {
        "hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
        "max_position_embeddings": "max_seq_len",
    },
}  # fmt: skip


def write_model_files(
    view: HFView, directory: Path, quantization: dict[str, Any] | None, dtype: str
) -> None:
    """Everything but the weights.

    Args:
        quantization: ``quantization_config``; None: nothing is quantized.
        dtype: Of the float tensors.
    """
    source = view.source
    if isinstance(source.checkpoint, GGUFCheckpoint):
        config = gguf_to_hf_config(source)
        _export_tokenizer(source, directory)
        generation = {
            "bos_token_id": config.get("bos_token_id"),
            "eos_token_id": config.get("eos_token_id"),
        }
        chosen = {word: value for word, value in generation.items() if value is not None}
        _write_json(directory / "generation_config.json", chosen)
    else:
        config = {k: v for k, v in source.config.items() if k != "quantization_config"}
        _copy_files(source.path, directory)
    for word in {"torch_dtype", "dtype"} & set(config) or {"torch_dtype"}:
        config[word] = DTYPES[dtype]
    if quantization is not None:
        config["quantization_config"] = quantization
    _write_json(directory / "config.json", config)


def gguf_to_hf_config(source: ModelSource) -> dict[str, Any]:
    """The config of a GGUF file as transformers' own class of the family writes it.

    Raises:
        ModelError: A family whose config cannot be written so.
    """
    kind = str(source.config["model_type"])
    kind = TYPES.get(kind, kind)
    if kind not in CLASSES:
        raise ModelError(f"{source.path}: the config of a {kind} GGUF cannot be written")
    config: dict[str, Any] = {"architectures": [CLASSES[kind]], "model_type": kind}
    words = WORDS.get(kind, {})
    for word, value in source.config.items():
        if word != "model_type" and value is not None:
            if isinstance(value, float):  # stored as float32: 1e-05, not 9.99999974e-06
                value = float(str(np.float32(value)))
            config[words.get(word, word)] = value
    spec = source.spec
    config["tie_word_embeddings"] = spec.tie_embeddings
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict):
        config["rope_scaling"] = scaling = {k: v for k, v in scaling.items() if v is not None}
    if kind == "phi3":
        own = (scaling or {}).get("original_max_position_embeddings")
        config["original_max_position_embeddings"] = own or config["max_position_embeddings"]
        config["pad_token_id"] = config.get("pad_token_id")
    if kind in ("gemma2", "gemma3_text"):
        config["layer_types"] = [
            "full_attention" if layer.window is None else "sliding_attention"
            for layer in spec.layers
        ]
        config["hidden_activation"] = "gelu_pytorch_tanh"
        scale = config.pop("attention_scale", None)
        if scale is not None:
            scalar, whole = scale**-2, round(scale**-2)
            config["query_pre_attn_scalar"] = (
                whole if abs(scalar - whole) < 1e-4 * scalar else scalar
            )
        config.pop("sliding_window_pattern", None)
    if kind == "mpt":
        config["expansion_ratio"] = spec.intermediate_size // spec.hidden_size
        config.pop("intermediate_size", None)
        config["attn_config"] = {
            word: int(value) if isinstance(value, float) and value.is_integer() else value
            for word, value in config.get("attn_config", {}).items()
            if value is not None
        }
    if kind == "qwen2" and spec.windows == (None,):
        config["use_sliding_window"] = False
    return config


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
