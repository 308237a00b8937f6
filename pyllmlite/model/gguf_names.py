"""GGUF's own words: its metadata as a config, its tensor names as canonical ones.

Names: gguf-py's ``constants.py`` (``Keys`` and ``TENSOR_NAMES``).  What one family does
differently stands in its architecture file.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyllmlite.core.errors import ModelError
from pyllmlite.model.architectures.base import Take, TensorMap, k_rows, norm, q_rows, v_rows
from pyllmlite.model.gguf import GGUFCheckpoint

_L = "layers.{i}."
_B = "blk.{i}."


def _linear(canonical: str, name: str) -> TensorMap:
    return {f"{canonical}{end}": (Take(f"{name}{end}"),) for end in (".weight", ".bias")}


def _part(canonical: str, name: str, rows: Any) -> TensorMap:
    """A matrix of its own, or the rows of a fused one."""
    return {
        f"{canonical}{end}": (Take(f"{name}{end}"), Take(f"{_B}attn_qkv{end}", rows))
        for end in (".weight", ".bias")
    }


GGUF_TENSORS: TensorMap = {
    "embed": (Take("token_embd.weight"),),
    "position_embed": (Take("position_embd.weight"),),
    **norm("embed_norm", "token_embd_norm"),
    **norm(_L + "attn_norm", _B + "attn_norm"),
    **_part(_L + "q", _B + "attn_q", q_rows),
    **_part(_L + "k", _B + "attn_k", k_rows),
    **_part(_L + "v", _B + "attn_v", v_rows),
    _L + "q_norm": (Take(_B + "attn_q_norm.weight"),),
    _L + "k_norm": (Take(_B + "attn_k_norm.weight"),),
    **_linear(_L + "attn_out", _B + "attn_output"),
    **norm(_L + "post_attn_norm", _B + "post_attention_norm"),
    **norm(_L + "mlp_norm", _B + "ffn_norm"),
    **_linear(_L + "gate", _B + "ffn_gate"),
    **_linear(_L + "up", _B + "ffn_up"),
    **_linear(_L + "down", _B + "ffn_down"),
    **norm(_L + "post_mlp_norm", _B + "post_ffw_norm"),
    **norm("final_norm", "output_norm"),
    **_linear("head", "output"),
}

# Config key to metadata key (below the architecture's name).
_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention_scale": "attention.scale",
    "max_alibi_bias": "attention.max_alibi_bias",
    "clip_qkv": "attention.clamp_kqv",
}


def gguf_config(checkpoint: GGUFCheckpoint) -> dict[str, Any]:
    """The metadata as a config in transformers' words."""
    metadata = checkpoint.metadata
    name = metadata.get("general.architecture")
    if not isinstance(name, str):
        raise ModelError(f"{checkpoint.path}: the metadata names no general.architecture")
    config: dict[str, Any] = {"model_type": name}
    for key, theirs in _KEYS.items():
        value = metadata.get(f"{name}.{theirs}")
        if isinstance(value, np.ndarray):  # one value a layer
            if not len(value) or (value != value[0]).any():
                raise ModelError(
                    f"{checkpoint.path}: {name}.{theirs} differs from layer to layer, "
                    "which is not supported"
                )
            value = value[0].item()
        if value is not None:
            config[key] = value
    if "token_embd.weight" in checkpoint:
        config["vocab_size"] = checkpoint.tensor("token_embd.weight").rows
    config["tie_word_embeddings"] = "output.weight" not in checkpoint
    for key in ("bos", "eos"):
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token, int):
            config[f"{key}_token_id"] = token
    config["eos_token_id"] = end_tokens(metadata)
    _rope(checkpoint, name, config)
    return config


def end_tokens(metadata: dict[str, Any]) -> list[int]:
    """Ids that end an answer: end of text, of a turn, of a message."""
    keys = ("eos", "eot", "eom")
    found = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in keys)
    return list(dict.fromkeys(t for t in found if isinstance(t, int) and t >= 0))


def _rope(checkpoint: GGUFCheckpoint, name: str, config: dict[str, Any]) -> None:
    metadata = checkpoint.metadata
    dimensions = metadata.get(f"{name}.rope.dimension_count")
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    head_dim = config.get("head_dim")
    if head_dim is None and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        head_dim = hidden // heads
    if isinstance(dimensions, int) and isinstance(head_dim, int) and 0 < dimensions < head_dim:
        config["partial_rotary_factor"] = dimensions / head_dim

    kind = metadata.get(f"{name}.rope.scaling.type")
    original = metadata.get(f"{name}.rope.scaling.original_context_length")
    attention = metadata.get(f"{name}.rope.scaling.attn_factor")
    if "rope_factors_long.weight" in checkpoint:
        config["rope_scaling"] = {
            "rope_type": "longrope",
            "long_factor": _floats(checkpoint, "rope_factors_long.weight"),
            "short_factor": _floats(checkpoint, "rope_factors_short.weight"),
            "attention_factor": attention,
        }
    elif "rope_freqs.weight" in checkpoint:
        # Llama 3's scaling, worked out by the converter: a divisor for every frequency.
        factors = _floats(checkpoint, "rope_freqs.weight")
        config["rope_scaling"] = {
            "rope_type": "longrope",
            "long_factor": factors,
            "short_factor": factors,
            "attention_factor": 1.0,
            "factor": 1.0,
        }
    elif kind in ("linear", "yarn"):
        scaling = {"rope_type": kind, "factor": metadata.get(f"{name}.rope.scaling.factor")}
        if kind == "yarn":
            for key in ("beta_fast", "beta_slow"):
                scaling[key] = metadata.get(f"{name}.rope.scaling.yarn_{key}")
        config["rope_scaling"] = scaling
    if original is not None and "rope_scaling" in config:
        config["rope_scaling"]["original_max_position_embeddings"] = original


def _floats(checkpoint: GGUFCheckpoint, name: str) -> list[float]:
    if name not in checkpoint:
        raise ModelError(f"{checkpoint.path}: lacks {name}")
    tensor = checkpoint.tensor(name)
    if len(tensor.shape) != 1 or tensor.shape[0] > 4096:
        raise ModelError(f"{checkpoint.path}: {name} has shape {list(tensor.shape)}")
    return [float(x) for x in tensor.float32()]
