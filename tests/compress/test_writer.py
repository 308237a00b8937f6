"""Directories: what is in them, and that a run may be cut off anywhere."""

import errno
import json
import os

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pyllmlite.compress import shard
from pyllmlite.compress.hf_view import HFView
from pyllmlite.compress.layer_result import LayerResult
from pyllmlite.compress.quantize import Watcher, quantize_model
from pyllmlite.compress.settings import Settings
from pyllmlite.compress.writer import DirectoryWriter
from pyllmlite.core.errors import ConfigError, ModelError, PluginError
from pyllmlite.model.source import open_model
from pyllmlite.model.weights import load_matrix, plan_matrices
from pyllmlite_plugins.quantizer.none import Unquantized


class StopAfter(Watcher):
    """Cuts a run off when a layer is written."""

    def __init__(self, index):
        self.index = index

    def layer(self, index, seconds, resumed):
        if index == self.index:
            raise KeyboardInterrupt


def quantize(model, out, method="rtn", watcher=None, force=False, restart=False, **settings):
    return quantize_model(
        str(model), out, Settings(method, **settings), force=force, restart=restart,
        eval_windows=0, watcher=watcher,
    )  # fmt: skip


def contents(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}


def edited(model, path, change):
    """A copy of a model with its tensors changed."""
    path.mkdir()
    for file in model.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def test_a_directory(model, tmp_path):
    result = quantize(model, tmp_path / "out", group_size=32)
    out = result.path
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md", "config.json", "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors",
        "model.safetensors.index.json", "quantize.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    before, after = open_model(model), open_model(out)
    assert after.spec == before.spec
    assert after.tokenizer().encode("Hello") == before.tokenizer().encode("Hello")
    np.testing.assert_array_equal(after.get("embed"), before.get("embed"))
    weight = before.get("layers.1.down.weight")
    step = after.raw("layers.1.down.weight").codes().scales.astype(np.float32)
    assert (np.abs(after.get("layers.1.down.weight") - weight) <= 0.51 * step.repeat(32, 1)).all()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = [load_file(out / file) for file in sorted(set(index["weight_map"].values()))]
    total = sum(tensor.nbytes for tensors in stored for tensor in tensors.values())
    assert index["metadata"]["total_size"] == total
    assert result.facts["bits_per_weight"] == pytest.approx(4 + 20 / 32, abs=1e-4)


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_reach_the_kernel_as_they_were_written(model, tmp_path, layout, symmetric):
    out = quantize(model, tmp_path / "out", group_size=32, symmetric=symmetric, layout=layout).path
    source = open_model(out)
    from pyllmlite.hooks.quantizer import QuantizerNeeds

    keep = Unquantized(QuantizerNeeds("cpu", "bf16", ()))
    plan = next(p for p in plan_matrices(source.spec) if p.shape.name == "layers.1.mlp_down")
    packed = load_matrix(source, plan, keep).packed
    assert packed.format == "int4"
    codes = source.raw("layers.1.down.weight").codes()
    np.testing.assert_array_equal(packed.unpack(), codes.float32())


def test_codes_that_are_rounded_again_are_said(model, tmp_path, caplog):
    first = quantize(model, tmp_path / "first", bits=8).path
    assert not caplog.messages
    quantize(first, tmp_path / "floats", method="bf16")  # a cast rounds to no codes
    assert not caplog.messages
    quantize(first, tmp_path / "second", group_size=32)
    assert len(caplog.messages) == 1
    assert "quantized already (pack-quantized-int8) and are rounded once more" in caplog.text


@pytest.mark.parametrize("stop", [0, 1])
def test_goes_on_where_it_was_cut_off(model, tmp_path, stop):
    whole = quantize(model, tmp_path / "whole", group_size=32)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", group_size=32, watcher=StopAfter(stop))
    assert not (tmp_path / "out").exists()
    shards = sorted((tmp_path / "out.partial").glob("*.safetensors"))
    assert len(shards) == stop + 1
    times = [p.stat().st_mtime_ns for p in shards]
    seen = []

    class Watch(Watcher):
        def layer(self, index, seconds, resumed):
            seen.append((index, resumed))

    result = quantize(model, tmp_path / "out", group_size=32, watcher=Watch())
    assert seen == [(i, i <= stop) for i in range(2)]
    assert [(result.path / p.name).stat().st_mtime_ns for p in shards] == times
    one, two = contents(whole.path), contents(result.path)
    for name in ("README.md", "quantize.json"):  # these have the directory's name
        one.pop(name), two.pop(name)
    assert one == two


def test_a_shard_that_was_cut_off_is_made_again(model, tmp_path):
    whole = quantize(model, tmp_path / "whole", group_size=32)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", group_size=32, watcher=StopAfter(1))
    damaged = tmp_path / "out.partial" / "model-00001-of-00003.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    result = quantize(model, tmp_path / "out", group_size=32)
    assert contents(result.path)[damaged.name] == contents(whole.path)[damaged.name]


