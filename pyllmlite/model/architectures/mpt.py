"""MPT: ALiBi, LayerNorm, no bias anywhere, q, k and v in one matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyllmlite.core.errors import ModelError
from pyllmlite.core.spec import LayerSpec, ModelSpec, NormSpec
from pyllmlite.model.architectures.base import (
    Architecture,
    Config,
    Take,
    TensorMap,
    decoder_spec,
    fused_qkv,
    linear,
    norm,
    num_layers_of,
)


def mpt(config: Config) -> ModelSpec:
    attention = Config(config.get("attn_config", default={}))
    for option in ("clip_qkv", "prefix_lm", "qk_ln", "rope", "attn_uses_sequence_id"):
        attention.refuse(option)
    attention.refuse("alibi", (None, True))
    hidden = config.integer("d_model", "hidden_size")
    heads = config.integer("n_heads", "num_attention_heads")
    kv_heads = attention.integer("kv_n_heads", default=heads)
    if attention.get("attn_type") == "multiquery_attention":
        kv_heads = 1
    logit_scale = config.get("logit_scale", default=1.0)
    if logit_scale == "inv_sqrt_d_model":
        logit_scale = hidden**-0.5
    if not isinstance(logit_scale, (int, float)):
        raise ModelError(f"config: logit_scale={str(logit_scale)[:40]} is not supported")
    scale = attention.get("softmax_scale")
    return decoder_spec(
        Config({**config.data, "num_key_value_heads": kv_heads}),
        "mpt",
        norm=NormSpec("layer", config.number("layer_norm_epsilon", default=1e-5)),
        activation="gelu",
        gated=False,
        alibi=True,
        alibi_bias_max=attention.number("alibi_bias_max", default=8.0),
        attention_scale=None if scale is None else float(scale),
        logit_scale=float(logit_scale),
        intermediate_size=config.integer(
            "intermediate_size", default=config.integer("expansion_ratio", default=4) * hidden
        ),
        layers=(LayerSpec(),) * num_layers_of(config),
        tie_embeddings=bool(config.data.get("tie_word_embeddings", True)),
    )


def _gguf_config(config: dict[str, Any], metadata: Mapping[str, Any]) -> None:
    config["attn_config"] = {
        "alibi_bias_max": config.get("max_alibi_bias", 8.0),
        "clip_qkv": config.get("clip_qkv") or None,
        "kv_n_heads": config.get("num_key_value_heads"),
    }


_L, _H = "layers.{i}.", "{p}blocks.{i}."
_TENSORS: TensorMap = {
    "embed": (Take("{p}wte.weight"),),
    **norm(_L + "attn_norm", _H + "norm_1"),
    **fused_qkv(_L, _H + "attn.Wqkv"),
    **linear(_L + "attn_out", _H + "attn.out_proj"),
    **norm(_L + "mlp_norm", _H + "norm_2"),
    **linear(_L + "up", _H + "ffn.up_proj"),
    **linear(_L + "down", _H + "ffn.down_proj"),
    **norm("final_norm", "{p}norm_f"),
    "head.weight": (Take("lm_head.weight"),),
}

ARCHITECTURES = (
    Architecture(
        ("mpt",), mpt, _TENSORS, prefixes=("transformer.", ""), gguf_config=_gguf_config
    ),
)
