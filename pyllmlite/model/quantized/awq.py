"""AWQ's GEMM and GEMV layouts, as AutoAWQ writes them.

GEMM, of a matrix ``[out, in]``, with eight 4-bit codes to an int32 along the outputs:

- ``qweight [in, out / 8]``; within a word, lowest bits first, stand the outputs
  0, 2, 4, 6, 1, 3, 5, 7 of eight;
- ``qzeros [groups, out / 8]``: zero points in the same order;
- ``scales [groups, out]``.

GEMV, with eight codes to an int32 along the inputs, in order: ``qweight [out, in / 8]``,
``qzeros [out, width]``, ``scales [out, 8 * width]``, of which only the first groups count.

``w[o, i] = scales[i / group_size, o] * (code - zero)``.  The scales that AWQ multiplies the inputs
with are folded into the norms before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pyllmlite.core.errors import ModelError
from pyllmlite.core.weights import LinearWeight
from pyllmlite.model.checkpoint import Checkpoint, RawTensor
from pyllmlite.model.quantized.settings import group_size_of, integer, one_of
from pyllmlite.model.quantized.tensor import (
    QuantizedCheckpoint,
    QuantizedTensor,
    Rows,
    expect_shape,
    integer_weight,
    modules_with,
    narrowed,
    parts_of,
    unpack_words,
)

# The place of each output within a word: the inverse of the order in which they stand.
PLACES = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])


def awq_reader(settings: Mapping[str, Any]) -> Callable[[Checkpoint], Checkpoint]:
    layout = settings.get("version") or settings.get("format") or "gemm"
    gemv = one_of("version", str(layout).lower(), ("gemm", "gemv")) == "gemv"
    one_of("bits", integer(settings, "bits" if "bits" in settings else "w_bit", 4, 1), (4,))
    group_size = group_size_of(
        settings, "group_size" if "group_size" in settings else "q_group_size"
    )

    def read(base: Checkpoint) -> Checkpoint:
        needed = {"qweight": "i32", "qzeros": "i32", "scales": "f|bf"}
        kind = GEMVTensor if gemv else AWQTensor
        made: list[QuantizedTensor] = [
            kind(module + "weight", parts_of(base, module, needed), group_size)
            for module in modules_with(base, "qweight")
        ]
        if not made:
            raise ModelError(f"{base.path}: the config says awq, but no tensor is a qweight")
        return QuantizedCheckpoint(base, made)

    return read


def outputs_in_order(words: np.ndarray) -> np.ndarray:
    """int32 ``[n, out / 8]`` to uint8 codes ``[n, out]``."""
    count = words.shape[-1]
    codes = unpack_words(words, 4, 8 * count).reshape(words.shape[0], count, 8)
    return codes[:, :, PLACES].reshape(words.shape[0], 8 * count)


class AWQTensor(QuantizedTensor):
    """One matrix; see the module for the layout."""

    def __init__(self, name: str, parts: Mapping[str, RawTensor], group_size: int) -> None:
        packed = parts["qweight"].shape
        if len(packed) != 2 or not all(packed):
            raise ModelError(f"{name}: qweight is no matrix: the checkpoint is damaged")
        columns, rows = packed[0], packed[1] * 8
        self.group_size = group_size if group_size < columns else 0
        groups = -(-columns // self.group_size) if self.group_size else 1
        expect_shape(parts["qzeros"], (groups, rows // 8))
        expect_shape(parts["scales"], (groups, rows))
        super().__init__(name, (rows, columns), "awq-int4", parts)
        self._tables: tuple[np.ndarray, np.ndarray | None] | None = None

    def codes(self, rows: Rows = None) -> LinearWeight:
        rows = slice(None) if rows is None else rows
        if isinstance(rows, slice):
            first, last, step = rows.indices(self.shape[0])
            words = self.array("qweight")[:, first // 8 : -(-max(last, first) // 8)]
            inside: Rows = slice(first % 8, max(last, first) - first // 8 * 8, step)
        else:
            words, inside = self.array("qweight"), rows
        codes = outputs_in_order(words)[:, inside].T
        scales, zeros = self._groups()
        chosen = None if zeros is None else zeros[rows]
        return integer_weight(codes, 4, scales[rows], chosen, self.group_size)

    def release(self) -> None:
        self._tables = None
        super().release()

    def _groups(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Scales and zero points ``[out, groups]`` of the whole matrix."""
        if self._tables is None:
            zeros = np.ascontiguousarray(outputs_in_order(self.array("qzeros")).T)
            scales = narrowed(np.ascontiguousarray(self.finite("scales").T))
            self._tables = scales, None if (zeros == 8).all() else zeros
        return self._tables


class GEMVTensor(QuantizedTensor):
    """One matrix in the GEMV layout."""

    def __init__(self, name: str, parts: Mapping[str, RawTensor], group_size: int) -> None:
        packed = parts["qweight"].shape
        if len(packed) != 2 or not all(packed) or len(parts["qzeros"].shape) != 2:
            raise ModelError(f"{name}: qweight is no matrix: the checkpoint is damaged")
        rows, columns = packed[0], packed[1] * 8
        self.group_size = group_size if group_size < columns else 0
        self.groups = -(-columns // self.group_size) if self.group_size else 1
        width = parts["qzeros"].shape[1]
        if 8 * width < self.groups:
            raise ModelError(f"{name}: {width} words hold no {self.groups} zero points")
        expect_shape(parts["qzeros"], (rows, width))
        expect_shape(parts["scales"], (rows, 8 * width))
        super().__init__(name, (rows, columns), "awq-int4", parts)
        self._tables: tuple[np.ndarray, np.ndarray | None] | None = None

    def codes(self, rows: Rows = None) -> LinearWeight:
        rows = slice(None) if rows is None else rows
        codes = unpack_words(self.array("qweight")[rows], 4, self.shape[1])
        scales, zeros = self._groups()
        chosen = None if zeros is None else zeros[rows]
        return integer_weight(codes, 4, scales[rows], chosen, self.group_size)

    def release(self) -> None:
        self._tables = None
        super().release()

    def _groups(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Scales and zero points ``[out, groups]`` of the whole matrix."""
        if self._tables is None:
            zeros = unpack_words(self.array("qzeros"), 4, self.groups)
            scales = narrowed(np.ascontiguousarray(self.finite("scales")[:, : self.groups]))
            self._tables = scales, None if (zeros == 8).all() else zeros
        return self._tables
