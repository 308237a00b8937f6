"""Llama 2 and 3, and Mistral, which adds a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pyllmlite.core.spec import ModelSpec
from pyllmlite.model.architectures.base import (
    LLAMA_TENSORS,
    Architecture,
    Config,
    decoder_spec,
    linear,
    num_layers_of,
    sliding_layers,
    unpermuted,
    window_of,
    windowed_layers,
)


def llama(config: Config) -> ModelSpec:
    return decoder_spec(config, "llama")


def mistral(config: Config) -> ModelSpec:
    windows = sliding_layers(config, num_layers_of(config), window_of(config))
    return decoder_spec(config, "mistral", layers=windowed_layers(config, windows))


def _q_order(spec: ModelSpec) -> np.ndarray:
    return unpermuted(spec.num_heads, spec.head_dim)


def _k_order(spec: ModelSpec) -> np.ndarray:
    return unpermuted(spec.num_kv_heads, spec.head_dim)


# GGUF's llama rotates neighbouring pairs, so its converter reorders the rows of q and k.
_GGUF = {
    **linear("layers.{i}.q", "blk.{i}.attn_q", _q_order),
    **linear("layers.{i}.k", "blk.{i}.attn_k", _k_order),
}


def _named_after_its_window(config: dict[str, Any], metadata: Mapping[str, Any]) -> None:
    """GGUF calls Mistral llama too; Llama itself has no window."""
    if config.get("sliding_window"):
        config["model_type"] = "mistral"


ARCHITECTURES = (
    Architecture(
        ("llama",), llama, LLAMA_TENSORS, gguf_tensors=_GGUF, gguf_config=_named_after_its_window
    ),
    Architecture(("mistral",), mistral, LLAMA_TENSORS, gguf_tensors=_GGUF),
)
