"""``none``: weights stay floats, float32 or bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np

from pyllmlite.core.errors import ModelError
from pyllmlite.core.weights import LinearShape, LinearWeight
from pyllmlite.hooks.quantizer import Quantizer, QuantizerNeeds
from pyllmlite_plugins.quantizer.checks import require_finite


class Unquantized(Quantizer):
    """Float32 as it is, or rounded to the nearest bfloat16 (ties to even)."""

    name = "none"
    priority = 50
    rowwise = True

    @classmethod
    def supports(cls, need: QuantizerNeeds) -> str | None:
        if need.bits is not None:
            return f"keeps floats, {need.bits} bits were asked for"
        if need.dtype not in ("f32", "bf16"):
            return f"keeps f32 or bf16, not {need.dtype!r}"
        return None

    def quantize(
        self, shape: LinearShape, weight: np.ndarray, calibration: Any = None
    ) -> LinearWeight:
        require_finite(shape, weight)
        if self.needs.dtype == "f32":
            return LinearWeight("f32", weight)
        codes = to_bf16(weight)
        if ((codes & 0x7FFF) == 0x7F80).any():
            raise ModelError(f"{shape.name} holds weights too large for bf16; use dtype f32")
        return LinearWeight("bf16", codes)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Finite float32 to the bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    even = (bits >> 16) & 1
    even += bits
    even += 0x7FFF
    even >>= 16
    return even.astype(np.uint16)
