"""Quantization-aware training end to end on tiny models: what is written is what was trained."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_models import TINY, reference

from pyllmlite.compress.hf_view import HFView
from pyllmlite.compress.layouts import layout_named
from pyllmlite.compress.learn.fake_quant import FakeQuantLinear
from pyllmlite.compress.learn.fake_quant_model import FakeQuantModel, rescaled, same_basis
from pyllmlite.compress.learn.qat import QatSettings, qat_model, train
from pyllmlite.compress.learn.token_windows import mean_losses
from pyllmlite.compress.quantize import quantize_model
from pyllmlite.compress.settings import Settings
from pyllmlite.compress.writer import DirectoryWriter
from pyllmlite.core.errors import ConfigError, ModelError, PluginError
from pyllmlite.model.source import open_model

QUICK = {
    "num_sequences": 8, "seq_len": 24, "steps": 4, "batch_size": 2, "group_size": 32,
    "save_every": 0,
}  # fmt: skip


def engine_logits(path, tokens):
    """Through the engine with float inputs and KV."""
    from pyllmlite.compress.compare import read_chunk
    from pyllmlite.core.config import EngineConfig
    from pyllmlite.model.build import build

    config = EngineConfig.from_kwargs(
        skip_tokenizer_init=True, dtype="f32", kv_cache_dtype="f32", max_num_seqs=1,
        max_model_len=64, max_num_batched_tokens=64, enable_prefix_caching=False, threads=1,
    )  # fmt: skip
    built = build(open_model(str(path)), config)
    built.cache.acquire(1, 0, tokens)
    built.batch.token_table[0, : len(tokens)] = tokens
    built.batch.set_sampling(0, temperature=0.0)
    return read_chunk(built, tokens, 0)


def start_of(model, directory, method="rtn", **settings):
    made = {"bits": 4, "group_size": 32, "calibration": "self", "num_sequences": 4, "seq_len": 16}
    asked = Settings(method, **{**made, **settings})
    return quantize_model(str(model), directory, asked, eval_windows=0).path


@pytest.mark.parametrize(
    ("start", "bits", "symmetric", "layout"),
    [("rtn", 4, False, None), ("gptq", 3, True, None), ("awq-gptq", 4, False, "gptq"),
     ("rtn", 8, True, "int-quantized")],
)  # fmt: skip
def test_from_a_model_to_a_directory(model, tmp_path, start, bits, symmetric, layout, monkeypatch):
    monkeypatch.setattr(
        "pyllmlite.compress.calibrated.DEFAULT_SEQUENCES", 4
    )
    monkeypatch.setattr("pyllmlite.compress.calibrated.DEFAULT_LENGTH", 16)
    settings = QatSettings(
        bits=bits, symmetric=symmetric, start=start, layout=layout,
        **{**QUICK, "group_size": 0 if bits == 8 else 32},
    )  # fmt: skip
    result = qat_model(str(model), tmp_path / "out", settings, eval_windows=1, eval_length=32,
                       progress=False)  # fmt: skip
    facts = json.loads((result.path / "quantize.json").read_text())
    assert facts["settings"]["method"] == "qat" and facts["training"]["steps"] == 4
    assert facts["training"]["learned"]["latent"] == 2 * (4 * 64 * 64 - 2 * 32 * 64 + 3 * 64 * 128)
    assert facts["settings"]["symmetric"] == symmetric
    assert facts["settings"]["group_size"] == (0 if bits == 8 else 32)
    assert facts["measured"]["kl"] >= 0 and (result.path / "training.jsonl").is_file()
    stored = open_model(str(result.path))
    assert stored.quantized and not (tmp_path / "out.partial").exists()
    if bits == 3:
        view = HFView(stored)
        codes = view.tensor(view.modules(0)[0].name + ".weight").base.codes().values
        assert codes.max() <= 7 and facts["bits_per_weight"] > 4


@pytest.mark.parametrize("family", ["llama-bias", "qwen3", "gemma2", "phi3", "llama-mha"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_engine_gives_the_training_graphs_logits(tmp_path, family, bits):
    """Codes, scales and norms that moved far, written, read back by the engine."""
    path = TINY[family](tmp_path / "float")
    start = start_of(
        path, tmp_path / "start", bits=bits, group_size=24, symmetric=bits == 4 or None,
        layout="gptq",
    )  # fmt: skip
    view = HFView(open_model(str(path)))
    student = FakeQuantModel(view, HFView(open_model(str(start))), None, "f32")
    learning = student.learn()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, size in (("latent", 1.0), ("ratio", 0.1), ("norms", 0.1)):
            for parameter in learning[name]:
                parameter += size * torch.randn(parameter.shape, generator=generator)
    tokens = list(range(5, 45))
    with torch.no_grad():
        graph = student.module(torch.tensor([tokens])).logits[0].numpy()
    writer_of = DirectoryWriter(
        tmp_path / "out", view, layout_named("gptq_v2"), "f32", {"bits": bits}
    )
    with writer_of as writer:
        for result in student.results():
            writer.add(result)
        writer.finish()
        writer.publish()
    engine = engine_logits(tmp_path / "out", tokens)
    assert np.abs(engine - graph).max() < 2e-4 * np.abs(graph).max()


def test_it_learns_what_holds_for_other_tokens(model, tmp_path):
    start = start_of(model, tmp_path / "start", "gptq", bits=3)
    tokens = np.random.default_rng(0).integers(3, 250, (264, 32)).astype(np.int32)
    quick = {**QUICK, "steps": 60, "batch_size": 16, "learning_rate": 2e-3}
    settings = QatSettings(bits=3, **quick)
    view, teacher = HFView(open_model(str(model))), _module(model)
    student, facts = train(
        view, HFView(open_model(str(start))), settings, "f32", tokens[8:], tmp_path / "train",
        progress=False,
    )  # fmt: skip
    before = mean_losses(_module(start), teacher, tokens[:8])["kl"]
    after = mean_losses(student.module, teacher, tokens[:8])["kl"]
    assert facts["tokens"] == 60 * 16 * 32 and after < 0.7 * before
    assert facts["first_loss"] == pytest.approx(before, rel=0.2)  # it began as the start


def _module(path):
    from pyllmlite.compress.layered_model import LayeredModel

    return LayeredModel(open_model(str(path))).fill()


def test_float16_norms_are_trained_as_they_are_stored(tmp_path):
    path = TINY["qwen3"](tmp_path / "float")
    start = start_of(path, tmp_path / "start", dtype="bf16", group_size=24, layout="gptq")
    view = HFView(open_model(str(path)))
    student = FakeQuantModel(view, HFView(open_model(str(start))), None, "bf16")
    norms = student.learn()["norms"]
    with torch.no_grad():
        for norm in norms:
            norm += 0.01 * torch.arange(len(norm))
    layer = student.layers[0]
    stored = layer.input_layernorm.weight
    assert torch.equal(stored, norms[0].bfloat16().float()) or any(
        torch.equal(stored, n.bfloat16().float()) for n in norms
    )
    stored.sum().backward()
    assert sum(n.grad is not None and bool((n.grad == 1).all()) for n in norms) == 1
    result = next(iter(student.results()))
    name = view.layer_prefix(0) + "input_layernorm.weight"
    assert np.array_equal(result.changed[name], stored.detach().numpy())
    assert any(name.endswith("q_norm.weight") for name in result.changed)


def test_conv1d_is_trained_too(tmp_path):
    """GPT-2 keeps its matrices turned; the first forward pass is the quantized model's."""
    path = TINY["gpt2"](tmp_path / "float")
    start = start_of(path, tmp_path / "start", layout="gptq", group_size=0)
    view = HFView(open_model(str(path)))
    student = FakeQuantModel(view, HFView(open_model(str(start))), None, "f32")
    assert sum(isinstance(m, FakeQuantLinear) for m in student.module.modules()) == 4 * 3
    tokens = torch.tensor([list(range(5, 30))])
    with torch.no_grad():
        graph = student.module(tokens).logits[0].numpy()
    assert np.allclose(graph, engine_logits(start, tokens[0].tolist()), atol=1e-3)


