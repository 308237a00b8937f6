"""What the readers of quantized checkpoints share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from pyllmlite.core.errors import ModelError
from pyllmlite.core.weights import LinearWeight
from pyllmlite.model.checkpoint import Checkpoint, RawTensor

Rows = slice | np.ndarray | None


class QuantizedTensor(ABC):
    """A matrix ``[out, in]`` that stands in several stored tensors, with the face of
    :class:`~pyllmlite.model.checkpoint.RawTensor`.

    Attributes:
        name: The matrix's plain name (``model.layers.0.self_attn.q_proj.weight``).
        dtype: What the checkpoint says it is: ``gptq-int4``, ``nf4``, ...
        parts: The stored tensors.
    """

    def __init__(
        self, name: str, shape: tuple[int, int], dtype: str, parts: Mapping[str, RawTensor]
    ) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.parts = dict(parts)
        self.nbytes = sum(part.nbytes for part in self.parts.values())

    @abstractmethod
    def codes(self, rows: Rows = None) -> LinearWeight | None:
        """The stored values of some rows (a slice or indices), exact; None where no packed format
        can hold them, as where a block of values straddles two rows."""

    def float32(self, rows: Rows = None) -> np.ndarray:
        """A float32 copy of the values that the codes stand for."""
        codes = self.codes(rows)
        assert codes is not None
        return codes.float32()

    def raw(self) -> None:
        """No run of stored bytes stands for this matrix."""
        return None

    def release(self) -> None:
        for part in self.parts.values():
            part.release()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {list(self.shape)}, {self.dtype})"

    # -- what subclasses read with -----------------------------------------------------------
    def array(self, part: str) -> np.ndarray:
        """A stored part in its own type and shape, memory-mapped (bf16 and others as bits)."""
        tensor = self.parts[part]
        return tensor.plain().reshape(tensor.shape)

    def finite(self, part: str, rows: Rows = None) -> np.ndarray:
        """A stored part of scales as float32; NaN or infinity in it is refused."""
        values = self.parts[part].float32(rows)
        if not np.isfinite(values).all():
            raise ModelError(
                f"{self.parts[part].name} holds a scale that is not finite: the checkpoint is "
                "damaged"
            )
        return values


class QuantizedCheckpoint(Checkpoint):
    """A checkpoint in which the tensors of quantized matrices are replaced by the matrices."""

    def __init__(self, base: Checkpoint, made: list[QuantizedTensor]) -> None:
        self.path = base.path
        hidden = {part.name for tensor in made for part in tensor.parts.values()}
        self._all: dict[str, Any] = {
            name: base.tensor(name) for name in base.names() if name not in hidden
        }
        for name, tensor in self._all.items():
            if name.endswith(".weight") and tensor.dtype[0] in "iu":
                raise ModelError(
                    f"{self.path}: {name} holds integers ({tensor.dtype}) without their scales: "
                    "the checkpoint is cut off"
                )
        self._all.update((tensor.name, tensor) for tensor in made)

    def names(self) -> list[str]:
        return list(self._all)

    def tensor(self, name: str) -> Any:
        return self._all[name]

    @property
    def _tensors(self) -> dict[str, Any]:
        return self._all


def modules_with(base: Checkpoint, suffix: str) -> list[str]:
    """Names of the modules that have a tensor ``.suffix``."""
    return [name.removesuffix(suffix) for name in base.names() if name.endswith("." + suffix)]


def parts_of(
    base: Checkpoint, module: str, needed: dict[str, str], optional: dict[str, str] | None = None
) -> dict[str, RawTensor]:
    """A module's tensors by name (``module`` ends in a dot).

    Args:
        needed, optional: Name to the first letters of its dtype (``i32``, ``f|bf`` for floats).
    """
    found = {}
    for part, dtype in [*needed.items(), *(optional or {}).items()]:
        if module + part not in base:
            if part in needed:
                raise ModelError(f"{base.path}: lacks the tensor {module}{part}")
            continue
        tensor = base.tensor(module + part)
        if not tensor.dtype.startswith(tuple(dtype.split("|"))):
            raise ModelError(
                f"{base.path}: {module}{part} is {tensor.dtype}, expected {dtype.split('|')[0]}"
            )
        found[part] = tensor
    return found


def expect_shape(tensor: RawTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ModelError(
            f"{tensor.name} has shape {list(tensor.shape)}, expected {list(shape)}: the checkpoint "
            "is damaged"
        )


def unpack_words(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Integers of ``bits`` bits that stand one behind the other, lowest bit first, in 32-bit
    words along the last axis: uint8 ``[..., count]``."""
    data = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return data[..., :count]
    if bits in (2, 4):
        values = np.empty((*data.shape, 8 // bits), np.uint8)
        for i in range(8 // bits):
            np.right_shift(data, bits * i, out=values[..., i])
        values &= (1 << bits) - 1
        return values.reshape(*data.shape[:-1], data.shape[-1] * 8 // bits)[..., :count]
    # Other widths run over the edges of the words, by 8 values in `bits` bytes.
    stream = np.unpackbits(data, axis=-1, bitorder="little")
    whole = stream.shape[-1] // bits
    values = np.packbits(
        stream[..., : whole * bits].reshape(*data.shape[:-1], whole, bits), axis=-1,
        bitorder="little",
    )  # fmt: skip
    return values[..., 0][..., :count]


def narrowed(scales: np.ndarray) -> np.ndarray:
    """Scales as float16 where that holds each of them exactly, else as they are (float32)."""
    with np.errstate(over="ignore"):
        half = scales.astype(np.float16)
    return half if (half.astype(np.float32) == scales).all() else scales.astype(np.float32)


def integer_weight(
    codes: np.ndarray, bits: int, scales: np.ndarray, zeros: np.ndarray | None, group_size: int
) -> LinearWeight:
    """``w = scale * (code - zero)`` of codes ``0 .. 2^bits - 1`` in the packed format that holds
    them: int4 up to 4 bits, int8 for 8.

    Args:
        zeros: Integers ``[out, groups]``; None: ``2^(bits - 1)``, the middle.
    """
    if zeros is None and bits < 4:
        zeros = np.full(scales.shape, 1 << (bits - 1))
    points = None if zeros is None else zeros.astype(np.int16)
    if bits == 8:
        codes = (codes ^ 0x80).view(np.int8)
        points = None if points is None else points - np.int16(128)
    return LinearWeight(
        "int8" if bits == 8 else "int4",
        np.ascontiguousarray(codes),
        scales,
        None,
        group_size,
        zero_points=points,
    )


def order_of_groups(name: str, groups: np.ndarray, group_size: int) -> np.ndarray | None:
    """The inputs group by group, from the group of each; None where they lie so already."""
    groups = groups.astype(np.int64)
    if (groups < 0).all():
        return None  # never filled in
    order = np.argsort(groups, kind="stable").astype(np.int32)
    expected = np.arange(len(groups)) // group_size
    if not np.array_equal(groups[order], expected):
        raise ModelError(
            f"{name}: g_idx does not part {len(groups)} inputs into groups of {group_size}"
        )
    return None if np.array_equal(groups, expected) else order
