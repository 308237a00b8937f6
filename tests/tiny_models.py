"""Tiny random models of every architecture, saved by transformers.

``TINY[name](directory)`` writes one and returns its path; ``reference(path)`` loads it as
transformers' own float32 model with eager attention.  The sizes are chosen to be awkward: hidden
and intermediate sizes that no tile divides, MHA, GQA and MQA, windows shorter than the prompts,
every rope scaling with an original length that the longer prompts exceed where transformers'
prefill and decode agree.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

_BASE: dict[str, Any] = {
    "vocab_size": 331,
    "hidden_size": 72,
    "intermediate_size": 148,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}
_LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.05 * i for i in range(6)],
    "long_factor": [1.0 + 0.7 * i for i in range(6)],
}


def _make(config_class: str, changes: dict[str, Any], directory: str | Path) -> Path:
    import torch
    import transformers

    settings = {**_BASE, **changes}
    config = getattr(transformers, config_class)(
        **{key: value for key, value in settings.items() if value is not ...}
    )
    torch.manual_seed(sum(map(ord, config_class)) + len(repr(changes)))
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    with torch.no_grad():
        # Norms at ones and biases at zeros would hide a tensor that is mixed up or left out.
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * (0.2 if "norm" in name else 0.1))
    model.save_pretrained(directory)
    return Path(directory)


def _gpt(**more: Any) -> dict[str, Any]:
    """The words of GPT-2, BLOOM and MPT instead of Llama's."""
    dropped = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
               "num_key_value_heads", "max_position_embeddings", "pad_token_id")  # fmt: skip
    return {**dict.fromkeys(dropped, ...), "tie_word_embeddings": True, **more}


_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-mha": ("LlamaConfig", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "llama-mqa": ("LlamaConfig", {"num_key_value_heads": 1, "head_dim": 20}),
    "llama-bias": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 10000.0}},
    ),
    "llama-dynamic": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    ),
    "llama-yarn": ("LlamaConfig", {"rope_parameters": _YARN}),
    "llama3": ("LlamaConfig", {"rope_parameters": _LLAMA3}),
    "mistral": ("MistralConfig", {"sliding_window": 24}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": False}),
    "qwen2-window": (
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma2": (
        "Gemma2Config",
        {
            "head_dim": 16,
            "sliding_window": 19,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 10.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": 21,
            "query_pre_attn_scalar": 20,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            },
            "tie_word_embeddings": True,
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": 40, "original_max_position_embeddings": 1024}),
    "phi3-partial": (
        "Phi3Config",
        {
            "hidden_size": 96,
            "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 1024,
        },
    ),
    "phi3-longrope": (
        "Phi3Config",
        {"rope_parameters": _LONG, "original_max_position_embeddings": 320},
    ),
    "gpt2": (
        "GPT2Config",
        _gpt(n_embd=60, n_layer=3, n_head=5, n_positions=512, n_inner=150),
    ),
    "bloom": ("BloomConfig", _gpt(hidden_size=72, n_layer=3, n_head=6)),
    "mpt": ("MptConfig", _gpt(d_model=72, n_layers=3, n_heads=6, max_seq_len=512)),
}

TINY: dict[str, Callable[[str | Path], Path]] = {
    name: partial(_make, *arguments) for name, arguments in _MODELS.items()
}


def reference(path: str | Path) -> Any:
    """transformers' float32 model with eager attention."""
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
