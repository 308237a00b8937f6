"""Weights on their way into the kernels: read, quantize, pack, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllmlite.core.errors import ModelError, PluginError
from pyllmlite.core.spec import ModelSpec
from pyllmlite.core.weights import LinearShape, LinearWeight
from pyllmlite.runtime.native import native

if TYPE_CHECKING:
    from pyllmlite import _native
    from pyllmlite.hooks.quantizer import Quantizer
    from pyllmlite.model.source import MappedTensor, ModelSource

CODE_FORMATS = ("int8", "int4", "codebook4")
PACKED_FORMATS = ("f32", "bf16", *CODE_FORMATS)
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
    activation_group: int = 0
    outlier_threshold: float = 0.0
    bf16_activations: bool = False

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    @property
    def mac_dtype(self) -> str:
        """What its products are of: see :class:`~pyllmlite.runtime.cost.OpCost`."""
        if self.int8_activations:
            return "int8"
        return "bf16" if self.bf16_activations or self.packed.format == "bf16" else "f32"

    @property
    def label(self) -> str:
        """What its op multiplies, in words: ``int8 x int8, above 6 in f32``."""
        outliers = f", above {self.outlier_threshold:g} in f32" if self.outlier_threshold else ""
        return f"{self.packed.format} x {self.mac_dtype}{outliers}"

    def op_arguments(self) -> dict[str, Any]:
        """The part of ``_native.linear``'s arguments that follows from the weight."""
        group = self.activation_group
        return {
            "weight": self.packed,
            "int8_activations": self.int8_activations,
            "activation_group": self.packed.shape[1] if group < 0 else group,
            "input_scale": self.input_scale,
            "input_permutation": self.input_permutation,
            "outlier_threshold": self.outlier_threshold,
            "bf16_activations": self.bf16_activations,
        }


