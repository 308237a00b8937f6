"""Reader of safetensors files, one or many shards.

Format (github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header
``{name: {dtype, shape, data_offsets: [begin, end]}, "__metadata__": {...}}``, then the data that
the offsets are relative to.  Nothing in a header is trusted: every field is checked against the
file before a byte of data is touched.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from pyllmlite.core.errors import ModelError
from pyllmlite.model.checkpoint import Checkpoint, MappedFile, RawTensor
from pyllmlite.model.dequantize import PLAIN

# A header of 100,000 tensors has about 15 MB; the format allows 100 MB, which as JSON objects
# would take more than a gigabyte.
MAX_HEADER = 32 << 20
MAX_DIMENSIONS = 8
_DTYPES = {
    "F32": "f32",
    "F16": "f16",
    "BF16": "bf16",
    "F64": "f64",
    "I8": "i8",
    "U8": "u8",
    "I16": "i16",
    "U16": "u16",
    "I32": "i32",
    "U32": "u32",
    "I64": "i64",
    "U64": "u64",
    "BOOL": "bool",
}
INDEX = "model.safetensors.index.json"


def parse_json(data: bytes, what: str) -> Any:
    """JSON with a clear error, whatever the bytes are; duplicate keys are refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key stands twice")
        return result

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{what}: not valid JSON ({str(error)[:120]})") from None


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def read_shard(path: Path) -> dict[str, RawTensor]:
    """The tensors of one file, checked."""

    def bad(reason: str) -> ModelError:
        return ModelError(f"{path}: damaged safetensors file: {reason}")

    file = MappedFile(path)
    size = len(file.data)
    if size < 8:
        raise bad(f"{size} bytes are too few for a header")
    length = int(np.frombuffer(file.data[:8].tobytes(), dtype="<u8")[0])
    if length > size - 8:
        raise bad(f"the header claims {length} bytes, the file has {size}")
    if length > MAX_HEADER:
        raise bad(f"the header claims {length} bytes, at most {MAX_HEADER} are read")
    header = parse_json(file.data[8 : 8 + length].tobytes(), str(path))
    if not isinstance(header, dict):
        raise bad("the header is no object")
    header.pop("__metadata__", None)

    base = 8 + length
    tensors: dict[str, RawTensor] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if not isinstance(entry, dict):
            raise bad(f"entry of {name[:80]!r} is no object")
        dtype = entry.get("dtype")
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise bad(f"{name[:80]!r} has dtype {str(dtype)[:20]!r}; readable are {known}")
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        if (
            not isinstance(shape, list)
            or len(shape) > MAX_DIMENSIONS
            or not all(map(_is_size, shape))
        ):
            raise bad(f"{name[:80]!r} has no valid shape")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
            raise bad(f"{name[:80]!r} has no valid data_offsets")
        begin, end = offsets
        count = 1
        for dimension in shape:
            count *= dimension
        wanted = count * PLAIN[_DTYPES[dtype]].itemsize
        if end > size - base or begin > end:
            raise bad(f"{name[:80]!r} lies at {begin}..{end}, the data has {size - base} bytes")
        if end - begin != wanted:
            raise bad(f"{name[:80]!r} has {end - begin} bytes, its shape needs {wanted}")
        tensors[name] = RawTensor(
            name, tuple(shape), _DTYPES[dtype], file, base + begin, base + end
        )
        spans.append((begin, end, name))
    last = 0
    for begin, end, name in sorted(spans):
        if begin < last:
            raise bad(f"{name[:80]!r} overlaps another tensor")
        if begin > last:
            raise bad(f"a hole before {name[:80]!r}")
        last = end
    if last != size - base:
        raise bad(f"the tensors cover {last} of {size - base} bytes")
    return tensors


class SafetensorsCheckpoint(Checkpoint):
    """A ``.safetensors`` file, or a directory with one or with an index of shards."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._all: dict[str, RawTensor] = {}
        if self.path.is_dir() and (self.path / INDEX).is_file():
            self._read_index(self.path / INDEX)
            return
        for shard in self._find():
            self._add(read_shard(shard), shard)

    def _find(self) -> list[Path]:
        if not self.path.is_dir():
            return [self.path]
        if (self.path / "model.safetensors").is_file():
            return [self.path / "model.safetensors"]
        shards = sorted(self.path.glob("*.safetensors"))
        if not shards:
            raise ModelError(f"{self.path}: no .safetensors file in it")
        return shards

    def _read_index(self, index: Path) -> None:
        if index.stat().st_size > MAX_HEADER:
            raise ModelError(f"{index}: larger than {MAX_HEADER} bytes")
        parsed = parse_json(index.read_bytes(), str(index))
        weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index}: has no weight_map")
        for shard in weight_map.values():
            # A name with a path in it could reach out of the directory.
            if not isinstance(shard, str) or not shard or Path(shard).name != shard:
                raise ModelError(f"{index}: names no file of its directory: {str(shard)[:80]!r}")
        for shard in dict.fromkeys(weight_map.values()):
            if not (self.path / shard).is_file():
                raise ModelError(f"{self.path}: shard {shard} is missing; download it again")
            self._add(read_shard(self.path / shard), self.path / shard)
        for name, shard in weight_map.items():
            if name not in self._all:
                raise ModelError(f"{self.path / shard}: lacks {name[:80]!r}, which the index names")

    def _add(self, tensors: dict[str, RawTensor], shard: Path) -> None:
        twice = next((name for name in tensors if name in self._all), None)
        if twice is not None:
            raise ModelError(f"{shard}: {twice[:80]!r} stands in two shards")
        self._all.update(tensors)

    def names(self) -> list[str]:
        return list(self._all)

    def tensor(self, name: str) -> RawTensor:
        return self._all[name]

    @property
    def _tensors(self) -> dict[str, RawTensor]:
        return self._all
