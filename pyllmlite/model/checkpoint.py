"""What every checkpoint reader offers: named tensors, memory-mapped, float32 on demand."""

from __future__ import annotations

import contextlib
import mmap
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

from pyllmlite.core.errors import ModelError
from pyllmlite.core.weights import LinearWeight
from pyllmlite.model import blocks
from pyllmlite.model.dequantize import BLOCKS, PLAIN, block_rows_to_float32

# Rows are converted in pieces of about this many elements, so that the temporaries of the
# dequantization stay in the processor's cache and small beside the result.
_CHUNK = 1 << 19


class MappedFile:
    """A file mapped read-only.  Pages that were read can be given back with :meth:`release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: cannot be read ({error})") from None
        self.data = np.frombuffer(self._map, dtype=np.uint8)

    def release(self, start: int, stop: int) -> None:
        """Drop the pages wholly inside ``[start, stop)`` from this process; they can be read again.

        Without it a model that is read once, layer by layer, stays resident to the end.
        """
        page = mmap.PAGESIZE
        start = -(-start // page) * page
        stop = stop // page * page
        if stop > start and hasattr(self._map, "madvise"):
            with contextlib.suppress(OSError):
                self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)


class RawTensor:
    """A tensor as it is stored.

    Attributes:
        name: Its name in the checkpoint.
        shape: Outermost dimension first (``[out, in]`` for a matrix).
        dtype: f32, f16, bf16, f64, i8, u8, i16, i32, i64, bool, or a GGUF block type in lower
            case (q4_0, q4_1, q5_0, q5_1, q8_0, q4_k, q5_k, q6_k).
        nbytes: Stored bytes.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], dtype: str, file: MappedFile, start: int, stop: int
    ) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype
        self.nbytes = stop - start
        self._file = file
        self._start = start
        self._stop = stop

    @property
    def rows(self) -> int:
        """Length of the first dimension (1 for a scalar)."""
        return self.shape[0] if self.shape else 1

    def raw(self) -> np.ndarray:
        """The stored bytes, uint8, memory-mapped and read-only: ``[rows, bytes per row]`` for two
        and more dimensions, ``[bytes]`` otherwise."""
        data = self._file.data[self._start : self._stop]
        return data if len(self.shape) < 2 else data.reshape(self.rows, self._row_bytes)

    def plain(self) -> np.ndarray:
        """The stored numbers in their own type, flat, memory-mapped (bf16 as its bits); not for
        block types."""
        return self._file.data[self._start : self._stop].view(PLAIN[self.dtype])

    def codes(
        self, rows: slice | np.ndarray | None = None, exact: bool = False
    ) -> LinearWeight | None:
        """Rows of a block type that a packed format holds (``exact``: to the last bit), as codes;
        None for others."""
        if len(self.shape) != 2 or not blocks.fits(self.dtype, self.shape[1], exact):
            return None
        data = self.raw()
        return blocks.blocks_to_codes(self.dtype, data if rows is None else data[rows])

    @property
    def _row_bytes(self) -> int:
        return self.nbytes // self.rows if self.rows else 0

    def float32(self, rows: slice | np.ndarray | None = None) -> np.ndarray:
        """A float32 copy of the whole tensor, or of some rows of it (a slice or indices)."""
        if len(self.shape) < 2:
            flat = self._convert(self.raw().reshape(1, -1), self.rows).reshape(self.shape)
            return flat if rows is None else np.ascontiguousarray(flat[rows])
        columns = int(np.prod(self.shape[1:]))
        data = self.raw()
        if rows is not None:
            data = data[rows]  # a view for a slice, a copy of packed bytes for indices
        out = self._convert(data, columns)
        self._release(rows)
        return out.reshape(out.shape[0], *self.shape[1:])

    def transposed_float32(self, rows: slice | np.ndarray | None = None) -> np.ndarray:
        """A float32 copy of a matrix's transpose, or of some of its rows (columns as stored); not
        for block types, whose blocks go along the stored rows."""
        stored = self.raw().view(PLAIN[self.dtype])
        part = np.ascontiguousarray((stored if rows is None else stored[:, rows]).T)
        out = self._convert(part.view(np.uint8), part.shape[1])
        self._file.release(self._start, self._stop)
        return out

    def release(self) -> None:
        """Give the mapped pages back (they are read again when needed)."""
        self._file.release(self._start, self._stop)

    def _release(self, rows: slice | np.ndarray | None) -> None:
        start, stop = self._start, self._stop
        if isinstance(rows, slice):
            first, last, step = rows.indices(self.rows)
            if step == 1 and self.rows:
                stop = start + max(first, last) * self._row_bytes
                start += first * self._row_bytes
        self._file.release(start, stop)

    def _convert(self, data: np.ndarray, columns: int) -> np.ndarray:
        """uint8 ``[n, bytes]`` to float32 ``[n, columns]``."""
        n = data.shape[0]
        out = np.empty((n, columns), dtype=np.float32)
        step = max(1, _CHUNK // max(columns, 1))
        for first in range(0, n, step):
            piece = data[first : first + step]
            self._convert_rows(piece, out[first : first + piece.shape[0]])
        return out

    def _convert_rows(self, data: np.ndarray, out: np.ndarray) -> None:
        if self.dtype in BLOCKS:
            block_rows_to_float32(self.dtype, data, out)
            return
        data = np.ascontiguousarray(data)
        if self.dtype == "bf16":
            # bf16 is the upper half of a float32.
            np.left_shift(
                data.view(np.uint16), np.uint32(16), out=out.view(np.uint32), dtype=np.uint32
            )
        else:
            out[...] = data.view(PLAIN[self.dtype])

    def __repr__(self) -> str:
        return f"RawTensor({self.name!r}, {list(self.shape)}, {self.dtype})"


class Checkpoint(ABC):
    """Named tensors.  Everything about them is checked when the checkpoint is opened."""

    path: Path

    @abstractmethod
    def names(self) -> list[str]:
        """All names, in stored order."""

    @abstractmethod
    def tensor(self, name: str) -> RawTensor:
        """One tensor; ``KeyError`` for an unknown name."""

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    @property
    @abstractmethod
    def _tensors(self) -> dict[str, RawTensor]: ...

    @property
    def total_bytes(self) -> int:
        """Stored bytes of all tensors."""
        return sum(t.nbytes for t in self._tensors.values())
