"""Safetensors files, written as a stream: a header, then each tensor's bytes, some rows at a time.

A file gets its name only when it is complete and on the disk, so that under the name there is
never half a file.  Format: github.com/huggingface/safetensors.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from pyllmlite.core.errors import ModelError

WORDS = {
    "f32": "F32", "f16": "F16", "bf16": "BF16", "f64": "F64", "i8": "I8", "u8": "U8", "i16": "I16",
    "i32": "I32", "i64": "I64", "bool": "BOOL", "u16": "U16", "u32": "U32", "u64": "U64",
}  # fmt: skip
ITEM_BYTES = {
    "f32": 4, "f16": 2, "bf16": 2, "f64": 8, "i8": 1, "u8": 1, "i16": 2, "i32": 4, "i64": 8,
    "bool": 1, "u16": 2, "u32": 4, "u64": 8,
}  # fmt: skip
HEADER_MULTIPLE = 8


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Attributes:
        name, shape, dtype: As the file's header says it (``f32``, ``bf16``, ``i32``, ...).
        pieces: Makes its bytes, in order, as arrays of any type; called once, when it is its turn.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * ITEM_BYTES[self.dtype]


def entry(name: str, values: np.ndarray, dtype: str | None = None) -> Entry:
    """An array that is in memory; ``dtype`` says what uint16 bits mean (``bf16``)."""
    words = {
        "float32": "f32", "float16": "f16", "int8": "i8", "uint8": "u8", "int32": "i32",
        "int64": "i64",
    }  # fmt: skip
    word = dtype or words[str(values.dtype)]
    return Entry(name, values.shape, word, lambda: (np.ascontiguousarray(values),))


@contextmanager
def disk_errors(path: Path, doing: str) -> Iterator[None]:
    """What the disk refuses, as one line."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(
                f"{path}: the disk is full while {doing}; make room and run the same command "
                "again: it goes on from the last complete layer"
            ) from None
        raise ModelError(f"{path}: {error.strerror or error} while {doing}") from None


def write_shard(path: Path, entries: list[Entry]) -> int:
    """Write a file; returns its bytes.  ``ModelError``: the disk is full, or refuses."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for one in entries:
        header[one.name] = {
            "dtype": WORDS[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [at, at + one.nbytes],
        }
        at += one.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_MULTIPLE)
    partial = path.with_name(path.name + ".part")
    with disk_errors(path, f"writing {path.name}"):
        with open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for one in entries:
                _write_entry(file, one)
            sync(file)
        os.replace(partial, path)
    return 8 + len(text) + at


def _write_entry(file: IO[bytes], one: Entry) -> None:
    written = 0
    for piece in one.pieces():
        data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
        file.write(data.data)
        written += data.nbytes
    if written != one.nbytes:
        raise ModelError(f"{one.name}: {written} bytes were made for a shape of {one.nbytes}")


def write_text(path: Path, text: str) -> None:
    """A small file, complete or not there."""
    partial = path.with_name(path.name + ".part")
    with disk_errors(path, f"writing {path.name}"):
        with open(partial, "wb") as file:
            file.write(text.encode())
            sync(file)
        os.replace(partial, path)


def sync(file: IO[bytes]) -> None:
    """What was written is on the disk when this returns."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Names that were made in a directory are on the disk, where the system can say so."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
