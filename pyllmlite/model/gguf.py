"""Reader of GGUF files (versions 2 and 3, little-endian).

Format: github.com/ggml-org/ggml, docs/gguf.md.  The header is parsed here, with every count,
length, offset and type held against the file's size before it is used: a damaged file costs a
clear error and no memory.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from pyllmlite.core.errors import ModelError
from pyllmlite.model.checkpoint import Checkpoint, MappedFile, RawTensor
from pyllmlite.model.dequantize import BLOCKS, PLAIN

MAGIC = b"GGUF"
# ggml_type numbers (ggml.h) of the types that are read, and names of the others for the message.
_TYPES = {
    0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0",
    12: "q4_k", 13: "q5_k", 14: "q6_k", 24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64",
    30: "bf16",
}  # fmt: skip
_UNREAD = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0",
    35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_MAX_DEPTH = 3
_MAX_DIMENSIONS = 4


class _Cursor:
    """Reads forward through the header; never past the end of the file."""

    def __init__(self, path: Path, data: memoryview) -> None:
        self.path = path
        self.data = data
        self.at = 0

    def bad(self, reason: str) -> ModelError:
        return ModelError(f"{self.path}: damaged GGUF file: {reason}")

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def take(self, size: int) -> memoryview:
        if size > self.left:
            raise self.bad(f"it ends in the header ({size} bytes wanted, {self.left} left)")
        piece = self.data[self.at : self.at + size]
        self.at += size
        return piece

    def scalar(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def count(self, smallest: int, what: str) -> int:
        """A 64-bit count of things that take at least ``smallest`` bytes each."""
        count = self.scalar("<Q")
        if count * smallest > self.left:
            raise self.bad(f"it claims {count} {what}, too many for its size")
        return count

    def string(self) -> str:
        size = self.scalar("<Q")
        # Vocabularies hold tokens that are no valid UTF-8 on their own.
        return bytes(self.take(size)).decode("utf-8", errors="replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY or depth > _MAX_DEPTH:
            raise self.bad(f"metadata of unknown type {kind}" if kind != _ARRAY else "deep arrays")
        element = self.scalar("<I")
        if element in _SCALARS:
            dtype = np.dtype(_SCALARS[element])
            count = self.count(dtype.itemsize, "array elements")
            return np.frombuffer(self.take(count * dtype.itemsize), dtype=dtype).copy()
        if element == _STRING:
            return self._strings(self.count(8, "strings"))
        count = self.count(12, "arrays")
        return [self.value(element, depth + 1) for _ in range(count)]

    def _strings(self, count: int) -> list[str]:
        # The one long loop of a load (a vocabulary and its merges), so it is written out.
        data, at, end = self.data, self.at, len(self.data)
        unpack = struct.Struct("<Q").unpack_from
        strings = []
        for _ in range(count):
            if at + 8 > end:
                raise self.bad("it ends in an array of strings")
            size = unpack(data, at)[0]
            at += 8
            if size > end - at:
                raise self.bad(f"a string claims {size} bytes, {end - at} are left")
            strings.append(str(data[at : at + size], "utf-8", "replace"))
            at += size
        self.at = at
        return strings


class GGUFCheckpoint(Checkpoint):
    """A GGUF file: ``metadata`` (arrays of numbers as numpy arrays) and tensors."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        file = MappedFile(self.path)
        cursor = _Cursor(self.path, file.data.data)
        if bytes(cursor.data[:4]) != MAGIC:
            raise ModelError(f"{self.path}: not a GGUF file (it does not begin with 'GGUF')")
        cursor.at = 4
        version = cursor.scalar("<I")
        if version not in (2, 3):
            swapped = struct.unpack(">I", struct.pack("<I", version))[0]
            hint = "; it is big-endian" if swapped in (2, 3) else ""
            raise ModelError(f"{self.path}: GGUF version {version}; 2 and 3 are read{hint}")
        num_tensors = cursor.count(24, "tensors")
        num_keys = cursor.count(13, "metadata entries")
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = cursor.string()
            if key in self.metadata:
                raise cursor.bad(f"metadata {key[:80]!r} stands twice")
            self.metadata[key] = cursor.value(cursor.scalar("<I"))
        infos = [self._tensor_info(cursor) for _ in range(num_tensors)]
        self._all = self._place(cursor, file, infos)
        # The header is parsed into objects; its pages are not needed any more.
        file.release(0, cursor.at)

    @staticmethod
    def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], str, int]:
        name = cursor.string()
        dimensions = cursor.scalar("<I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise cursor.bad(f"{name[:80]!r} has {dimensions} dimensions")
        shape = tuple(cursor.scalar("<Q") for _ in range(dimensions))
        kind = cursor.scalar("<I")
        if kind not in _TYPES:
            word = _UNREAD.get(kind, f"number {kind}")
            known = ", ".join(t.upper() for t in _TYPES.values() if t[0] in "fqb")
            raise ModelError(
                f"{cursor.path}: {name[:80]!r} is of type {word}, which is not read; "
                f"use a file of {known}"
            )
        # GGUF names the innermost dimension first.
        return name, shape[::-1], _TYPES[kind], cursor.scalar("<Q")

    def _place(
        self, cursor: _Cursor, file: MappedFile, infos: list[tuple[str, tuple[int, ...], str, int]]
    ) -> dict[str, RawTensor]:
        alignment = self.metadata.get("general.alignment", 32)
        if (
            not isinstance(alignment, int)
            or not 1 <= alignment <= 1 << 20
            or alignment & (alignment - 1)
        ):
            raise cursor.bad(f"general.alignment is {str(alignment)[:40]}")
        base = -(-cursor.at // alignment) * alignment
        size = len(file.data) - base
        tensors: dict[str, RawTensor] = {}
        spans: list[tuple[int, int, str]] = []
        for name, shape, dtype, offset in infos:
            if name in tensors:
                raise cursor.bad(f"tensor {name[:80]!r} stands twice")
            elements, block_bytes = BLOCKS.get(dtype) or (1, PLAIN[dtype].itemsize)
            if shape[-1] % elements:
                raise cursor.bad(f"{name[:80]!r}: rows of {shape[-1]} do not fit {dtype} blocks")
            count = 1
            for dimension in shape:
                count *= dimension
            nbytes = count // elements * block_bytes
            if count == 0 or offset % alignment or offset > size or nbytes > size - offset:
                raise cursor.bad(
                    f"{name[:80]!r} {list(shape)} {dtype} at {offset} does not lie in the file's "
                    f"{max(size, 0)} bytes of data (was the download cut off?)"
                )
            tensors[name] = RawTensor(
                name, shape, dtype, file, base + offset, base + offset + nbytes
            )
            spans.append((offset, offset + nbytes, name))
        spans.sort()
        for (_, end, _), (begin, _, name) in zip(spans[:-1], spans[1:], strict=True):
            if begin < end:
                raise cursor.bad(f"{name[:80]!r} overlaps another tensor")
        return tensors

    def names(self) -> list[str]:
        return list(self._all)

    def tensor(self, name: str) -> RawTensor:
        return self._all[name]

    @property
    def _tensors(self) -> dict[str, RawTensor]:
        return self._all
