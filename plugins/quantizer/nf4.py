"""``nf4``: 4-bit codes for sixteen values that are not evenly spaced: NormalFloat, or FP4."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyllmlite.core.errors import ConfigError, ModelError
from pyllmlite.core.weights import LinearShape, LinearWeight
from pyllmlite.hooks.quantizer import Quantizer, QuantizerNeeds
from pyllmlite_plugins.quantizer.checks import require_finite
from pyllmlite_plugins.quantizer.int8 import int8_rows

DEFAULT_GROUP = 64
OUTER_BLOCK = 256  # scales that share a scale, with double quantization
GROUP_MULTIPLE = 8
F16_MAX = 65504.0
LEAST = 1e-38

# QLoRA, appendix E: quantiles of the normal distribution, with an exact zero.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# Sign, two bits of exponent, one of mantissa, in the order of the bits; the largest is 12.
FP4 = tuple(sign * x / 12 for sign in (1, -1) for x in (0, 0.0625, 8, 12, 4, 6, 2, 3))
CODEBOOKS = {name: np.array(values, np.float32) for name, values in (("nf4", NF4), ("fp4", FP4))}


class NormalFloat4(Quantizer):
    """NF4 (QLoRA, Dettmers et al. 2023) or, with ``extra["kind"] = "fp4"``, FP4.

    ``group_size`` columns (64) share a scale, their largest magnitude; each weight takes the
    nearest of sixteen values.  Scales are kept in f16.  ``extra["double_quant"]``: scales are
    rounded to 8 bits first, in blocks of 256 over the whole matrix, as QLoRA stores them: the
    values are then those of such a file.  Inputs stay floats: with dtype bf16 they, and the sixteen
    values, are rounded to bf16, as the inputs of bf16 weights are.  Embedding and head, which feel
    errors most, are kept in int8.
    """

    name = "nf4"
    priority = 4
    rowwise = True

    @classmethod
    def supports(cls, need: QuantizerNeeds) -> str | None:
        if need.bits not in (None, 4):
            return f"makes 4 bits, not {need.bits}"
        size = need.group_size
        if size is not None and (size < 0 or size % GROUP_MULTIPLE):
            return f"group_size must be a multiple of {GROUP_MULTIPLE} (0: a row), got {size}"
        if need.symmetric is not None:
            return "has values of its own, which are not evenly spaced: no symmetric or asymmetric"
        return None

    def __init__(self, needs: QuantizerNeeds) -> None:
        super().__init__(needs)
        kind = needs.extra.get("kind", "nf4")
        if not isinstance(kind, str) or kind not in CODEBOOKS:
            raise ConfigError(f"kind must be one of {', '.join(CODEBOOKS)}, got {kind!r}")
        self.codebook = CODEBOOKS[kind]
        self.group_size = DEFAULT_GROUP if needs.group_size is None else needs.group_size
        self.double_quant = bool(needs.extra.get("double_quant", False))
        self.rowwise = not self.double_quant  # blocks of scales run over rows

    def bits_per_weight(self, shape: LinearShape) -> float:
        if shape.kind in ("embed", "head"):
            return 8 + 32.0 / shape.in_features
        return 4 + 16.0 / (self.group_size or shape.in_features)

    def keep(self, shape: LinearShape, stored: LinearWeight) -> LinearWeight | None:
        same = stored.codebook is not None and np.array_equal(stored.codebook, self.codebook)
        return stored if same else None

    def quantize(
        self, shape: LinearShape, weight: np.ndarray, calibration: Any = None
    ) -> LinearWeight:
        require_finite(shape, weight)
        if shape.kind in ("embed", "head"):
            codes, scales = int8_rows(weight)
            return LinearWeight("int8", codes, scales, int8_activations=True)
        codes, scales = codes_of(weight, self.codebook, self.group_size)
        if self.double_quant:
            scales = doubly_quantized(scales)
        if scales.max(initial=0) > F16_MAX:
            raise ModelError(
                f"{shape.name} holds weights so large that their scales ({scales.max():.3g}) do "
                "not fit into f16; use quantizer='none'"
            )
        return LinearWeight(
            "codebook4",
            codes,
            scales.astype(np.float16),
            None,
            self.group_size,
            codebook=self.codebook,
        )


def codes_of(
    weight: np.ndarray, codebook: np.ndarray, group_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Nearest values of the codebook (of two that are equally near the lower one).

    Returns:
        Codes uint8 ``[out, in]`` and scales float32 ``[out, groups]``: the largest magnitude of
        each ``group_size`` columns (0: the row).
    """
    rows, columns = weight.shape
    size = group_size or max(columns, 1)
    short = -columns % size
    groups = np.pad(weight, ((0, 0), (0, short))).reshape(rows, -1, size)
    largest = np.maximum(groups.max(axis=2), -groups.min(axis=2))
    inverse = np.float32(1) / np.maximum(largest, np.float32(LEAST))
    order = np.argsort(codebook, kind="stable").astype(np.uint8)
    ordered = codebook[order]
    middles = (ordered[:-1] + ordered[1:]) / 2
    near = np.searchsorted(middles, np.clip(groups * inverse[:, :, None], -1, 1))
    codes = order[near].reshape(rows, -1)[:, :columns]
    return np.ascontiguousarray(codes), largest


def doubly_quantized(scales: np.ndarray) -> np.ndarray:
    """Scales less their mean, rounded to 8 bits in blocks of 256 of the flattened matrix, and back
    (QLoRA, section 3)."""
    flat = scales.reshape(-1)
    mean = np.float32(flat.mean(dtype=np.float64))
    codes, outer = dynamic_codes(flat - mean)
    inner = DYNAMIC[codes] * np.repeat(outer, OUTER_BLOCK)[: flat.size]
    return (inner + mean).reshape(scales.shape)


def dynamic_codes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """8-bit dynamic quantization (Dettmers 2016, section 2.1.3) of a flat array: codes uint8, and
    the largest magnitude of every 256 values."""
    blocks = np.pad(values, (0, -values.size % OUTER_BLOCK)).reshape(-1, OUTER_BLOCK)
    largest = np.abs(blocks).max(axis=1)
    scaled = blocks * (np.float32(1) / np.maximum(largest, np.float32(LEAST)))[:, None]
    middles = (DYNAMIC[:-1] + DYNAMIC[1:]) / 2
    near = np.searchsorted(middles, scaled.astype(np.float32).reshape(-1)[: values.size])
    return near.astype(np.uint8), largest


def _dynamic_map() -> np.ndarray:
    """The 256 values of the dynamic data type: a sign, zeros that count a decimal exponent of 0 to
    -6, a one, and evenly spaced fractions in the bits that are left."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = np.linspace(0.1, 1, 2**exponent + 1)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        values += [*means, *-means]
    return np.sort(np.array(values)).astype(np.float32)


DYNAMIC = _dynamic_map()
