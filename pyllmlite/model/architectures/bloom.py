"""BLOOM: ALiBi, a LayerNorm on the embedding, q, k and v interleaved head by head."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from pyllmlite.core.spec import LayerSpec, ModelSpec, NormSpec
from pyllmlite.model.architectures.base import (
    Architecture,
    Config,
    Take,
    TensorMap,
    decoder_spec,
    linear,
    norm,
    num_layers_of,
)


def bloom(config: Config) -> ModelSpec:
    config.refuse("apply_residual_connection_post_layernorm")
    return decoder_spec(
        config,
        "bloom",
        norm=NormSpec("layer", config.number("layer_norm_epsilon", default=1e-5)),
        activation="gelu_tanh",
        gated=False,
        alibi=True,
        embed_norm=True,
        layers=(LayerSpec(),) * num_layers_of(config),
        tie_embeddings=bool(config.data.get("tie_word_embeddings", True)),
    )


def _part(which: int) -> Callable[[ModelSpec], np.ndarray]:
    def rows(spec: ModelSpec) -> np.ndarray:
        fused = np.arange(3 * spec.q_size).reshape(spec.num_heads, 3, spec.head_dim)
        return fused[:, which].reshape(-1)

    return rows


_L, _H = "layers.{i}.", "{p}h.{i}."
_QKV = _H + "self_attention.query_key_value"
_TENSORS: TensorMap = {
    "embed": (Take("{p}word_embeddings.weight"),),
    **norm("embed_norm", "{p}word_embeddings_layernorm"),
    **norm(_L + "attn_norm", _H + "input_layernorm"),
    **linear(_L + "q", _QKV, _part(0)),
    **linear(_L + "k", _QKV, _part(1)),
    **linear(_L + "v", _QKV, _part(2)),
    **linear(_L + "attn_out", _H + "self_attention.dense"),
    **norm(_L + "mlp_norm", _H + "post_attention_layernorm"),
    **linear(_L + "up", _H + "mlp.dense_h_to_4h"),
    **linear(_L + "down", _H + "mlp.dense_4h_to_h"),
    **norm("final_norm", "{p}ln_f"),
    "head.weight": (Take("lm_head.weight"),),
}

ARCHITECTURES = (Architecture(("bloom",), bloom, _TENSORS, prefixes=("transformer.", "")),)
