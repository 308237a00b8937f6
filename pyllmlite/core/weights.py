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
        format: ``f32``, ``bf16``, ``int8``, ``int4``, ``codebook4``, or a plugin's own.
        values: ``[out, in]``: float32; uint16 bits of bf16; int8 codes; uint8 codes 0..15.
        scales, mins: float16 or float32 ``[out, groups]``; ``w = scale * code + min``.  ``mins``
            None: symmetric (min 0 for int8, ``-8 * scale`` for int4).
        group_size: Columns per group; 0: the whole row.
        int8_activations: Rows of the input are quantized to int8 inside the op.  Without it they
            stay float32 under dtype f32; under bf16 they, and a codebook, are rounded to bf16,
            unless ``extra["bf16_activations"]`` is false.
        input_scale: float32 ``[in]``, multiplies the input first (AWQ).
        input_permutation: int32 ``[in]``: column j of ``values`` takes input
            ``input_permutation[j]`` (GPTQ's act_order).
        zero_points: Integers ``[out, groups]``, instead of ``mins``:
            ``w = scale * (code - zero_point)``, exact where a float16 minimum would be rounded.
        activation_group: Columns of the input that share a scale, with int8 activations; 0:
            32, or the weight's group where 32 does not divide it; -1: the whole row.
        outlier_threshold: With int8 activations: inputs of a row whose magnitude is larger are
            taken out and multiplied in float32 (LLM.int8()); 0: none.
        codebook: float32 ``[16]``; ``w = scale * codebook[code]`` (``codebook4``).
    """

    format: str
    values: np.ndarray
    scales: np.ndarray | None = None
    mins: np.ndarray | None = None
    group_size: int = 0
    int8_activations: bool = False
    input_scale: np.ndarray | None = None
    input_permutation: np.ndarray | None = None
    zero_points: np.ndarray | None = None
    activation_group: int = 0
    outlier_threshold: float = 0.0
    codebook: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values.shape[0], self.values.shape[1])

    def float32(self) -> np.ndarray:
        """The matrix that the codes stand for, float32 ``[out, in]``, its columns in the order of
        the plain input: what the kernels are held to.

        Raises:
            ValueError: A format that is not built in.
        """
        weight = self._dequantized()
        if self.input_permutation is not None:
            plain = np.empty_like(weight)
            plain[:, self.input_permutation] = weight
            weight = plain
        return weight if self.input_scale is None else weight * self.input_scale

    def _dequantized(self) -> np.ndarray:
        if self.format == "f32":
            return self.values.astype(np.float32)
        if self.format == "bf16":
            return (self.values.astype(np.uint32) << 16).view(np.float32)
        if self.format not in ("int8", "int4", "codebook4") or self.scales is None:
            raise ValueError(f"format {self.format!r} has no float32 here")
        columns = self.shape[1]
        group = np.arange(columns) // (self.group_size or max(columns, 1))
        scales = self.scales.astype(np.float32)[:, group]
        if self.codebook is not None:
            return self.codebook.astype(np.float32)[self.values] * scales
        if self.mins is not None:
            mins = self.mins.astype(np.float32)[:, group]
            return scales * self.values.astype(np.float32) + mins
        zero: np.ndarray | int = 8 if self.format == "int4" else 0
        if self.zero_points is not None:
            zero = self.zero_points[:, group]
        return scales * (self.values.astype(np.float32) - zero).astype(np.float32)
