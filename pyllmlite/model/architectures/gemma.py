"""Gemma 2 and 3 (text): norms before and after each block that multiply by ``1 + w``, GeGLU,
a scaled embedding, alternating local and global layers; soft-caps (2), q and k norms (3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyllmlite.core.spec import LayerSpec, ModelSpec, RopeSpec
from pyllmlite.model.architectures.base import (
    LLAMA_TENSORS,
    Architecture,
    Config,
    Take,
    TensorMap,
    decoder_spec,
    head_dim_of,
    norm,
    num_layers_of,
    rope_spec,
    sliding_layers,
    window_of,
    windowed_layers,
)


def _spec(config: Config, name: str, layers: tuple[LayerSpec, ...], **more: Any) -> ModelSpec:
    config.refuse("use_bidirectional_attention")
    scale = config.get("attention_scale")
    if scale is None:
        scale = config.number("query_pre_attn_scalar", default=256.0) ** -0.5
    return decoder_spec(
        config,
        name,
        layers=layers,
        activation=config.activation(
            "hidden_activation", "hidden_act", default="gelu_pytorch_tanh"
        ),
        post_norms=True,
        embedding_scale=config.integer("hidden_size") ** 0.5,
        attention_scale=float(scale),
        attention_softcap=config.number("attn_logit_softcapping", default=0.0),
        final_softcap=config.number("final_logit_softcapping", default=0.0),
        tie_embeddings=bool(config.data.get("tie_word_embeddings", True)),
        **more,
    )


def _every(config: Config, period: int) -> list[int | None]:
    """Local layers, every ``period``-th one global, unless the config lists them."""
    count, window = num_layers_of(config), window_of(config)
    if config.get("layer_types") is not None:
        return sliding_layers(config, count, window)
    period = config.integer("sliding_window_pattern", default=period)
    return [window if (i + 1) % period else None for i in range(count)]


def gemma2(config: Config) -> ModelSpec:
    config.data = {"sliding_window": 4096, "attn_logit_softcapping": 50.0,
                   "final_logit_softcapping": 30.0} | dict(config.data)  # fmt: skip
    return _spec(config, "gemma2", windowed_layers(config, _every(config, 2)))


def gemma3(config: Config) -> ModelSpec:
    if isinstance(config.get("text_config"), dict):  # the multimodal model's text part
        config = Config({**config.data, **config.get("text_config")})
    head_dim, windows = head_dim_of(config), _every(config, 6)
    full = rope_spec(config, head_dim, "full_attention", theta=1e6)
    nested = config.get("rope_parameters", default={})
    if isinstance(nested, dict) and "sliding_attention" in nested:
        local = rope_spec(config, head_dim, "sliding_attention")
    else:  # the older words; the scaling is the global layers' only
        theta = config.number("rope_local_base_freq", default=10000.0)
        local = RopeSpec(theta, full.rotary_dim, None, full.original_max_position)
    layers = tuple(LayerSpec(w, full if w is None else local) for w in windows)
    return _spec(config, "gemma3", layers, qk_norm=True)


_L, _H = "layers.{i}.", "{p}layers.{i}."
_TENSORS: TensorMap = {
    **LLAMA_TENSORS,
    **norm(_L + "attn_norm", _H + "input_layernorm", add=1.0),
    **norm(_L + "post_attn_norm", _H + "post_attention_layernorm", add=1.0),
    **norm(_L + "mlp_norm", _H + "pre_feedforward_layernorm", add=1.0),
    **norm(_L + "post_mlp_norm", _H + "post_feedforward_layernorm", add=1.0),
    _L + "q_norm": (Take(_H + "self_attn.q_norm.weight", add=1.0),),
    _L + "k_norm": (Take(_H + "self_attn.k_norm.weight", add=1.0),),
    **norm("final_norm", "{p}norm", add=1.0),
}


def _gguf(layers_of_27b: int, period: int) -> Any:
    """A GGUF does not state the divisor of the scores: the 27B models, known by their number of
    layers, take hidden_size / num_heads, the others head_dim (llama.cpp, llama-model.cpp)."""

    def adjust(config: dict[str, Any], metadata: Mapping[str, Any]) -> None:
        if "attention_scale" not in config and config.get("num_hidden_layers") == layers_of_27b:
            checked = Config(config)
            heads = checked.integer("num_attention_heads", high=65536)
            config["query_pre_attn_scalar"] = checked.integer("hidden_size") / heads
        elif "head_dim" in config:
            config["query_pre_attn_scalar"] = config["head_dim"]
        own = metadata.get(f"{config['model_type']}.attention.sliding_window_pattern")
        config["sliding_window_pattern"] = own if isinstance(own, int) else period
        local = metadata.get(f"{config['model_type']}.rope.freq_base_swa")
        if local is not None:
            config["rope_local_base_freq"] = local

    return adjust


ARCHITECTURES = (
    Architecture(("gemma2",), gemma2, _TENSORS, gguf_config=_gguf(46, 2)),
    Architecture(("gemma3", "gemma3_text"), gemma3, _TENSORS, gguf_config=_gguf(62, 6)),
)
