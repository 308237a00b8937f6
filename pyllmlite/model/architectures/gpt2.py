"""GPT-2: learned positions, LayerNorm, gelu_new; its Conv1D weights are ``[in, out]``."""

from __future__ import annotations

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


def gpt2(config: Config) -> ModelSpec:
    config.refuse("scale_attn_by_inverse_layer_idx")
    config.refuse("add_cross_attention")
    config.refuse("scale_attn_weights", (None, True))
    return decoder_spec(
        config,
        "gpt2",
        norm=NormSpec("layer", config.number("layer_norm_epsilon", default=1e-5)),
        activation=config.activation("activation_function", default="gelu_new"),
        gated=False,
        learned_positions=True,
        layers=(LayerSpec(),) * num_layers_of(config),
        tie_embeddings=bool(config.data.get("tie_word_embeddings", True)),
    )


_L, _H = "layers.{i}.", "{p}h.{i}."
_TENSORS: TensorMap = {
    "embed": (Take("{p}wte.weight"),),
    "position_embed": (Take("{p}wpe.weight"),),
    **norm(_L + "attn_norm", _H + "ln_1"),
    **fused_qkv(_L, _H + "attn.c_attn", transpose=True),
    **linear(_L + "attn_out", _H + "attn.c_proj", transpose=True),
    **norm(_L + "mlp_norm", _H + "ln_2"),
    **linear(_L + "up", _H + "mlp.c_fc", transpose=True),
    **linear(_L + "down", _H + "mlp.c_proj", transpose=True),
    **norm("final_norm", "{p}ln_f"),
    "head.weight": (Take("lm_head.weight"),),
}

ARCHITECTURES = (Architecture(("gpt2",), gpt2, _TENSORS, prefixes=("transformer.", "")),)
