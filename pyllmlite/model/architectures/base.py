"""What an architecture's file is made of: a checked config, tensor maps, and Llama's own layout,
from which most families differ in a few entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyllmlite.core.errors import ModelError
from pyllmlite.core.spec import LayerSpec, ModelSpec, NormSpec, RopeSpec
from pyllmlite.model.rope import SCALINGS

MAX_LAYERS = 4096
MAX_WIDTH = 1 << 20
MAX_VOCAB = 1 << 24

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "relu": "relu",
}


class Config:
    """A checkpoint's config with checked access.  Several names: the first that is set counts."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self.data = data

    def get(self, *names: str, default: Any = None) -> Any:
        for name in names:
            if self.data.get(name) is not None:
                return self.data[name]
        return default

    def integer(
        self, *names: str, default: int | None = None, low: int = 1, high: int = MAX_WIDTH
    ) -> int:
        value = self.get(*names, default=default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ModelError(
                f"config: {names[0]} must be an integer in {low}..{high}, got {str(value)[:60]}"
            )
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        value = self.get(*names, default=default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ModelError(f"config: {names[0]} must be a number, got {str(value)[:60]}")
        if not math.isfinite(value):
            raise ModelError(f"config: {names[0]} is {value}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        return bool(self.get(name, default=default))

    def activation(self, *names: str, default: str) -> str:
        word = self.get(*names, default=default)
        if not isinstance(word, str) or word not in _ACTIVATIONS:
            raise ModelError(
                f"config: activation {str(word)[:40]!r} is not known; known are "
                f"{', '.join(_ACTIVATIONS)}"
            )
        return _ACTIVATIONS[word]

    def refuse(self, name: str, allowed: tuple[Any, ...] = (None, False)) -> None:
        """An option that would change the computation in a way that is not built."""
        value = self.data.get(name)
        if value not in allowed:
            raise ModelError(f"config: {name}={str(value)[:40]} is not supported")


@dataclass(frozen=True)
class Take:
    """Where a canonical tensor comes from.

    Attributes:
        name: In the checkpoint; ``{i}`` is the layer, ``{p}`` the body's prefix.
        rows: Rows to take, from the spec: a slice or indices.
        transpose: The checkpoint has ``[in, out]``; applied before ``rows``.
        add: Added to every element (Gemma's ``1 + w``).
    """

    name: str
    rows: Callable[[ModelSpec], slice | np.ndarray] | None = None
    transpose: bool = False
    add: float = 0.0


# Canonical name (with {i}) to where it comes from; of several the first that is there counts.
TensorMap = dict[str, tuple[Take, ...]]


def linear(
    canonical: str,
    name: str,
    rows: Callable[[ModelSpec], slice | np.ndarray] | None = None,
    transpose: bool = False,
) -> TensorMap:
    """Weight and bias of a matrix."""
    return {
        f"{canonical}.weight": (Take(f"{name}.weight", rows, transpose),),
        f"{canonical}.bias": (Take(f"{name}.bias", rows),),
    }


def norm(canonical: str, name: str, add: float = 0.0) -> TensorMap:
    return {
        f"{canonical}.weight": (Take(f"{name}.weight", add=add),),
        f"{canonical}.bias": (Take(f"{name}.bias"),),
    }


def q_rows(spec: ModelSpec) -> slice:
    return slice(0, spec.q_size)


def k_rows(spec: ModelSpec) -> slice:
    return slice(spec.q_size, spec.q_size + spec.kv_size)


def v_rows(spec: ModelSpec) -> slice:
    return slice(spec.q_size + spec.kv_size, spec.q_size + 2 * spec.kv_size)


def gate_rows(spec: ModelSpec) -> slice:
    return slice(0, spec.intermediate_size)


def up_rows(spec: ModelSpec) -> slice:
    return slice(spec.intermediate_size, 2 * spec.intermediate_size)


def unpermuted(num_heads: int, head_dim: int) -> np.ndarray:
    """Row indices that undo GGUF's order for llama: it interleaves the two halves of a head."""
    rows = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def fused_qkv(canonical: str, name: str, transpose: bool = False) -> TensorMap:
    """One matrix with the rows of q, then k, then v."""
    parts = zip("qkv", (q_rows, k_rows, v_rows), strict=True)
    return {
        key: value
        for part, rows in parts
        for key, value in linear(f"{canonical}{part}", name, rows, transpose).items()
    }


_L = "layers.{i}."
_H = "{p}layers.{i}."

LLAMA_TENSORS: TensorMap = {
    "embed": (Take("{p}embed_tokens.weight"),),
    **norm(_L + "attn_norm", _H + "input_layernorm"),
    **linear(_L + "q", _H + "self_attn.q_proj"),
    **linear(_L + "k", _H + "self_attn.k_proj"),
    **linear(_L + "v", _H + "self_attn.v_proj"),
    **linear(_L + "attn_out", _H + "self_attn.o_proj"),
    **norm(_L + "mlp_norm", _H + "post_attention_layernorm"),
    **linear(_L + "gate", _H + "mlp.gate_proj"),
    **linear(_L + "up", _H + "mlp.up_proj"),
    **linear(_L + "down", _H + "mlp.down_proj"),
    **norm("final_norm", "{p}norm"),
    "head.weight": (Take("lm_head.weight"), Take("language_model.lm_head.weight")),
    "head.bias": (Take("lm_head.bias"),),
}
LLAMA_PREFIXES = ("model.", "", "model.language_model.", "language_model.model.")


@dataclass(frozen=True)
class Architecture:
    """A family.

    Attributes:
        model_types: Words of ``config.json``'s model_type and of GGUF's general.architecture.
        spec: Config to spec.
        tensors: Names in a safetensors checkpoint.
        prefixes: What ``{p}`` may be; the first under which ``embed`` is found counts.
        gguf_config: Adjusts the config made from a GGUF's metadata (config, metadata); it may name
            the family more exactly (``model_type``).
        gguf_tensors: Entries that differ from the names of ``gguf_names.py``.
    """

    model_types: tuple[str, ...]
    spec: Callable[[Config], ModelSpec]
    tensors: TensorMap
    prefixes: tuple[str, ...] = LLAMA_PREFIXES
    gguf_config: Callable[[dict[str, Any], Mapping[str, Any]], None] | None = None
    gguf_tensors: TensorMap = field(default_factory=dict)


def rope_spec(
    config: Config, head_dim: int, layer_type: str | None = None, theta: float = 10000.0
) -> RopeSpec:
    """From ``rope_parameters`` (flat or by layer type), or ``rope_theta`` and ``rope_scaling``."""
    found = config.get("rope_parameters", "rope_scaling", default={})
    if layer_type is not None and isinstance(found, dict) and isinstance(
        found.get(layer_type), dict
    ):
        found = found[layer_type]
    if not isinstance(found, dict):
        raise ModelError("config: the rope parameters are no object")
    parameters = Config(found)
    theta = parameters.number("rope_theta", default=config.number("rope_theta", default=theta))
    partial = parameters.number(
        "partial_rotary_factor", default=config.number("partial_rotary_factor", default=1.0)
    )
    rotary_dim = int(head_dim * partial)
    if theta <= 0 or not 2 <= rotary_dim <= head_dim or rotary_dim % 2:
        raise ModelError(
            f"config: rope_theta {theta} and a rotary dimension of {rotary_dim} (of {head_dim}) "
            "cannot be used; the dimension must be even"
        )
    kind = parameters.get("rope_type", "type", default="default")
    length = config.integer("max_position_embeddings", default=2048, high=1 << 30)
    if kind == "default":
        return RopeSpec(theta, rotary_dim, None, length)
    kind = "longrope" if kind == "su" else kind
    if not isinstance(kind, str) or kind not in SCALINGS:
        raise ModelError(
            f"config: rope_type {str(kind)[:40]!r} is not known; known are {', '.join(SCALINGS)}"
        )
    own = {k: v for k, v in found.items() if k not in ("type", "rope_theta")}
    scaling: dict[str, Any] = {**own, "rope_type": kind}
    original = length
    if kind != "dynamic":
        original = config.integer(
            "original_max_position_embeddings",
            default=parameters.integer(
                "original_max_position_embeddings", default=length, high=1 << 30
            ),
            high=1 << 30,
        )
    if scaling.get("factor") is None:
        scaling["factor"] = length / original
    return RopeSpec(theta, rotary_dim, scaling, original)


def sliding_layers(config: Config, count: int, window: int | None) -> list[int | None]:
    """The window of every layer by the config's ``layer_types``; without, all have ``window``."""
    types = config.get("layer_types")
    if types is None:
        return [window] * count
    if not isinstance(types, list) or len(types) < count:
        raise ModelError(f"config: layer_types must list {count} layers")
    words = {"full_attention": None, "sliding_attention": window}
    for word in types[:count]:
        if not isinstance(word, str) or word not in words:
            raise ModelError(
                f"config: layer type {str(word)[:40]!r} is not supported; known are "
                f"{', '.join(words)}"
            )
    return [words[word] for word in types[:count]]


def token_ids(config: Config, name: str) -> tuple[int, ...]:
    """One id or a list of them."""
    value = config.get(name, default=[])
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
        raise ModelError(f"config: {name} is no token id: {str(value)[:60]}")
    return tuple(values)


def decoder_spec(config: Config, architecture: str, **differences: Any) -> ModelSpec:
    """Llama's choices over the sizes of the config; ``differences`` replace fields of the spec."""
    hidden = config.integer("hidden_size", "n_embd", "d_model", "n_embed")
    heads = config.integer("num_attention_heads", "n_head", "n_heads", high=65536)
    count = config.integer(
        "num_hidden_layers", "n_layer", "n_layers", high=MAX_LAYERS
    )
    kv_heads = config.integer("num_key_value_heads", default=heads, high=65536)
    if config.get("head_dim") is None and hidden % heads:
        raise ModelError(f"config: hidden_size {hidden} is no multiple of {heads} heads")
    head_dim = config.integer("head_dim", default=max(hidden // heads, 1), high=4096)
    if heads % kv_heads:
        raise ModelError(f"config: {heads} heads are no multiple of {kv_heads} KV heads")
    bos = token_ids(config, "bos_token_id")
    fields: dict[str, Any] = {
        "architecture": architecture,
        "hidden_size": hidden,
        "num_layers": count,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": config.integer("intermediate_size", "n_inner", default=4 * hidden),
        "vocab_size": config.integer("vocab_size", high=MAX_VOCAB),
        "max_position_embeddings": config.integer(
            "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length",
            default=2048, high=1 << 30,
        ),
        "tie_embeddings": config.flag("tie_word_embeddings"),
        "gated": True,
        "bos_token_id": bos[0] if bos else None,
        "eos_token_ids": token_ids(config, "eos_token_id"),
        **differences,
    }  # fmt: skip
    if "norm" not in fields:
        fields["norm"] = NormSpec("rms", config.number("rms_norm_eps", default=1e-6))
    if "activation" not in fields:
        fields["activation"] = config.activation("hidden_act", default="silu")
    if "layers" not in fields:
        fields["layers"] = (LayerSpec(rope=rope_spec(config, head_dim)),) * count
    if not 0 <= fields["norm"].eps < 1:
        raise ModelError(f"config: norm epsilon {fields['norm'].eps} is not in [0, 1)")
    return ModelSpec(**fields)


def head_dim_of(config: Config) -> int:
    heads = config.integer("num_attention_heads", "n_head", "n_heads", high=65536)
    hidden = config.integer("hidden_size", "n_embd", "d_model", "n_embed")
    return config.integer("head_dim", default=max(hidden // heads, 1), high=4096)


def windowed_layers(config: Config, windows: list[int | None]) -> tuple[LayerSpec, ...]:
    """Layers that share one rotary embedding and differ in their windows."""
    rope = rope_spec(config, head_dim_of(config))
    return tuple(LayerSpec(window, rope) for window in windows)


def window_of(config: Config) -> int | None:
    if config.get("sliding_window") is None:
        return None
    return config.integer("sliding_window", high=1 << 30)


def num_layers_of(config: Config) -> int:
    return config.integer("num_hidden_layers", "n_layer", "n_layers", high=MAX_LAYERS)
