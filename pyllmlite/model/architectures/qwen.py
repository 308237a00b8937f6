"""Qwen2 and 2.5 (bias on q, k and v; windows from some layer on) and Qwen3 (norms on q and k)."""

from __future__ import annotations

from pyllmlite.core.spec import ModelSpec
from pyllmlite.model.architectures.base import (
    LLAMA_TENSORS,
    Architecture,
    Config,
    Take,
    decoder_spec,
    num_layers_of,
    sliding_layers,
    window_of,
    windowed_layers,
)


def qwen(config: Config, name: str, qk_norm: bool) -> ModelSpec:
    count = num_layers_of(config)
    window = window_of(config) if config.flag("use_sliding_window") else None
    windows = sliding_layers(config, count, window)
    if config.get("layer_types") is None:
        first = config.integer("max_window_layers", default=28, low=0)
        windows = [window if i >= first else None for i in range(count)]
    layers = windowed_layers(config, windows)
    return decoder_spec(config, name, layers=layers, qk_norm=qk_norm)


_QK_NORM = {
    f"layers.{{i}}.{x}_norm": (Take(f"{{p}}layers.{{i}}.self_attn.{x}_norm.weight"),) for x in "qk"
}

ARCHITECTURES = (
    Architecture(("qwen2",), lambda c: qwen(c, "qwen2", qk_norm=False), LLAMA_TENSORS),
    Architecture(("qwen3",), lambda c: qwen(c, "qwen3", True), LLAMA_TENSORS | _QK_NORM),
)
