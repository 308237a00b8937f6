"""Phi-3 and 3.5: qkv in one matrix, gate and up in one, partial rotary, longrope."""

from __future__ import annotations

from pyllmlite.core.spec import ModelSpec
from pyllmlite.model.architectures.base import (
    LLAMA_TENSORS,
    Architecture,
    Config,
    decoder_spec,
    fused_qkv,
    gate_rows,
    linear,
    num_layers_of,
    up_rows,
    window_of,
    windowed_layers,
)


def phi3(config: Config) -> ModelSpec:
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("type") == "yarn":
        # Early Phi-3 configs called their longrope so.
        config = Config({**config.data, "rope_scaling": {**scaling, "type": "longrope"}})
    windows = [window_of(config)] * num_layers_of(config)
    return decoder_spec(config, "phi3", layers=windowed_layers(config, windows))


_L, _H = "layers.{i}.", "{p}layers.{i}."
_TENSORS = {
    **LLAMA_TENSORS,
    **fused_qkv(_L, _H + "self_attn.qkv_proj"),
    **linear(_L + "gate", _H + "mlp.gate_up_proj", gate_rows),
    **linear(_L + "up", _H + "mlp.gate_up_proj", up_rows),
}
_GGUF = {
    **linear(_L + "gate", "blk.{i}.ffn_up", gate_rows),
    **linear(_L + "up", "blk.{i}.ffn_up", up_rows),
}

ARCHITECTURES = (Architecture(("phi3",), phi3, _TENSORS, gguf_tensors=_GGUF),)
