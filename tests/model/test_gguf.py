"""GGUF: block types against the gguf package, architectures against the safetensors reader."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
from gguf_models import write_gguf
from tiny_models import TINY, reference

from pyllmlite.core.errors import ModelError
from pyllmlite.model import dequantize
from pyllmlite.model.gguf import GGUFCheckpoint
from pyllmlite.model.rope import rope_tables
from pyllmlite.model.source import open_checkpoint

gguf = pytest.importorskip("gguf")
pytest.importorskip("torch")

TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"]
WRITABLE = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def _random_blocks(kind: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """Random codes under random finite scales."""
    elements, size = dequantize.BLOCKS[kind.lower()]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, size=(rows * columns // elements, size), dtype=np.uint8)
    halves = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    for offset in halves.get(kind, (0,)):
        scale = (rng.standard_normal(len(blocks)) * 0.1).astype("<f2")
        blocks[:, offset : offset + 2] = scale.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


@pytest.mark.parametrize("kind", TYPES)
def test_blocks_as_the_gguf_package_dequantizes_them(kind):
    data = _random_blocks(kind, rows=37, columns=768, seed=len(kind))
    out = np.empty((37, 768), np.float32)
    dequantize.block_rows_to_float32(kind.lower(), data, out)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(out, expected)
    assert dequantize.BLOCKS[kind.lower()] == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]


@pytest.mark.parametrize("kind", TYPES)
def test_infinite_and_nan_scales_stay_silent(kind):
    data = np.full((2, dequantize.BLOCKS[kind.lower()][1]), 0xFF, np.uint8)
    out = np.empty((2, dequantize.BLOCKS[kind.lower()][0]), np.float32)
    dequantize.block_rows_to_float32(kind.lower(), data, out)
    assert not np.isfinite(out).any()


@pytest.mark.parametrize("kind", [*WRITABLE, "Q4_K", "Q5_K", "Q6_K"])
def test_a_file_of_every_type(kind, tmp_path):
    """Written by the gguf package, read whole, by row slices and by bytes."""
    which = gguf.GGMLQuantizationType[kind]
    rng = np.random.default_rng(1)
    values = rng.standard_normal((50, 512)).astype(np.float32)
    if kind in WRITABLE:
        data = gguf.quants.quantize(values, which)
    else:
        data = _random_blocks(kind, 50, 512, seed=3)
    writer = gguf.GGUFWriter(str(tmp_path / "x.gguf"), "llama")
    writer.add_tensor("matrix", data, raw_dtype=which)
    writer.add_tensor("vector", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = GGUFCheckpoint(tmp_path / "x.gguf")
    assert checkpoint.names() == ["matrix", "vector"]
    tensor = checkpoint.tensor("matrix")
    assert tensor.shape == (50, 512) and tensor.dtype == kind.lower()
    expected = gguf.quants.dequantize(data, which)
    np.testing.assert_array_equal(tensor.float32(), expected)
    np.testing.assert_array_equal(tensor.float32(slice(7, 33)), expected[7:33])
    np.testing.assert_array_equal(tensor.float32(np.array([49, 0])), expected[[49, 0]])
    assert tensor.float32(slice(9, 9)).shape == (0, 512)
    np.testing.assert_array_equal(tensor.raw(), data.view(np.uint8).reshape(50, -1))
    np.testing.assert_array_equal(checkpoint.tensor("vector").float32(), values[0])
    np.testing.assert_array_equal(checkpoint.tensor("vector").float32(slice(3, 5)), values[0][3:5])
    assert checkpoint.total_bytes == data.nbytes + 2048
    assert not tensor.raw().flags.writeable


# Not here: Qwen2's windows and dynamic scaling, which GGUF cannot say.
GGUF_MODELS = ["llama", "llama-mha", "llama-mqa", "llama-linear", "llama-yarn", "llama3", "qwen2",
               "qwen3", "mistral", "gemma2", "gemma3", "phi3", "phi3-partial", "phi3-longrope",
               "gpt2", "bloom", "mpt"]  # fmt: skip


@pytest.mark.parametrize("name", GGUF_MODELS)
def test_architectures_equal_the_safetensors_reader(name, tmp_path):
    path = TINY[name](tmp_path)
    extra = {}
    if name == "gemma2":
        extra = {"attention__scale": 24**-0.5}
    if name == "gemma3":
        extra = {"attention__scale": 20**-0.5, "attention__sliding_window_pattern": 2}
    if name == "mistral":  # which GGUF calls llama: the window tells
        extra = {"attention__sliding_window": 24}
    file = write_gguf(reference(path), tmp_path / "model.gguf", **extra)
    expected, found = open_checkpoint(path), open_checkpoint(file)
    assert set(found.names()) == set(expected.names())
    for tensor in expected.names():
        ours, theirs = found.get(tensor), expected.get(tensor)
        np.testing.assert_array_equal(ours, theirs, err_msg=tensor)
        part = slice(1, len(theirs) // 2)
        np.testing.assert_array_equal(found.raw(tensor).float32(part), theirs[part])
    for field in dataclasses.fields(expected.spec):
        ours, theirs = getattr(found.spec, field.name), getattr(expected.spec, field.name)
        if field.name == "layers":
            assert [x.window for x in ours] == [x.window for x in theirs]
            for a, b in zip(ours, theirs, strict=True):
                assert (a.rope is None) == (b.rope is None)
                if a.rope is not None:
                    tables = rope_tables(a.rope, 300), rope_tables(b.rope, 300)
                    np.testing.assert_allclose(tables[0], tables[1], atol=5e-5)
        elif field.name == "norm":
            assert ours.kind == theirs.kind and ours.eps == pytest.approx(theirs.eps, rel=1e-6)
        elif isinstance(theirs, float):
            assert ours == pytest.approx(theirs, rel=1e-6)
        elif field.name == "max_position_embeddings" and name == "bloom":
            pass  # BLOOM's config has none
        else:
            assert ours == theirs, field.name
    assert not [n for n in found.unused if not n.startswith("rope_")]


def test_quantized_file_keeps_its_blocks(tmp_path):
    """Rows of q and k stand permuted in a llama GGUF: blocks go along rows, so they move whole."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=300, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    kind = gguf.GGMLQuantizationType.Q4_1
    file = write_gguf(model, tmp_path / "q.gguf", kinds=lambda *_: kind, vocabulary=True)
    source = open_checkpoint(file)
    assert source.stored_dtype == "q4_1"
    assert source.weight_bytes == source.checkpoint.total_bytes
    for name in ("q", "k", "v", "down"):
        tensor = source.raw(f"layers.0.{name}.weight")
        assert tensor.dtype == "q4_1"
        whole = tensor.float32()
        np.testing.assert_array_equal(tensor.codes().float32(), whole)
        module = {"down": model.model.layers[0].mlp.down_proj}.get(
            name, getattr(model.model.layers[0].self_attn, f"{name}_proj", None)
        )
        original = module.weight.detach().numpy()
        error = np.abs(whole - original).max()
        assert error < 0.12 * np.abs(original).max()
    tokenizer = source.tokenizer()
    assert tokenizer.decode(tokenizer.encode("the thing")) == "the thing"
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}]) == "x"


