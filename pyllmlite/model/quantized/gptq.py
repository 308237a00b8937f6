"""GPTQ's layout, as AutoGPTQ and GPTQModel write it.

Of a matrix ``[out, in]``, with codes of 2, 3, 4 or 8 bits packed into int32, lowest bits first:

- ``qweight [in * bits / 32, out]``: codes, packed along the inputs;
- ``scales [groups, out]``;
- ``qzeros [groups, out * bits / 32]``: zero points, packed along the outputs; the first version
  of the format (``checkpoint_format`` "gptq") stores them less one, "gptq_v2" as they are;
- ``g_idx [in]``: the group of every input.  With ``desc_act`` groups are made of inputs in the
  order of their activations, and a group's inputs lie anywhere.

``w[o, i] = scales[g, o] * (code - zero[g, o])`` with ``g = g_idx[i]``.
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
    order_of_groups,
    parts_of,
    unpack_words,
)

FORMATS = ("gptq", "gptq_v2")
BITS = (2, 3, 4, 8)
# One for every zero point of a word.  GPTQModel subtracts it from whole words, so that a zero point
# of 0 borrows from the next one: only added to whole words it comes back.  (3 bits, which run over
# the edges of words, it takes apart first.)
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def gptq_reader(settings: Mapping[str, Any]) -> Callable[[Checkpoint], Checkpoint]:
    layout = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    stored_less_one = one_of("checkpoint_format", layout, FORMATS) == "gptq"
    bits = one_of("bits", integer(settings, "bits", 4, 1), BITS)
    group_size = group_size_of(settings, "group_size")

    def read(base: Checkpoint) -> Checkpoint:
        made: list[QuantizedTensor] = []
        for module in modules_with(base, "qweight"):
            needed = {"qweight": "i32", "qzeros": "i32", "scales": "f|bf"}
            parts = parts_of(base, module, needed, {"g_idx": "i"})
            made.append(GPTQTensor(module + "weight", parts, bits, group_size, stored_less_one))
        if not made:
            raise ModelError(f"{base.path}: the config says gptq, but no tensor is a qweight")
        return QuantizedCheckpoint(base, made)

    return read


class GPTQTensor(QuantizedTensor):
    """One matrix; see the module for the layout.

    Args:
        bits, group_size: As the config says; a matrix that differs (GPTQModel's ``dynamic``)
            shows it in its shapes.
        stored_less_one: Zero points are stored less one.
    """

    def __init__(
        self,
        name: str,
        parts: Mapping[str, RawTensor],
        bits: int,
        group_size: int,
        stored_less_one: bool,
    ) -> None:
        packed, scales = parts["qweight"].shape, parts["scales"].shape
        if len(packed) != 2 or len(scales) != 2 or not scales[0]:
            raise ModelError(f"{name}: GPTQ's tensors are matrices: the checkpoint is damaged")
        if "g_idx" in parts and parts["g_idx"].shape[0]:
            columns = parts["g_idx"].shape[0]
            # The last word may be partly empty: of the widths that fit the config's goes first.
            fitting = [b for b in (bits, *BITS) if -(-columns * b // 32) == packed[0]]
            found = fitting[0] if fitting else packed[0] * 32 // columns
            bits = one_of(f"{name}: bits", found, BITS)
        else:
            columns = packed[0] * 32 // bits
        rows, groups = packed[1], scales[0]
        expect_shape(parts["qweight"], (-(-columns * bits // 32), rows))
        expect_shape(parts["scales"], (groups, rows))
        expect_shape(parts["qzeros"], (groups, -(-rows * bits // 32)))
        super().__init__(name, (rows, columns), f"gptq-int{bits}", parts)
        self.bits = bits
        self.stored_less_one = stored_less_one
        self.group_size = 0 if groups == 1 else group_size
        if groups > 1 and (not group_size or -(-columns // group_size) != groups):
            if columns % groups:
                raise ModelError(f"{name}: {groups} groups do not fit {columns} columns")
            self.group_size = columns // groups
        self._tables: tuple[np.ndarray, np.ndarray | None] | None = None

    def codes(self, rows: Rows = None) -> LinearWeight:
        rows = slice(None) if rows is None else rows
        columns = self.shape[1]
        words = np.ascontiguousarray(self.array("qweight")[:, rows].T)
        codes = unpack_words(words, self.bits, columns)
        order = self._order()
        if order is not None:
            codes = codes[:, order]
        scales, zeros = self._groups()
        chosen = None if zeros is None else zeros[rows]
        made = integer_weight(codes, self.bits, scales[rows], chosen, self.group_size)
        made.input_permutation = order
        return made

    def release(self) -> None:
        self._tables = None
        super().release()

    def _groups(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Scales and zero points ``[out, groups]`` of the whole matrix; no zero points where all
        of them stand in the middle."""
        if self._tables is None:
            words = self.array("qzeros")
            if self.stored_less_one and self.bits in ONES:
                words = words.view(np.uint32) + np.uint32(ONES[self.bits])
            zeros = unpack_words(words, self.bits, self.shape[0]).T
            if self.stored_less_one and self.bits not in ONES:
                zeros = (zeros + np.uint8(1)) & np.uint8((1 << self.bits) - 1)
            symmetric = bool((zeros == 1 << (self.bits - 1)).all())
            scales = narrowed(np.ascontiguousarray(self.finite("scales").T))
            self._tables = scales, None if symmetric else np.ascontiguousarray(zeros)
        return self._tables

    def _order(self) -> np.ndarray | None:
        """The inputs group by group; None where they lie so already."""
        if "g_idx" not in self.parts or not self.group_size:
            return None
        return order_of_groups(self.name, self.array("g_idx"), self.group_size)