def test_other_settings_do_not_go_on(model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", group_size=32, watcher=StopAfter(0))
    before = contents(tmp_path / "out.partial")
    with pytest.raises(ConfigError, match=r"group_size: 32, now 64.*--restart"):
        quantize(model, tmp_path / "out", group_size=64)
    assert contents(tmp_path / "out.partial") == before
    result = quantize(model, tmp_path / "out", group_size=64, restart=True)
    assert result.facts["settings"]["group_size"] == 64


def test_two_runs_do_not_write_at_once(model, tmp_path):
    view = HFView(open_model(model))
    with DirectoryWriter(tmp_path / "out", view, None, "f32", {}):
        with pytest.raises(ModelError, match="another run"):
            DirectoryWriter(tmp_path / "out", view, None, "f32", {})
    assert list(tmp_path.iterdir()) == []  # nothing was written, nothing is left


def test_an_output_stays_until_the_new_one_is_whole(model, tmp_path):
    out = tmp_path / "out"
    quantize(model, out, group_size=32)
    old = contents(out)
    with pytest.raises(ConfigError, match="--force"):
        quantize(model, out, bits=8)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, out, bits=8, force=True, watcher=StopAfter(1))
    assert contents(out) == old
    quantize(model, out, bits=8, force=True)
    assert contents(out) != old
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "empty").mkdir()
    quantize(model, tmp_path / "empty", bits=8)


def test_never_over_the_model_itself(model, tmp_path):
    copy = edited(model, tmp_path / "copy", lambda tensors: None)
    before = contents(copy)
    with pytest.raises(ConfigError, match="holds the model"):
        quantize(copy, copy, force=True)
    with pytest.raises(ConfigError, match="holds the model"):
        quantize(copy, tmp_path, force=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="no directory"):
        quantize(copy, tmp_path / "file", force=True)
    assert contents(copy) == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "text.txt").write_text("x")
    with pytest.raises(ConfigError, match="text.txt, which is read"):
        text = str(tmp_path / "out" / "text.txt")
        quantize(copy, tmp_path / "out", force=True, calibration=text)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_full_disk(model, tmp_path, monkeypatch, after):
    """One line, no output; the same command goes on when there is room."""
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > after + 1:  # the first writes the state
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(shard.os, "fsync", full)
    with pytest.raises(ModelError, match="disk is full while writing") as caught:
        quantize(model, tmp_path / "out", group_size=32)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    done = quantize(model, tmp_path / "out", group_size=32)
    assert open_model(done.path).quantized


def test_too_little_room_is_said_early(model, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: os.terminal_size((0, 0)) and _Free(1000))
    with pytest.raises(ModelError, match=r"kB are still to be written and 1\.0 kB are free"):
        quantize(model, tmp_path / "out", group_size=32)
    assert not (tmp_path / "out").exists()


