"""What a ModelSpec means, in plain NumPy: the reference that readers and Programs are held to."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pyllmlite.core.spec import ModelSpec, NormSpec
from pyllmlite.model.alibi import model_slopes
from pyllmlite.model.rope import rope_tables


def _norm(x: np.ndarray, spec: NormSpec, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    if spec.kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + spec.eps) * weight
    return y if bias is None else y + bias


def _activation(kind: str, x: np.ndarray) -> np.ndarray:
    if kind == "silu":
        return x / (1 + np.exp(-x))
    if kind == "gelu":
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    assert kind == "relu"
    return np.maximum(x, 0)


def _softcap(x: np.ndarray, cap: float) -> np.ndarray:
    return cap * np.tanh(x / cap) if cap > 0 else x


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x ``[tokens, heads, head_dim]``: pairs (i, i + rotary_dim / 2) of its leading part."""
    half = cos.shape[1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


class NumpyModel:
    """The whole prompt at once, no cache, in float64 unless said otherwise."""

    def __init__(self, source: Any, dtype: Any = np.float64) -> None:
        self.spec: ModelSpec = source.spec
        self.weights = {name: source.get(name).astype(dtype) for name in source.names()}

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        y = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _normed(self, x: np.ndarray, name: str) -> np.ndarray:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        return _norm(x, self.spec.norm, weight, bias)

    def _attention(self, x: np.ndarray, index: int) -> np.ndarray:
        spec, tokens = self.spec, len(x)
        layer, name = spec.layers[index], f"layers.{index}."
        q = self._linear(x, name + "q").reshape(tokens, spec.num_heads, spec.head_dim)
        k = self._linear(x, name + "k").reshape(tokens, spec.num_kv_heads, spec.head_dim)
        v = self._linear(x, name + "v").reshape(tokens, spec.num_kv_heads, spec.head_dim)
        if spec.qk_norm:
            q = _norm(q, spec.norm, self.weights[name + "q_norm"], None)
            k = _norm(k, spec.norm, self.weights[name + "k_norm"], None)
        if layer.rope is not None:
            cos, sin = rope_tables(layer.rope, tokens)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        group = spec.num_heads // spec.num_kv_heads
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k) * spec.scale
        scores = _softcap(scores, spec.attention_softcap)
        distance = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
        slopes = model_slopes(spec)
        if slopes is not None:
            scores = scores - slopes[:, None, None] * distance
        seen = distance >= 0
        if layer.window is not None:
            seen &= distance < layer.window
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return np.einsum("hqk,khd->qhd", weights, v).reshape(tokens, -1)

    def logits(self, token_ids: list[int]) -> np.ndarray:
        """``[tokens, vocab]``."""
        spec = self.spec
        x = self.weights["embed"][token_ids] * spec.embedding_scale
        if spec.learned_positions:
            x = x + self.weights["position_embed"][spec.position_offset :][: len(token_ids)]
        if spec.embed_norm:
            x = self._normed(x, "embed_norm")
        for i in range(spec.num_layers):
            name = f"layers.{i}."
            y = self._attention(self._normed(x, name + "attn_norm"), i)
            y = self._linear(y, name + "attn_out")
            x = x + (self._normed(y, name + "post_attn_norm") if spec.post_norms else y)
            y = self._normed(x, name + "mlp_norm")
            if spec.gated:
                gate = _activation(spec.activation, self._linear(y, name + "gate"))
                y = gate * self._linear(y, name + "up")
            else:
                y = _activation(spec.activation, self._linear(y, name + "up"))
            y = self._linear(y, name + "down")
            x = x + (self._normed(y, name + "post_mlp_norm") if spec.post_norms else y)
        x = self._normed(x, "final_norm")
        head = self.weights["embed" if spec.tie_embeddings else "head.weight"]
        logits = x @ head.T * spec.logit_scale
        if "head.bias" in self.weights:
            logits = logits + self.weights["head.bias"]
        return _softcap(logits, spec.final_softcap)
