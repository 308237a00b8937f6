"""Weights on their way into the kernels: read, quantize, pack, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllmlite.core.errors import ModelError, PluginError
from pyllmlite.core.spec import ModelSpec
from pyllmlite.core.weights import LinearShape, LinearWeight
from pyllmlite.model import blocks
from pyllmlite.runtime.native import native

if TYPE_CHECKING:
    from pyllmlite import _native
    from pyllmlite.hooks.quantizer import Quantizer
    from pyllmlite.model.source import MappedTensor, ModelSource

PACKED_FORMATS = ("f32", "bf16", "int8", "int4")
GATE_BLOCK = 16  # gate and up rows alternate in blocks of 16, so each half is padded to that
CHUNK_ELEMENTS = 4 << 20  # 16 MB of float32: what a row-wise quantizer is given at once


@dataclass(frozen=True)
class Part:
    """One tensor of a fused matrix, padded with zeros to ``rows`` and ``columns``."""

    name: str
    rows: int
    columns: int


@dataclass(frozen=True)
class MatrixPlan:
    """The unit of a plan: a fused matrix and the tensors it is made of."""

    shape: LinearShape
    parts: tuple[Part, ...]


@dataclass
class PackedMatrix:
    """A packed matrix with what its op has to do to the input."""

    packed: _native.PackedLinear
    int8_activations: bool = False
    input_scale: np.ndarray | None = None
    input_permutation: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    @property
    def mac_dtype(self) -> str:
        """What its products are of: see :class:`~pyllmlite.runtime.cost.OpCost`."""
        if self.int8_activations:
            return "int8"
        return "bf16" if self.packed.format == "bf16" else "f32"

    def op_arguments(self) -> dict[str, Any]:
        """The part of ``_native.linear``'s arguments that follows from the weight."""
        return {
            "weight": self.packed,
            "int8_activations": self.int8_activations,
            "input_scale": self.input_scale,
            "input_permutation": self.input_permutation,
        }