def test_a_scaled_start_is_no_lean(model, tmp_path):
    view = HFView(open_model(str(model)))
    start = HFView(open_model(str(start_of(model, tmp_path / "start"))))
    module = view.modules(0)[0]
    codes = start.tensor(module.name + ".weight").base.codes()
    weight = view.weight(module)
    assert same_basis(codes, weight) and not same_basis(codes, 4 * weight)


@pytest.mark.parametrize("bits", [3, 4])
def test_scaled_matrices_have_no_loss(model, tmp_path, bits):
    """Columns scaled and the inverse in the norm, as AWQ does it: the codes differ from the float
    matrix by more than they lost."""
    view = HFView(open_model(str(model)))
    shutil.copytree(model, tmp_path / "scaled")
    path = tmp_path / "scaled" / "model.safetensors"
    state = load_file(path)
    scales = np.geomspace(0.5, 2, 64, dtype=np.float32)
    for part in ("q", "k", "v"):
        state[f"model.layers.0.self_attn.{part}_proj.weight"] *= scales
    state["model.layers.0.input_layernorm.weight"] /= scales
    save_file(state, path, metadata={"format": "pt"})
    start = start_of(tmp_path / "scaled", tmp_path / "start", "gptq", bits=bits)
    start = HFView(open_model(str(start)))
    first, second = (r.loss for r in FakeQuantModel(view, start, bits, "f32").results())
    names = {f"self_attn.{part}_proj" for part in "qkv"}
    assert len(second) == 7 and first.keys() == second.keys() - names
    assert all(value < 0.2 for loss in (first, second) for value in loss.values())
    module = view.modules(1)[0]
    codes, weight = start.tensor(module.name + ".weight").base.codes(), view.weight(module)
    assert not rescaled(codes, weight) and rescaled(codes, scales[:, None] * weight)