@dataclass
class SplitMatrix:
    """A fused matrix whose parts were quantized each in its own way: one packed matrix a part,
    each with as many rows as the part."""

    parts: tuple[PackedMatrix, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


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


def keeps_codes(source: ModelSource, quantizer: Quantizer) -> bool:
    """False: a matrix of a layer arrives in codes, and the quantizer rounds it once more."""
    for plan in plan_matrices(source.spec):
        tensors = [source.raw(part.name) for part in plan.parts]
        if plan.shape.name.startswith("layers.") and any(t and t.is_codes for t in tensors):
            if _stored_layouts(source, plan, quantizer) is None:
                return False
    return True


def load_matrix(
    source: ModelSource, plan: MatrixPlan, quantizer: Quantizer
) -> PackedMatrix | SplitMatrix:
    """Read, quantize and pack one matrix.

    Raises:
        ModelError: A tensor is missing or has another shape, or its values cannot be quantized.
        PluginError: The quantizer answered with something the kernels have no format for.
    """
    stored = _stored_layouts(source, plan, quantizer)
    if stored is not None:
        layout = common_layout(stored)
        if layout is None:
            count = len(plan.parts)
            return SplitMatrix(tuple(_load_part(source, plan, i, quantizer) for i in range(count)))
        return _keep(source, plan, quantizer, layout)
    return _quantize(source, plan, quantizer)


def _quantize(source: ModelSource, plan: MatrixPlan, quantizer: Quantizer) -> PackedMatrix:
    """A matrix that arrives as floats, or is to be quantized again."""
    shape = plan.shape
    if not quantizer.rowwise:
        pieces = [piece for _, piece in _float_rows(source, plan, whole=True)]
        weight = np.concatenate(pieces) if len(pieces) > 1 else pieces[0]
        made = quantizer.quantize(shape, weight)
        _check(quantizer, shape, made, shape.out_features)
        result = _empty(shape, made, quantizer)
        _put(result, 0, made)
        return result
    packed: PackedMatrix | None = None
    for first, block in _float_rows(source, plan, whole=False):
        made = quantizer.quantize(shape, block)
        _check(quantizer, shape, made, block.shape[0])
        packed = packed or _empty(shape, made, quantizer)
        _put(packed, first, made)
    assert packed is not None
    return packed


def _load_part(
    source: ModelSource, plan: MatrixPlan, index: int, quantizer: Quantizer
) -> PackedMatrix:
    part = plan.parts[index]
    shape = replace(plan.shape, name=part.name, out_features=part.rows, gated=False)
    made = load_matrix(source, MatrixPlan(shape, (part,)), quantizer)
    assert isinstance(made, PackedMatrix)  # one part has one layout
    return made


def _empty(shape: LinearShape, like: LinearWeight, quantizer: Quantizer) -> PackedMatrix:
    """Float inputs of codes are rounded to bf16 as those of bf16 weights are, unless the dtype is
    f32 or ``extra["bf16_activations"]`` says otherwise."""
    needs = quantizer.needs
    rounded = bool(needs.extra.get("bf16_activations", needs.dtype != "f32"))
    packed = native().PackedLinear.empty(
        like.format,
        shape.out_features,
        shape.in_features,
        like.group_size,
        like.mins is not None,
        shape.gated,
        wide_scales=like.scales is not None and like.scales.dtype == np.float32,
        zero_points=like.zero_points is not None,
        codebook=like.codebook,
    )
    return PackedMatrix(
        packed,
        like.int8_activations,
        like.input_scale,
        like.input_permutation,
        like.activation_group,
        like.outlier_threshold,
        rounded and like.format in CODE_FORMATS and not like.int8_activations,
    )


def _put(matrix: PackedMatrix, first: int, made: LinearWeight) -> None:
    mins = made.mins if made.zero_points is None else made.zero_points
    if mins is not None and made.scales is not None:
        mins = np.ascontiguousarray(mins, made.scales.dtype)
    matrix.packed.set_rows(first, made.values, made.scales, mins)


def _stored_layouts(
    source: ModelSource, plan: MatrixPlan, quantizer: Quantizer
) -> list[LinearWeight | None] | None:
    """For each part what the quantizer keeps of its stored codes, without a row of them: format,
    groups, permutation, ...; None for a part that is to be quantized.  None for the whole where no
    part is kept.  With dtype f32 only codes that are held exactly are kept."""
    exact = quantizer.needs.dtype == "f32"
    layouts: list[LinearWeight | None] = []
    for part in plan.parts:
        tensor = source.raw(part.name)
        if tensor is not None:
            _check_size(tensor, part)
        codes = None if tensor is None else tensor.codes(slice(0, 0), exact)
        layouts.append(None if codes is None else quantizer.keep(plan.shape, codes))
    return None if all(layout is None for layout in layouts) else layouts


def common_layout(layouts: list[LinearWeight | None]) -> LinearWeight | None:
    """The layout in which parts can stand in one packed matrix, each of their values exact; None
    where they need matrices of their own."""
    first = layouts[0]
    if first is None:
        return None
    for other in layouts[1:]:
        if other is None or not _same(first, other):
            return None
    made = [layout for layout in layouts if layout is not None]
    wide = any(m.scales is not None and m.scales.dtype == np.float32 for m in made)
    points = next((m.zero_points for m in made if m.zero_points is not None), None)
    scales = first.scales
    if wide and scales is not None:
        scales = scales.astype(np.float32)
    return replace(first, scales=scales, zero_points=points)


def _same(one: LinearWeight, other: LinearWeight) -> bool:
    plain = ("format", "group_size", "int8_activations", "activation_group", "outlier_threshold")
    if any(getattr(one, name) != getattr(other, name) for name in plain):
        return False
    if (one.mins is None) != (other.mins is None):
        return False
    return all(
        _equal(getattr(one, name), getattr(other, name))
        for name in ("input_scale", "input_permutation", "codebook")
    )


def _equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return np.array_equal(one, other) if one is not None and other is not None else one is other


def _keep(
    source: ModelSource, plan: MatrixPlan, quantizer: Quantizer, layout: LinearWeight
) -> PackedMatrix:
    """The matrix in the codes that it is stored in."""
    columns = plan.shape.in_features
    if layout.input_permutation is not None:
        known = len(layout.input_permutation)
        rest = np.arange(known, columns, dtype=np.int32)
        layout = replace(layout, input_permutation=np.append(layout.input_permutation, rest))
    _check_format(quantizer, plan.shape, layout)
    result = _empty(plan.shape, layout, quantizer)
    first, step = 0, max(GATE_BLOCK, CHUNK_ELEMENTS // columns)
    for part in plan.parts:
        tensor = source.raw(part.name)
        assert tensor is not None
        for start in range(0, tensor.shape[0], step):
            codes = tensor.codes(slice(start, min(start + step, tensor.shape[0])))
            assert codes is not None
            _put(result, first + start, _padded(codes, layout, columns))
        first += part.rows
        tensor.release()
    return result


def _padded(codes: LinearWeight, layout: LinearWeight, columns: int) -> LinearWeight:
    """Rows of stored codes as rows of a matrix in a common layout, with zero codes and scales in
    the columns behind them, which meet inputs that are zero."""
    assert codes.scales is not None and layout.scales is not None
    rows, known = codes.shape
    values, scales, mins, points = codes.values, codes.scales, codes.mins, codes.zero_points
    if layout.zero_points is not None and points is None:
        points = np.full(scales.shape, 8 if codes.format == "int4" else 0, np.int16)
    if known < columns:
        values = np.pad(values, ((0, 0), (0, columns - known)))
        groups = -(-columns // codes.group_size) if codes.group_size else 1
        more = ((0, 0), (0, groups - scales.shape[1]))
        scales = np.pad(scales, more)
        mins = None if mins is None else np.pad(mins, more)
        points = None if points is None else np.pad(points, more)
    scales = scales.astype(layout.scales.dtype, copy=False)
    return replace(codes, values=values, scales=scales, mins=mins, zero_points=points)


def _check_size(tensor: MappedTensor, part: Part) -> None:
    shape = tensor.shape
    if len(shape) != 2 or shape[0] > part.rows or shape[1] > part.columns:
        raise ModelError(
            f"{part.name!r} has shape {list(shape)}, "
            f"the config asks for {[part.rows, part.columns]}"
        )


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
        _check_size(weight, part)
        for start in range(0, part.rows, step):
            stop = min(start + step, part.rows)
            rows = weight.float32(slice(start, stop))
            if rows.shape != (stop - start, columns):
                padded = np.zeros((stop - start, columns), np.float32)
                padded[: rows.shape[0], : rows.shape[1]] = rows
                rows = padded
            yield first + start, np.ascontiguousarray(rows, dtype=np.float32)
        first += part.rows


def _check_format(quantizer: Quantizer, shape: LinearShape, made: LinearWeight) -> None:
    if made.format not in PACKED_FORMATS:
        raise PluginError(
            f"quantizer {quantizer.name!r} made format {made.format!r} for {shape.name}; "
            f"this device's kernels take {', '.join(PACKED_FORMATS)}"
        )


def _check(quantizer: Quantizer, shape: LinearShape, made: LinearWeight, rows: int) -> None:
    _check_format(quantizer, shape, made)
    if made.shape != (rows, shape.in_features):
        raise PluginError(
            f"quantizer {quantizer.name!r} returned codes of shape {list(made.shape)} for "
            f"{shape.name}, which is {[rows, shape.in_features]}"
        )


@dataclass(frozen=True)
class ExpectedMatrix:
    """What a matrix will be once it is packed.  ``label``: what its op multiplies; ``nbytes``:
    exact for a quantizer that works row by row, else from its ``bits_per_weight``; ``allocate``:
    makes it, of zeros, where the layout is known."""

    shape: LinearShape
    nbytes: int
    mac_dtype: str
    label: str
    allocate: Callable[[], PackedMatrix] | None = None

    @property
    def weights(self) -> int:
        return self.shape.out_features * self.shape.in_features


def expected_matrix(
    source: ModelSource | None, plan: MatrixPlan, quantizer: Quantizer
) -> tuple[ExpectedMatrix, ...]:
    """The packed matrix that :func:`load_matrix` would make, or its parts, without reading weights.

    Args:
        source: For matrices whose stored codes are kept; None: all are quantized from floats.
    """
    shape = plan.shape
    stored = None if source is None else _stored_layouts(source, plan, quantizer)
    if stored is not None:
        layout = common_layout(stored)
        if layout is not None:
            return (_expected(shape, layout, quantizer),)
        parts = [
            replace(shape, name=part.name, out_features=part.rows, gated=False)
            for part in plan.parts
        ]
        return tuple(
            _expected(alone, _sample(alone, quantizer) if own is None else own, quantizer)
            for alone, own in zip(parts, stored, strict=True)
        )
    return (_expected(shape, _sample(shape, quantizer), quantizer),)


def _sample(shape: LinearShape, quantizer: Quantizer) -> LinearWeight | None:
    """One panel of the matrix, quantized; None where the method needs the whole of it."""
    if not quantizer.rowwise or quantizer.needs_calibration:
        return None
    rows = 2 * GATE_BLOCK if shape.gated else GATE_BLOCK
    ramp = np.linspace(-1, 1, shape.in_features, dtype=np.float32)
    try:
        return quantizer.quantize(shape, np.tile(ramp, (rows, 1)))
    except Exception:  # it may insist on the whole matrix all the same
        return None


def _expected(
    shape: LinearShape, layout: LinearWeight | None, quantizer: Quantizer
) -> ExpectedMatrix:
    if layout is None:
        bits = quantizer.bits_per_weight(shape)
        nbytes = int(shape.out_features * shape.in_features * bits / 8)
        return ExpectedMatrix(shape, nbytes, "int8" if bits < 12 else "bf16", f"{bits:.2f} bits")
    rows = 2 * GATE_BLOCK if shape.gated else GATE_BLOCK
    panel = _empty(replace(shape, out_features=rows), layout, quantizer)
    panels = -(-shape.out_features // rows)
    return ExpectedMatrix(
        shape,
        panels * panel.nbytes,
        panel.mac_dtype,
        panel.label,
        lambda: _allocate(shape, layout, quantizer),
    )


def _allocate(shape: LinearShape, layout: LinearWeight, quantizer: Quantizer) -> PackedMatrix:
    """The whole matrix with codes of zero, written, so that its pages are its own."""
    made = _empty(shape, layout, quantizer)
    groups = -(-shape.in_features // layout.group_size) if layout.group_size else 1
    step = max(2 * GATE_BLOCK, CHUNK_ELEMENTS // shape.in_features // 32 * 32)
    for first in range(0, shape.out_features, step):
        count = min(step, shape.out_features - first)

        def ones(like: np.ndarray | None, count: int = count) -> np.ndarray | None:
            return None if like is None else np.ones((count, groups), like.dtype)

        rows = replace(
            layout,
            values=np.zeros((count, shape.in_features), layout.values.dtype),
            scales=ones(layout.scales),
            mins=ones(layout.mins),
            zero_points=ones(layout.zero_points),
        )
        _put(made, first, rows)
    return made
