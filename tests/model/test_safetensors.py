"""The safetensors reader against the library's writer, and against damaged files."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from pyllmlite.core.errors import ModelError
from pyllmlite.model.safetensors import INDEX, SafetensorsCheckpoint

numpy_writer = pytest.importorskip("safetensors.numpy")


def test_every_type_and_shape(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "f32": rng.standard_normal((5, 7)).astype(np.float32),
        "f16": rng.standard_normal((5, 7)).astype(np.float16),
        "f64": rng.standard_normal((2, 3, 4)),
        "i8": rng.integers(-128, 128, (9,), dtype=np.int8),
        "u8": rng.integers(0, 256, (3, 3), dtype=np.uint8),
        "i32": rng.integers(-1000, 1000, (4, 2), dtype=np.int32),
        "i64": rng.integers(-1000, 1000, (1,), dtype=np.int64),
        "bool": np.array([[True, False]]),
        "scalar": np.array(3.5, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "hollow": np.zeros((4, 0), np.float32),
    }
    numpy_writer.save_file(tensors, tmp_path / "model.safetensors", {"format": "np"})
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert set(checkpoint.names()) == set(tensors)
    for name, value in tensors.items():
        tensor = checkpoint.tensor(name)
        assert tensor.shape == value.shape
        found = tensor.float32()
        assert found.dtype == np.float32 and found.flags.writeable
        np.testing.assert_array_equal(found, value.astype(np.float32))
        if value.ndim:
            np.testing.assert_array_equal(
                tensor.float32(slice(1, 3)), value[1:3].astype(np.float32)
            )
    assert checkpoint.total_bytes == sum(v.nbytes for v in tensors.values())
    assert "f32" in checkpoint and "absent" not in checkpoint
    with pytest.raises(KeyError):
        checkpoint.tensor("absent")


def test_bf16_is_exact(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    bits = torch.arange(0, 1 << 16, dtype=torch.int32).to(torch.int16).reshape(256, 256)
    values = bits.view(torch.bfloat16)
    save_file({"x": values}, tmp_path / "model.safetensors")
    found = SafetensorsCheckpoint(tmp_path).tensor("x").float32()
    expected = values.float().numpy()
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def _write(path, header, data: bytes = b"", length: int | None = None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def _entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HUGE = 1 << 60


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"t": _entry()}, 7, "lies at 0..8, the data has 7 bytes"),
        ({"t": _entry()}, 9, "cover 8 of 9 bytes"),
        ({"t": _entry(shape=(3,))}, 8, "has 8 bytes, its shape needs 12"),
        ({"t": _entry(shape=(HUGE, HUGE))}, 8, "its shape needs"),
        ({"t": _entry(shape=(-2,))}, 8, "no valid shape"),
        ({"t": _entry(shape=(2.0,))}, 8, "no valid shape"),
        ({"t": _entry(shape=(True,))}, 8, "no valid shape"),
        ({"t": _entry(shape=[1] * 9)}, 8, "no valid shape"),
        ({"t": _entry(dtype="F8")}, 8, "dtype 'F8'; readable are F32"),
        ({"t": _entry(dtype=None)}, 8, "dtype 'None'"),
        ({"t": _entry(offsets=(8, 0))}, 8, "lies at 8..0"),
        ({"t": _entry(offsets=(0, HUGE))}, 8, "lies at"),
        ({"t": _entry(offsets=(0,))}, 8, "no valid data_offsets"),
        ({"t": _entry(offsets=("0", "8"))}, 8, "no valid data_offsets"),
        ({"t": 3}, 8, "is no object"),
        ([], 0, "the header is no object"),
        ({"a": _entry(), "b": _entry(offsets=(4, 12))}, 12, "overlaps"),
        ({"a": _entry(), "b": _entry(offsets=(12, 20))}, 20, "a hole before 'b'"),
        (b'{"a": 1, "a": 2}', 0, "stands twice"),
        (b"{", 0, "not valid JSON"),
        (b"\xff\xfe", 0, "not valid JSON"),
        (b"[" * 100_000, 0, "not valid JSON"),
        (b'{"t": ' + b"9" * 5000 + b"}", 0, "not valid JSON|is no object"),
    ],
)
def test_damaged_headers(header, data, message, tmp_path):
    path = _write(tmp_path / "model.safetensors", header, bytes(data))
    with pytest.raises(ModelError, match=message) as error:
        SafetensorsCheckpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 100, 1])
def test_absurd_header_lengths(length, tmp_path):
    with pytest.raises(ModelError):
        SafetensorsCheckpoint(_write(tmp_path / "m.safetensors", b"{}", b"", length))
    (tmp_path / "short.safetensors").write_bytes(b"1234567")
    with pytest.raises(ModelError, match="too few"):
        SafetensorsCheckpoint(tmp_path / "short.safetensors")


def test_shards(tmp_path):
    a, b = np.arange(4, dtype=np.float32), np.ones((2, 2), np.float32)
    numpy_writer.save_file({"a": a}, tmp_path / "1.safetensors")
    numpy_writer.save_file({"b": b}, tmp_path / "2.safetensors")
    assert set(SafetensorsCheckpoint(tmp_path).names()) == {"a", "b"}  # without an index

    def index(weight_map):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return SafetensorsCheckpoint(tmp_path)

    both = index({"a": "1.safetensors", "b": "2.safetensors"})
    np.testing.assert_array_equal(both.tensor("b").float32(), b)
    for weight_map, message in (
        ({"a": "1.safetensors", "c": "2.safetensors"}, "lacks 'c'"),
        ({"a": "3.safetensors"}, r"shard 3\.safetensors is missing"),
        ({"a": "../1.safetensors"}, "names no file of its directory"),
        ({"a": "/etc/passwd"}, "names no file of its directory"),
        ({"a": 1}, "names no file of its directory"),
        ({"a": ""}, "names no file of its directory"),
        ({"a": "1.safetensors", "b": ["1.safetensors"]}, "names no file of its directory"),
        ({}, "has no weight_map"),
        (None, "has no weight_map"),
    ):
        with pytest.raises(ModelError, match=message):
            index(weight_map)
    (tmp_path / INDEX).unlink()
    numpy_writer.save_file({"a": a}, tmp_path / "2.safetensors")
    with pytest.raises(ModelError, match="'a' stands in two shards"):
        SafetensorsCheckpoint(tmp_path)


def test_no_file(tmp_path):
    with pytest.raises(ModelError, match=r"no \.safetensors file"):
        SafetensorsCheckpoint(tmp_path)
    with pytest.raises(ModelError, match="cannot be read"):
        SafetensorsCheckpoint(tmp_path / "absent.safetensors")