def padded_intermediate(spec: ModelSpec) -> int:
    """The MLP's width in the Program: zero rows fill the last block of 16."""
    return -(-spec.intermediate_size // GATE_BLOCK) * GATE_BLOCK


def plan_matrices(spec: ModelSpec) -> list[MatrixPlan]:
    """Every matrix of the model in loading order: the biggest (the embedding) first, so that
    its float copy is gone before the rest is there."""
    hidden, inner = spec.hidden_size, padded_intermediate(spec)

    def plan(name: str, kind: str, parts: list[tuple[str, int]], columns: int) -> MatrixPlan:
        made = tuple(Part(part, rows, columns) for part, rows in parts)
        out = sum(rows for _, rows in parts)
        gated = kind == "gate_up"
        return MatrixPlan(LinearShape(name, kind, out, columns, gated), made)

    plans = [plan("embed", "embed", [("embed", spec.vocab_size)], hidden)]
    if not spec.tie_embeddings:
        plans.append(plan("head", "head", [("head.weight", spec.vocab_size)], hidden))
    for i in range(spec.num_layers):
        at = f"layers.{i}."
        qkv = [
            (at + "q.weight", spec.q_size),
            (at + "k.weight", spec.kv_size),
            (at + "v.weight", spec.kv_size),
        ]
        plans.append(plan(at + "qkv", "qkv", qkv, hidden))
        out = [(at + "attn_out.weight", hidden)]
        plans.append(plan(at + "attn_out", "attn_out", out, spec.q_size))
        if spec.gated:
            halves = [(at + "gate.weight", inner), (at + "up.weight", inner)]
            plans.append(plan(at + "gate_up", "gate_up", halves, hidden))
        else:
            plans.append(plan(at + "mlp_up", "mlp_up", [(at + "up.weight", inner)], hidden))
        plans.append(plan(at + "mlp_down", "mlp_down", [(at + "down.weight", hidden)], inner))
    return plans


def load_matrix(source: ModelSource, plan: MatrixPlan, quantizer: Quantizer) -> PackedMatrix:
    """Read, quantize and pack one matrix.

    Raises:
        ModelError: A tensor is missing or has another shape, or its values cannot be quantized.
        PluginError: The quantizer answered with something the kernels have no format for.
    """
    shape = plan.shape
    kept = _keep_blocks(source, plan, quantizer)
    if kept is not None:
        return kept
    if not quantizer.rowwise:
        pieces = [piece for _, piece in _float_rows(source, plan, whole=True)]
        weight = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
        made = quantizer.quantize(shape, weight)
        _check(quantizer, shape, made, shape.out_features)
        packed = native().PackedLinear(
            made.format, made.values, made.scales, made.mins, made.group_size, shape.gated
        )
        return PackedMatrix(
            packed, made.int8_activations, made.input_scale, made.input_permutation
        )
    result: PackedMatrix | None = None
    for first, block in _float_rows(source, plan, whole=False):
        made = quantizer.quantize(shape, block)
        _check(quantizer, shape, made, block.shape[0])
        result = result or _empty(shape, made)
        result.packed.set_rows(first, made.values, made.scales, made.mins)
    assert result is not None
    return result


def _empty(shape: LinearShape, like: LinearWeight) -> PackedMatrix:
    packed = native().PackedLinear.empty(
        like.format,
        shape.out_features,
        shape.in_features,
        like.group_size,
        like.mins is not None,
        shape.gated,
    )
    return PackedMatrix(packed, like.int8_activations)


def _keep_blocks(
    source: ModelSource, plan: MatrixPlan, quantizer: Quantizer
) -> PackedMatrix | None:
    """The matrix in the blocks it is stored in; None where that cannot be or is not wanted: its
    parts have different types, or a type that no packed format holds (exactly, for f32)."""
    columns = plan.shape.in_features
    stored: list[MappedTensor] = []
    for part in plan.parts:
        tensor = source.raw(part.name)
        if tensor is None or tensor.shape != (part.rows, columns):
            return None
        if stored and tensor.dtype != stored[0].dtype:
            return None
        if not blocks.fits(tensor.dtype, columns, exact=quantizer.needs.dtype == "f32"):
            return None
        stored.append(tensor)
    result: PackedMatrix | None = None
    first, step = 0, max(GATE_BLOCK, CHUNK_ELEMENTS // columns)
    for tensor in stored:
        data = tensor.raw()
        if data is None:
            return None
        for start in range(0, len(data), step):
            codes = blocks.blocks_to_codes(tensor.dtype, data[start : start + step])
            made = quantizer.keep(plan.shape, codes)
            if made is None:
                return None
            result = result or _empty(plan.shape, made)
            result.packed.set_rows(first + start, made.values, made.scales, made.mins)
        first += len(data)
        tensor.release()
    return result


def _float_rows(
    source: ModelSource, plan: MatrixPlan, whole: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """``(first row, float32 rows)`` blocks of the fused, padded matrix."""
    first = 0
    columns = plan.shape.in_features
    step = plan.shape.out_features if whole else max(GATE_BLOCK, CHUNK_ELEMENTS // columns)
    for part in plan.parts:
        weight = source.raw(part.name)
        if weight is None:
            raise ModelError(f"the checkpoint has no tensor for {part.name!r}")
        if len(weight.shape) != 2 or weight.shape[0] > part.rows or weight.shape[1] > part.columns:
            raise ModelError(
                f"{part.name!r} has shape {list(weight.shape)}, "
                f"the config asks for {[part.rows, part.columns]}"
            )
        for start in range(0, part.rows, step):
            stop = min(start + step, part.rows)
            rows = weight.float32(slice(start, stop))
            if rows.shape != (stop - start, columns):
                padded = np.zeros((stop - start, columns), np.float32)
                padded[: rows.shape[0], : rows.shape[1]] = rows
                rows = padded
            yield first + start, np.ascontiguousarray(rows, dtype=np.float32)
        first += part.rows


def _check(quantizer: Quantizer, shape: LinearShape, made: LinearWeight, rows: int) -> None:
    if made.format not in PACKED_FORMATS:
        raise PluginError(
            f"quantizer {quantizer.name!r} made format {made.format!r} for {shape.name}; "
            f"this device's kernels take {', '.join(PACKED_FORMATS)}"
        )
    if made.shape != (rows, shape.in_features):
        raise PluginError(
            f"quantizer {quantizer.name!r} returned codes of shape {list(made.shape)} for "
            f"{shape.name}, which is {[rows, shape.in_features]}"
        )