class _Free:
    def __init__(self, free):
        self.free = free


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_weights_that_are_no_numbers(model, tmp_path, name, value):
    def spoil(tensors):
        tensors[name].reshape(-1)[3] = value

    bad = edited(model, tmp_path / "bad", spoil)
    with pytest.raises(ModelError, match="damaged") as caught:
        quantize(bad, tmp_path / "out", group_size=32)
    assert name.removesuffix(".weight") in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_cut_off_checkpoint(model, tmp_path):
    bad = edited(model, tmp_path / "bad", lambda tensors: None)
    data = (bad / "model.safetensors").read_bytes()
    (bad / "model.safetensors").write_bytes(data[:-1000])
    with pytest.raises(ModelError, match="damaged"):
        quantize(bad, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize(
    "settings,error,words",
    [
        ({"group_size": 4096}, ConfigError, "fits no layer"),
        ({"group_size": 12}, PluginError, "multiple of 8"),
        ({"bits": 3}, PluginError, "4 or 8"),
        ({"method": "nf4"}, ModelError, "no layout holds"),
        ({"method": "no-such"}, PluginError, "no-such"),
        ({"layout": "awq"}, ConfigError, "known are"),
        ({"layout": "int-quantized", "bits": 4}, ConfigError, "holds 8"),
        ({"int8_activations": True, "layout": "gptq"}, ConfigError, "int-quantized"),
        ({"dtype": "f8"}, ConfigError, "dtype"),
        ({"method": "bf16", "bits": 4}, ConfigError, "cast"),
        ({"plan": {"layers.0.qvk": 8}}, ConfigError, "did you mean 'layers.0.qkv'"),
        ({"extra": {"shceme": 1}}, ConfigError, "shceme"),
    ],
)
def test_settings_that_cannot_work(model, tmp_path, settings, error, words):
    with pytest.raises(error, match=words) as caught:
        quantize(model, tmp_path / "out", **settings)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_of_bits(model, tmp_path):
    plan = {"layers.0.qkv": 8, "layers.1.mlp_down": 8}
    result = quantize(model, tmp_path / "out", plan=plan, symmetric=True, group_size=32)
    source = open_model(result.path)
    wide = {"layers.0.q", "layers.0.k", "layers.0.v", "layers.1.down"}
    for name in source.names():
        raw = source.raw(name)
        if raw.is_codes:
            short = name.removesuffix(".weight")
            assert raw.codes().format == ("int8" if short in wide else "int4"), name


@pytest.mark.parametrize("method,dtype", [("bf16", "bf16"), ("f16", "f16"), ("f32", "f32")])
def test_casts(model, tmp_path, method, dtype):
    out = quantize(model, tmp_path / "out", method).path
    before, after = open_model(model), open_model(out)
    assert after.stored_dtype == dtype and not after.quantized
    relative = {"bf16": 2**-8, "f16": 2**-11, "f32": 0}[dtype]
    for name in before.names():
        np.testing.assert_allclose(after.get(name), before.get(name), rtol=relative, atol=1e-7)
    config = json.loads((out / "config.json").read_text())
    words = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
    assert config["torch_dtype"] == words[dtype]


def test_casts_round_to_even(tmp_path):
    import torch

    from pyllmlite.compress.casts import rounded

    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    values[:4] = [1 + 2**-8, 1 + 3 * 2**-8, -0.0, 1e-40]
    want = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    np.testing.assert_array_equal(rounded("w", values, "bf16").view(np.int16), want)
    with pytest.raises(ModelError, match="too large for f16"):
        rounded("w", np.array([1e5], np.float32), "f16")
    with pytest.raises(ModelError, match="too large for bf16"):
        rounded("w", np.array([3.4e38], np.float32), "bf16")


def test_what_a_method_rewrote(model, tmp_path):
    """Norms that took over scales are written, and read back as float32 when a run goes on."""
    view = HFView(open_model(model))
    norm = np.linspace(0.5, 1.5, 64).astype(np.float32)
    name = "model.layers.0.input_layernorm.weight"
    with DirectoryWriter(tmp_path / "out", view, None, "bf16", {"a": 1}) as writer:
        writer.add(LayerResult(0, {}, {name: norm, "model.norm.weight": norm}, {"x": 0.5}))
    with DirectoryWriter(tmp_path / "out", view, None, "bf16", {"a": 1}) as writer:
        back = writer.done(0)
        np.testing.assert_array_equal(back.changed[name], norm)
        assert back.loss == {"x": 0.5} and writer.done(1) is None
        writer.add(LayerResult(1, {}))
        writer.finish()
        writer.publish()
    after = open_model(tmp_path / "out")
    for canonical in ("layers.0.attn_norm.weight", "final_norm.weight"):
        np.testing.assert_allclose(after.get(canonical), norm, rtol=2**-8)
    np.testing.assert_array_equal(after.get("layers.1.attn_norm.weight"), np.ones(64))


def test_results_that_do_not_fit(model, tmp_path):
    from pyllmlite.core.weights import LinearWeight

    view = HFView(open_model(model))
    small = LinearWeight("int4", np.zeros((4, 8), np.uint8), np.ones((4, 1), np.float16))
    with DirectoryWriter(tmp_path / "out", view, None, "f32", {}) as writer:
        with pytest.raises(ModelError, match="no matrix"):
            writer.add(LayerResult(0, {"model.layers.1.mlp.up_proj": small}))
        with pytest.raises(ModelError, match="was quantized to"):
            writer.add(LayerResult(0, {"model.layers.0.mlp.up_proj": small}))
        with pytest.raises(ModelError, match="no tensor"):
            writer.add(LayerResult(0, {}, {"model.layers.0.nothing": np.ones(3)}))
        with pytest.raises(ModelError, match="never quantized"):
            writer.finish()


def test_what_is_not_used_is_said(model, tmp_path, caplog):
    settings = {"num_sequences": 4, "calibration": "text.txt", "group_size": 32}
    quantize(model, tmp_path / "out", **settings)
    assert "rtn looks at the weights alone: num_sequences, calibration is not used" in caplog.text


def test_fewer_bits_than_are_stored_is_said(model, tmp_path, caplog):
    settings = {"method": "gptq", "bits": 3, "num_sequences": 1, "seq_len": 8, "group_size": 32}
    made = quantize(model, tmp_path / "out", **settings)
    assert "3 bits are stored in 4" in caplog.text
    assert made.facts["bits_per_weight"] > 4


def test_a_card_says_numbers_as_they_are():
    from pyllmlite.compress.card import model_card, provenance

    settings = {"method": "gptq", "group_size": 0, "symmetric": False, "extra": {"damping": 0}}
    card = model_card("m", provenance("base", None, settings, None, 4.2, {}, None))
    assert "| group size | a row |" in card and "| symmetric | no |" in card
    assert "| damping | 0 |" in card