def test_the_float_models_own_logits_are_the_teachers(tmp_path):
    """The teacher of the objective is the model that transformers loads."""
    path = TINY["llama"](tmp_path / "float")
    tokens = torch.tensor([list(range(5, 30))])
    with torch.no_grad():
        ours, theirs = _module(path)(tokens).logits, reference(path)(tokens).logits
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"bits": 5}, ConfigError, "bits must be one of 2, 3, 4, 8"),
        ({"start": "bf16"}, ConfigError, "'bf16' is a cast"),
        ({"start": "nowhere"}, PluginError, "nowhere"),
        ({"bits": 3, "start": "rtn"}, PluginError, "makes 4 or 8 bits, not 3"),
        ({"seq_len": 100000}, ConfigError, "beyond the model's 512 positions"),
        ({"seq_len": 1}, ConfigError, "2 tokens at least"),
        ({"weight_rate": -1.0}, ConfigError, "weight_rate must not be negative"),
        ({"group_size": 4096, "start": "rtn"}, ConfigError, "fits no layer"),
        ({"task_weight": 2.0, "start": "rtn"}, ConfigError, "task_weight"),
        ({"text": "missing.txt", "start": "rtn"}, ConfigError, "no such file"),
    ],
)
def test_what_cannot_be_is_refused(model, tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        settings = QatSettings(**{**QUICK, **changes})
        qat_model(str(model), tmp_path / "out", settings, eval_windows=0, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_start_of_another_model_is_refused(model, tmp_path):
    other = TINY["llama"](tmp_path / "other")
    start = start_of(model, tmp_path / "start")
    with pytest.raises(ConfigError, match="is of another model"):
        qat_model(str(other), tmp_path / "out", QatSettings(start=str(start), **QUICK),
                  eval_windows=0, progress=False)  # fmt: skip
    with pytest.raises(ConfigError, match="is not in codes"):
        FakeQuantModel(HFView(open_model(str(model))), HFView(open_model(str(model))), 4, "f32")


def test_never_over_its_own_start(model, tmp_path):
    start = start_of(model, tmp_path / "start")
    with pytest.raises(ConfigError, match="start holds .*start, which is read"):
        qat_model(str(model), start, QatSettings(start=str(start), **QUICK), force=True,
                  eval_windows=0, progress=False)  # fmt: skip
    assert open_model(str(start)).quantized


def test_several_processes_are_refused(model, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="qat trains in one process"):
        qat_model(str(model), tmp_path / "out", QatSettings(**QUICK))


def test_a_loss_that_is_no_number_ends_the_run(model, tmp_path):
    settings = QatSettings(
        start="rtn", learning_rate=1e30, **{**QUICK, "steps": 8, "save_every": 1}
    )
    with pytest.raises((ArithmeticError, ModelError)) as raised:
        qat_model(str(model), tmp_path / "out", settings, eval_windows=0, progress=False)
    assert "\n" not in str(raised.value) and "learning" in str(raised.value)
    assert (tmp_path / "out.partial" / ".pyllmlite" / "train" / "checkpoint.pt").is_file()
    assert not (tmp_path / "out").exists()
