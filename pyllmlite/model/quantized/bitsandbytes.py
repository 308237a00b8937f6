"""bitsandbytes' layouts: 4-bit (nf4, fp4) and LLM.int8().

4-bit, of a matrix ``[out, in]``, which is quantized in blocks of its flattened values:

- ``weight``: codes, two to a byte, the first in the high bits;
- ``weight.quant_map [16]``: the value of each code;
- ``weight.absmax``: the scale of each block: float32, or with double quantization uint8 indices
  into ``weight.nested_quant_map [256]``, in blocks of 256 scaled by ``weight.nested_absmax``, plus
  an offset (QLoRA, Dettmers et al. 2023, section 3);
- ``weight.quant_state.bitsandbytes__nf4`` (or ``fp4``): JSON as bytes: shape, blocksize, ...

8-bit: ``weight`` int8 ``[out, in]`` and ``SCB [out]``, the largest magnitude of each row, which
code 127 stands for; inputs above ``llm_int8_threshold`` are multiplied unrounded (LLM.int8(),
Dettmers et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pyllmlite.core.errors import ModelError
from pyllmlite.core.weights import LinearWeight
from pyllmlite.model.checkpoint import Checkpoint, RawTensor
from pyllmlite.model.quantized.settings import integer, one_of
from pyllmlite.model.quantized.tensor import (
    QuantizedCheckpoint,
    QuantizedTensor,
    Rows,
    expect_shape,
    modules_with,
    narrowed,
    parts_of,
)
from pyllmlite.model.safetensors import parse_json

KINDS = ("nf4", "fp4")
STATE = "weight.quant_state.bitsandbytes__"
DEFAULT_THRESHOLD = 6.0
LEAST_GROUP = 8  # columns: int4 groups begin on a multiple of 8


def bitsandbytes_reader(settings: Mapping[str, Any]) -> Callable[[Checkpoint], Checkpoint]:
    threshold = settings.get("llm_int8_threshold", DEFAULT_THRESHOLD)
    if not isinstance(threshold, (int, float)) or not 0 <= threshold < math.inf:
        raise ModelError(f"llm_int8_threshold must be a number from 0, got {str(threshold)[:40]}")

    def read(base: Checkpoint) -> Checkpoint:
        made: list[QuantizedTensor] = []
        for kind in KINDS:
            for module in modules_with(base, STATE + kind):
                needed = {STATE + kind: "u8", "weight": "", "weight.absmax": "f|u8"}
                needed["weight.quant_map"] = "f"
                nested = {"weight.nested_absmax": "f", "weight.nested_quant_map": "f"}
                parts = parts_of(base, module, needed, nested)
                made.append(FourBitTensor(module + "weight", parts, kind))
        for module in modules_with(base, "SCB"):
            parts = parts_of(base, module, {"weight": "i8", "SCB": "f"}, {"weight_format": "u8"})
            made.append(Int8Tensor(module + "weight", parts, float(threshold)))
        if not made:
            raise ModelError(f"{base.path}: the config says bitsandbytes, but no tensor is")
        return QuantizedCheckpoint(base, made)

    return read


class FourBitTensor(QuantizedTensor):
    """One matrix of nf4 or fp4 codes; see the module for the layout."""

    def __init__(self, name: str, parts: Mapping[str, RawTensor], kind: str) -> None:
        stored = parts[STATE + kind]
        self.state = parse_json(stored.plain().tobytes(), stored.name)
        shape = self.state.get("shape") if isinstance(self.state, dict) else None
        if not isinstance(shape, list) or len(shape) != 2 or not all(
            isinstance(n, int) and n > 0 for n in shape
        ):
            raise ModelError(f"{stored.name} has no matrix's shape: {str(shape)[:40]}")
        super().__init__(name, (shape[0], shape[1]), kind, parts)
        self.block = integer(self.state, "blocksize", None, 1)
        count = shape[0] * shape[1]
        blocks = -(-count // self.block)
        if parts["weight"].nbytes != -(-count // 2):
            raise ModelError(
                f"{name} has {parts['weight'].nbytes} bytes, its shape needs {-(-count // 2)}"
            )
        expect_shape(parts["weight.quant_map"], (16,))
        expect_shape(parts["weight.absmax"], (blocks,))
        self.nested = parts["weight.absmax"].dtype == "u8"
        if self.nested:
            if "weight.nested_absmax" not in parts or "weight.nested_quant_map" not in parts:
                raise ModelError(f"{name} lacks nested_absmax or nested_quant_map")
            self.outer_block = integer(self.state, "nested_blocksize", None, 1)
            expect_shape(parts["weight.nested_quant_map"], (256,))
            expect_shape(parts["weight.nested_absmax"], (-(-blocks // self.outer_block),))
        self._scales: np.ndarray | None = None

    def codes(self, rows: Rows = None) -> LinearWeight | None:
        columns = self.shape[1]
        group = self._group()
        if group % LEAST_GROUP and group < columns:
            return None
        lines = np.arange(self.shape[0])[slice(None) if rows is None else rows]
        first = np.arange(0, columns, group)
        blocks = (lines[:, None] * columns + first[None, :]) // self.block
        return LinearWeight(
            "codebook4",
            self._values(lines),
            self._absmax()[blocks],
            None,
            group if group < columns else 0,
            codebook=self.finite("weight.quant_map"),
        )

    def float32(self, rows: Rows = None) -> np.ndarray:
        lines = np.arange(self.shape[0])[slice(None) if rows is None else rows]
        columns = self.shape[1]
        flat = lines[:, None] * columns + np.arange(columns)[None, :]
        values = self.finite("weight.quant_map")[self._values(lines)]
        return values * self._absmax()[flat // self.block].astype(np.float32)

    def release(self) -> None:
        self._scales = None
        super().release()

    def _group(self) -> int:
        """The most columns that lie in one block in every row."""
        columns = self.shape[1]
        return columns if self.block % columns == 0 else math.gcd(columns, self.block)

    def _values(self, lines: np.ndarray) -> np.ndarray:
        """Codes of some rows, uint8 ``[rows, in]``."""
        data, columns = self.parts["weight"].raw().reshape(-1), self.shape[1]
        if columns % 2:  # a row begins in the middle of a byte
            at = lines[:, None] * columns + np.arange(columns)[None, :]
            return (data[at // 2] >> (4 * (1 - at % 2)).astype(np.uint8)) & np.uint8(15)
        pairs = data.reshape(-1, columns // 2)[lines]
        codes = np.empty((len(lines), columns), np.uint8)
        np.right_shift(pairs, 4, out=codes[:, 0::2])
        np.bitwise_and(pairs, 15, out=codes[:, 1::2])
        return codes

    def _absmax(self) -> np.ndarray:
        """The scale of each block of the flattened matrix."""
        if self._scales is None:
            if self.nested:
                outer = np.repeat(self.finite("weight.nested_absmax"), self.outer_block)
                table = self.finite("weight.nested_quant_map")
                inner = table[self.array("weight.absmax")]
                offset = self.state.get("nested_offset")
                if not isinstance(offset, (int, float)) or not math.isfinite(offset):
                    raise ModelError(f"{self.name}: nested_offset is {str(offset)[:40]}")
                scales = inner * outer[: len(inner)] + np.float32(offset)
            else:
                scales = self.finite("weight.absmax")
            self._scales = narrowed(scales)
        return self._scales


class Int8Tensor(QuantizedTensor):
    """One matrix of LLM.int8(); see the module for the layout."""

    def __init__(self, name: str, parts: Mapping[str, RawTensor], threshold: float) -> None:
        shape = parts["weight"].shape
        if len(shape) != 2:
            raise ModelError(f"{name} is no matrix: the checkpoint is damaged")
        super().__init__(name, (shape[0], shape[1]), "llm-int8", parts)
        self.threshold = threshold
        expect_shape(parts["SCB"], (shape[0],))
        if "weight_format" in parts:
            one_of(f"{name}: weight_format", int(parts["weight_format"].plain()[0]), (0,))
        self._scales: np.ndarray | None = None

    def codes(self, rows: Rows = None) -> LinearWeight:
        rows = slice(None) if rows is None else rows
        if self._scales is None:
            self._scales = narrowed(self.finite("SCB") / np.float32(127))[:, None]
        codes = np.ascontiguousarray(self.array("weight")[rows])
        return LinearWeight(
            "int8",
            codes,
            self._scales[rows],
            int8_activations=True,
            activation_group=-1,
            outlier_threshold=self.threshold,
        )

    def release(self) -> None:
        self._scales = None
        super().release()
