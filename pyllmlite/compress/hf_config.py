"""A GGUF file's config as transformers' own class of the family writes it."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyllmlite.core.errors import ModelError
from pyllmlite.model.source import ModelSource

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