def test_llama3_scaling_of_a_gguf(tmp_path):
    path = TINY["llama3"](tmp_path)
    file = write_gguf(reference(path), tmp_path / "model.gguf")
    spec = open_checkpoint(file).spec
    assert spec.layers[0].rope.scaling["attention_factor"] == 1.0


# What is no GGUF, or a damaged one


def _file(tmp_path, content: bytes):
    (tmp_path / "x.gguf").write_bytes(content)
    return tmp_path / "x.gguf"


def _header(tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys)


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _tensor(name="t", shape=(32,), kind=0, offset=0) -> bytes:
    return (
        _string(name)
        + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        + struct.pack("<IQ", kind, offset)
    )


HUGE = (1 << 64) - 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"GG", "not a GGUF file"),
        (b"GGML" + bytes(60), "not a GGUF file"),
        (b"GGUF", "ends in the header"),
        (_header(version=1), "GGUF version 1; 2 and 3 are read"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (_header(tensors=HUGE), "claims .* tensors"),
        (_header(keys=HUGE), "claims .* metadata entries"),
        (_header(keys=1) + struct.pack("<Q", HUGE) + bytes(50), "ends in the header"),
        (_header(keys=1) + _string("k") + struct.pack("<I", 99) + bytes(50), "unknown type 99"),
        (_header(keys=1) + _string("k") + struct.pack("<IIQ", 9, 4, HUGE), "array elements"),
        (_header(keys=1) + _string("k") + struct.pack("<IIQ", 9, 8, 3) + bytes(8), "strings"),
        (
            _header(keys=1) + _string("k") + struct.pack("<IIQ", 9, 8, 2) + bytes(8)
            + struct.pack("<Q", 1 << 40),
            "a string claims",
        ),
        (
            _header(keys=1) + _string("k")
            + b"".join(struct.pack("<IQ", 9, 1) if i else struct.pack("<I", 9) for i in range(9)),
            "deep arrays|unknown type|arrays|ends in",
        ),
        (
            _header(keys=2) + 2 * (_string("k") + struct.pack("<II", 4, 1)) + bytes(30),
            "stands twice",
        ),
        (_header(tensors=1) + _tensor(shape=(1, 1, 1, 1, 1)) + bytes(64), "5 dimensions"),
        (_header(tensors=1) + _tensor(kind=16) + bytes(64), "of type IQ2_XXS, which is not read"),
        (_header(tensors=1) + _tensor(kind=77) + bytes(64), "of type number 77"),
        (_header(tensors=1) + _tensor(shape=(33,), kind=2) + bytes(64), "do not fit q4_0 blocks"),
        (_header(tensors=1) + _tensor(shape=(HUGE, HUGE)) + bytes(64), "does not lie in"),
        (_header(tensors=1) + _tensor(shape=(0,)) + bytes(64), "does not lie in"),
        (_header(tensors=1) + _tensor(offset=HUGE - 31) + bytes(64), "does not lie in"),
        (_header(tensors=1) + _tensor(offset=1) + bytes(640), "does not lie in"),
        (_header(tensors=1) + _tensor(), "cut off"),
        (_header(tensors=2) + 2 * _tensor() + bytes(640), "'t' stands twice"),
        (_header(tensors=2) + _tensor("a") + _tensor("b", offset=96) + bytes(640), "overlaps"),
        (
            _header(keys=1) + _string("general.alignment") + struct.pack("<II", 4, 3) + bytes(64),
            "general.alignment is 3",
        ),
    ],
)  # fmt: skip
def test_damaged_files(content, message, tmp_path):
    with pytest.raises(ModelError, match=message) as error:
        GGUFCheckpoint(_file(tmp_path, content))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_file_without_an_architecture(tmp_path):
    with pytest.raises(ModelError, match=r"general\.architecture"):
        open_checkpoint(_file(tmp_path, _header(tensors=1) + _tensor() + bytes(640)))
    with pytest.raises(ModelError, match="cannot be read"):
        GGUFCheckpoint(tmp_path / "absent.gguf")


def test_one_gguf_of_a_directory(tmp_path):
    path = TINY["llama"](tmp_path / "hf")
    file = write_gguf(reference(path), tmp_path / "a.gguf")
    assert open_checkpoint(tmp_path).path == file
    (tmp_path / "b.gguf").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"several GGUF files.*a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)
