"""``none``: weights stay what they are: floats, or the blocks they were shipped in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pyllmlite.core.errors import ModelError
from pyllmlite.core.weights import LinearShape, LinearWeight
from pyllmlite.hooks.quantizer import Quantizer, QuantizerNeeds
from pyllmlite_plugins.quantizer.checks import require_finite


class Unquantized(Quantizer):
    """Float32 as it is, or rounded to the nearest bfloat16 (ties to even).

    A matrix that arrives in codes that a packed format holds (GGUF's Q4_0 to Q8_0, and the K-quants
    with their scales rounded to f16; GPTQ, AWQ, compressed-tensors, bitsandbytes) keeps them.
    With dtype f32 only those it holds exactly are kept, and their inputs stay floats, so that the
    logits are those of the dequantized weights; with bf16 the inputs are quantized to int8 per row
    and group, which is what is fast.  ``extra["int8_activations"]`` says either, whatever the
    dtype; without int8 the inputs are rounded to bf16 under dtype bf16.  A checkpoint whose own
    scheme quantizes activations (W8A8, LLM.int8()) runs as it says.
    """

    name = "none"
    priority = 50
    rowwise = True

    @classmethod
    def supports(cls, need: QuantizerNeeds) -> str | None:
        if need.bits is not None:
            return f"keeps floats, {need.bits} bits were asked for"
        for name in ("group_size", "symmetric"):
            if getattr(need, name) is not None:
                return f"keeps floats, which have no {name}"
        if need.dtype not in ("f32", "bf16"):
            return f"keeps f32 or bf16, not {need.dtype!r}"
        return None

    def keep(self, shape: LinearShape, stored: LinearWeight) -> LinearWeight | None:
        if stored.int8_activations or stored.format not in ("int8", "int4"):
            return stored
        wanted = self.needs.extra.get("int8_activations")
        return replace(
            stored, int8_activations=self.needs.dtype != "f32" if wanted is None else bool(wanted)
        )

    def quantize(
        self, shape: LinearShape, weight: np.ndarray, calibration: Any = None
    ) -> LinearWeight:
        if self.needs.dtype != "f32":
            return bf16_weight(shape, weight)
        require_finite(shape, weight)
        return LinearWeight("f32", weight)


def bf16_weight(shape: LinearShape, weight: np.ndarray) -> LinearWeight:
    """A matrix rounded to bfloat16; ``ModelError`` for weights that are not finite, or become
    infinite."""
    require_finite(shape, weight)
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
