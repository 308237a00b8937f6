"""A model as data: everything the builder needs to know, read from a checkpoint's config."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021), half-split pairs.

    Attributes:
        theta: Base of the frequencies.
        rotary_dim: Leading dimensions of a head that are rotated (even).
        scaling: None, or the checkpoint's own dict with ``rope_type`` one of linear,
            dynamic, yarn, llama3, longrope, and its parameters.
        original_max_position: Length the model was trained for before scaling.
    """

    theta: float
    rotary_dim: int
    scaling: dict[str, Any] | None = None
    original_max_position: int = 0


@dataclass(frozen=True)
class NormSpec:
    kind: str  # "rms" | "layer"
    eps: float


@dataclass(frozen=True)
class LayerSpec:
    """What may differ from layer to layer.

    Attributes:
        window: Tokens seen, itself included; None: all.
        sinks: First tokens that are seen besides the window (StreamingLLM).
    """

    window: int | None = None
    rope: RopeSpec | None = None
    sinks: int = 0


@dataclass(frozen=True)
class ModelSpec:
    """Sizes and choices of a decoder-only transformer.

    Canonical tensor names (all float, in ``[out, in]`` order; optional ones may be absent):
    ``embed`` [vocab, hidden], ``position_embed`` [positions, hidden],
    ``embed_norm.weight/.bias``; per layer ``layers.{i}.``: ``attn_norm.weight/.bias``,
    ``q`` ``k`` ``v`` (``.weight``, ``.bias``; rows in head order), ``q_norm`` ``k_norm``
    [head_dim], ``attn_out.weight/.bias``, ``post_attn_norm.weight``,
    ``mlp_norm.weight/.bias``, ``gate`` ``up`` ``down`` (``.weight``, ``.bias``),
    ``post_mlp_norm.weight``; ``final_norm.weight/.bias``; ``head.weight`` (absent when tied)
    ``head.bias``.  Norm weights are stored as they multiply (Gemma's ``1 + w`` is folded in
    by the architecture).
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    norm: NormSpec
    activation: str  # silu | gelu | gelu_tanh | relu
    gated: bool
    layers: tuple[LayerSpec, ...]
    tie_embeddings: bool = False
    learned_positions: bool = False
    position_offset: int = 0
    alibi: bool = False
    alibi_bias_max: float = 8.0
    qk_norm: bool = False
    post_norms: bool = False  # Gemma 2 and 3: norms after attention and MLP, before the residual
    embed_norm: bool = False
    embedding_scale: float = 1.0
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float = 0.0
    final_softcap: float = 0.0
    logit_scale: float = 1.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct windows, in order of first use."""
        return tuple(dict.fromkeys(layer.window for layer in self.layers))

    @property
    def kept(self) -> tuple[tuple[int | None, int], ...]:
        """The distinct (window, sinks), in order of first use: one KV group each."""
        return tuple(dict.fromkeys((layer.window, layer.sinks) for layer in self.layers))

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def scale(self) -> float:
        return self.attention_scale if self.attention_scale is not None else self.head_dim**-0.5

    def kv_bytes_per_token(self, bytes_per_element: float = 2) -> float:
        """bytes per element x 2 (keys and values) x layers x KV heads x head size."""
        return bytes_per_element * 2 * self.num_layers * self.num_kv_heads * self.head_dim
