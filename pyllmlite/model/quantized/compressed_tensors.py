"""compressed-tensors, as llm-compressor writes it: pack-quantized and int-quantized.

Of a matrix ``[out, in]``:

- pack-quantized: ``weight_packed [out, in * bits / 32]`` int32, codes plus ``2^(bits - 1)``, lowest
  bits first; ``weight_shape [2]``; ``weight_zero_point``, packed likewise along the outputs
  ``[out * bits / 32, groups]``;
- int-quantized: ``weight [out, in]`` int8; ``weight_zero_point`` int8 ``[out, groups]``;
- both: ``weight_scale [out, groups]`` (channel: one group), ``weight_g_idx [in]`` where groups go
  by the order of activations.

``w = scale * (code - zero)``.  Which inputs are quantized, and how, stands in the config's groups;
those that are quantized per token as the model runs (``dynamic``) are read.  A ``kv_cache_scheme``
is not: keys and values are stored as the cache is asked to.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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

log = logging.getLogger(__name__)

FORMATS = ("pack-quantized", "int-quantized")


@dataclass(frozen=True)
class Scheme:
    """How the modules of one config group are quantized.

    Attributes:
        targets: Names, ``re:`` patterns, or a class of modules.
        group_size: 0: the whole row (strategies channel and tensor).
        activation_group: Of int8 activations, as :class:`LinearWeight` has it; 0: none.
    """

    targets: tuple[str, ...]
    bits: int
    group_size: int
    symmetric: bool
    activation_group: int

    def rank(self, module: str) -> int:
        """How exactly a target names the module: 0 not at all, 3 by its name."""
        best = 0
        for target in self.targets:
            if target == module or module.endswith("." + target):
                best = 3
            elif target.startswith("re:") and re.match(target[3:], module):
                best = max(best, 2)
            elif target == "Linear":
                best = max(best, 1)
        return best


def compressed_tensors_reader(settings: Mapping[str, Any]) -> Callable[[Checkpoint], Checkpoint]:
    for name, plain in (("sparsity_config", "dense"), ("transform_config", None)):
        found = settings.get(name)
        if found and (not isinstance(found, dict) or found.get("format") != plain):
            raise ModelError(f"{name} is not read; only quantized weights are")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise ModelError("config_groups is missing")
    default = settings.get("format")
    schemes = [_scheme(name, group, default) for name, group in groups.items()]

    kv_scheme = settings.get("kv_cache_scheme")

    def read(base: Checkpoint) -> Checkpoint:
        if kv_scheme:
            log.warning(
                "%s: its kv_cache_scheme is not followed: keys and values are kept in "
                "kv_cache_dtype, and the scales stored for them are not read",
                base.path,
            )
        made: list[QuantizedTensor] = []
        for packed in (True, False):
            codes = "weight_packed" if packed else "weight"
            needed = {codes: "i32" if packed else "i8", "weight_scale": "f|bf"}
            if packed:
                needed["weight_shape"] = "i"
            others = {"weight_zero_point": "i", "weight_g_idx": "i"}
            for module in modules_with(base, codes):
                if packed or base.tensor(module + codes).dtype == "i8":
                    parts = parts_of(base, module, needed, others)
                    scheme = max(schemes, key=lambda scheme: scheme.rank(module[:-1]))
                    made.append(CompressedTensor(module + "weight", parts, scheme))
        if not made:
            raise ModelError(f"{base.path}: the config says compressed-tensors, but no tensor is")
        return QuantizedCheckpoint(base, made)

    return read


def _scheme(name: str, group: Any, default: Any) -> Scheme:
    if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
        raise ModelError(f"config_groups.{name} says nothing of weights")
    one_of("format", group.get("format") or default, FORMATS)
    weights = group["weights"]
    one_of("weight type", weights.get("type", "int"), ("int",))
    bits = one_of("weight num_bits", weights.get("num_bits"), (2, 4, 8))
    strategy = one_of(
        "weight strategy", weights.get("strategy") or "group", ("channel", "group", "tensor")
    )
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise ModelError(f"config_groups.{name} names no targets")
    for target in targets:
        if target.startswith("re:"):
            try:
                re.compile(target[3:])
            except re.error as error:
                raise ModelError(f"target {target[:60]!r} is no pattern ({error})") from None
    return Scheme(
        tuple(targets),
        bits,
        group_size_of(weights, "group_size") if strategy == "group" else 0,
        bool(weights.get("symmetric", True)),
        _activation_group(group.get("input_activations")),
    )


def _activation_group(inputs: Any) -> int:
    if inputs is None:
        return 0
    if not isinstance(inputs, dict):
        raise ModelError("input_activations is no object")
    one_of("input_activations' type", inputs.get("type", "int"), ("int",))
    one_of("input_activations' num_bits", inputs.get("num_bits"), (8,))
    one_of("input_activations' dynamic", inputs.get("dynamic"), (True,))
    one_of("input_activations' symmetric", inputs.get("symmetric", True), (True,))
    strategy = one_of("input_activations' strategy", inputs.get("strategy"), ("token", "group"))
    return -1 if strategy == "token" else integer(inputs, "group_size", None, 1)


class CompressedTensor(QuantizedTensor):
    """One matrix; see the module for the layout."""

    def __init__(self, name: str, parts: Mapping[str, RawTensor], scheme: Scheme) -> None:
        self.packed = "weight_packed" in parts
        self.bits = scheme.bits if self.packed else 8
        self.scheme = scheme
        if self.packed:
            expect_shape(parts["weight_shape"], (2,))
            shape = tuple(int(n) for n in parts["weight_shape"].plain())
        else:
            shape = parts["weight"].shape
        if len(shape) != 2 or min(shape) < 1:
            raise ModelError(f"{name} is no matrix: the checkpoint is damaged")
        rows, columns = shape
        self.group_size = scheme.group_size if scheme.group_size < columns else 0
        groups = -(-columns // self.group_size) if self.group_size else 1
        if self.packed:
            expect_shape(parts["weight_packed"], (rows, -(-columns * self.bits // 32)))
            zero_shape = (-(-rows * self.bits // 32), groups)
        else:
            zero_shape = (rows, groups)
        self._whole = int(np.prod(parts["weight_scale"].shape)) == 1  # one scale for the matrix
        if not self._whole:
            expect_shape(parts["weight_scale"], (rows, groups))
        if not scheme.symmetric:
            if "weight_zero_point" not in parts:
                raise ModelError(f"{name} has no weight_zero_point, and is not symmetric")
            if not self._whole:
                expect_shape(parts["weight_zero_point"], zero_shape)
        if "weight_g_idx" in parts:
            expect_shape(parts["weight_g_idx"], (columns,))
        kind = "pack" if self.packed else "int"
        super().__init__(name, (rows, columns), f"{kind}-quantized-int{self.bits}", parts)
        self._tables: tuple[np.ndarray, np.ndarray | None] | None = None

    def codes(self, rows: Rows = None) -> LinearWeight:
        rows = slice(None) if rows is None else rows
        if self.packed:
            codes = unpack_words(self.array("weight_packed")[rows], self.bits, self.shape[1])
        else:
            codes = self.array("weight")[rows].view(np.uint8) ^ np.uint8(0x80)
        order = self._order()
        if order is not None:
            codes = codes[:, order]
        scales, zeros = self._groups()
        chosen = None if zeros is None else zeros[rows]
        made = integer_weight(codes, self.bits, scales[rows], chosen, self.group_size)
        made.input_permutation = order
        made.int8_activations = self.scheme.activation_group != 0
        made.activation_group = self.scheme.activation_group
        return made

    def release(self) -> None:
        self._tables = None
        super().release()

    def _groups(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Scales and zero points (of codes from 0) ``[out, groups]`` of the whole matrix."""
        if self._tables is not None:
            return self._tables
        rows = self.shape[0]
        scales = self.finite("weight_scale").reshape(1 if self._whole else rows, -1)
        zeros: np.ndarray | None = None
        if not self.scheme.symmetric:
            stored = self.array("weight_zero_point")
            if self.packed and not self._whole:
                zeros = unpack_words(np.ascontiguousarray(stored.T), self.bits, rows).T
            else:
                zeros = stored.reshape(scales.shape).astype(np.int16) + (1 << (self.bits - 1))
            zeros = None if (zeros == 1 << (self.bits - 1)).all() else zeros
        if self._whole:
            scales = np.repeat(scales, rows, axis=0)
            zeros = None if zeros is None else np.repeat(zeros.reshape(1, -1), rows, axis=0)
        self._tables = narrowed(scales), zeros
        return self._tables

    def _order(self) -> np.ndarray | None:
        if "weight_g_idx" not in self.parts or not self.group_size:
            return None
        return order_of_groups(self.name, self.array("weight_g_idx"), self.group_size)
