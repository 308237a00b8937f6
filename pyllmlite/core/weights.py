"""Weights between the reader, the quantizer and the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LinearShape:
    """The fused matrix a plan is made for: ``kind`` is qkv, attn_out, gate_up, mlp_up (no
    gate), mlp_down, embed or head; ``name`` is its canonical name (``layers.3.qkv``)."""

    name: str
    kind: str
    out_features: int
    in_features: int
    gated: bool = False


@dataclass
class LinearWeight:
    """What a quantizer returns: codes in plain order, not yet packed.

    Attributes:
        format: ``f32``, ``bf16``, ``int8``, ``int4``, or a plugin's own.
        values: ``[out, in]``: float32; uint16 bits of bf16; int8 codes; uint8 codes 0..15.
        scales, mins: float16 ``[out, groups]``; ``w = scale * code + min``.  ``mins`` None:
            symmetric (min 0 for int8, ``-8 * scale`` for int4).
        group_size: Columns per group; 0: the whole row.
        int8_activations: Rows of the input are quantized to int8 inside the op.
        input_scale: float32 ``[in]``, multiplies the input first (AWQ).
        input_permutation: int32 ``[in]``: column j of ``values`` takes input
            ``input_permutation[j]`` (GPTQ's act_order).
    """

    format: str
    values: np.ndarray
    scales: np.ndarray | None = None
    mins: np.ndarray | None = None
    group_size: int = 0
    int8_activations: bool = False
    input_scale: np.ndarray | None = None
    input_permutation: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values.shape[0], self.values.shape[1])
