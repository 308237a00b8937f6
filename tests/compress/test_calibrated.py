"""How methods that calibrate plug in: with a stand-in for the layer walk, and as a whole."""

import json
import types

import numpy as np
import pytest

from pyllmlite.compress import calibrated
from pyllmlite.compress.calibrated import CalibratedMethod
from pyllmlite.compress.hf_view import HFView
from pyllmlite.compress.layer_result import LayerResult
from pyllmlite.compress.quantize import Watcher, quantize_model
from pyllmlite.compress.settings import Settings
from pyllmlite.core.errors import ConfigError
from pyllmlite.model.source import open_model

NORM = "input_layernorm.weight"


@pytest.fixture
def walk(monkeypatch):
    """Records what it is given; names layers as transformers' other prefix would."""
    seen = types.SimpleNamespace(tokens=[], done=[], settings=[], texts=0)

    def quantize_layers(source, settings, tokens, done):
        seen.tokens.append(tokens)
        seen.settings.append(settings)
        for i in range(2):
            seen.done.append(done(i))
            yield LayerResult(i, {}, {f"layers.{i}.{NORM}": np.full(64, i + 2.0, np.float32)})

    def calibration_tokens(source, text, sequences, length, seed, progress):
        seen.texts += 1
        return np.random.default_rng().integers(0, 200, (sequences, length)).astype(np.int32)

    def plan_bits(source, settings, tokens, budget, progress):
        return types.SimpleNamespace(plan={"layers.0.qkv": int(budget) + 2}, group_size=32)

    stand_ins = (quantize_layers, calibration_tokens, plan_bits)
    for function in stand_ins:
        monkeypatch.setattr(calibrated, function.__name__, function)
    monkeypatch.setattr(calibrated, "DEFAULT_SEQUENCES", 3)
    monkeypatch.setattr(calibrated, "DEFAULT_LENGTH", 900)
    return seen


def test_names_tokens_and_plan(walk, model, tmp_path):
    view = HFView(open_model(model))
    method = CalibratedMethod(view, Settings("gptq", bits_budget=6.0, seed=3))
    assert (method.num_sequences, method.seq_len) == (3, 512)  # the model has 512 positions
    known = LayerResult(1, {}, {f"model.layers.1.{NORM}": np.ones(64, np.float32)})
    results = list(method.layers([None, known].__getitem__, lambda text: None, tmp_path))
    assert [list(r.changed) for r in results] == [[f"model.layers.{i}.{NORM}"] for i in range(2)]
    assert walk.done[0] is None and list(walk.done[1].changed) == [f"model.layers.1.{NORM}"]
    assert walk.settings[0].plan == {"layers.0.qkv": 8} and walk.settings[0].quantizer == "gptq"
    assert walk.settings[0].group_size == 32
    assert method.planned == {"plan": {"layers.0.qkv": 8}, "group_size": 32}
    # A run that goes on has the very same tokens and plan, and makes neither again.
    list(method.layers(lambda index: None, lambda text: None, tmp_path))
    assert walk.texts == 1 and walk.tokens[0].shape == (3, 512)
    np.testing.assert_array_equal(walk.tokens[0], walk.tokens[1])
    assert walk.settings[1] == walk.settings[0]
    assert method.facts()["text"] == "self" and method.facts()["sha256"] is None


def test_a_file_of_text_is_known_by_its_content(walk, model, tmp_path):
    (tmp_path / "text.txt").write_text("some words")
    view = HFView(open_model(model))
    one = CalibratedMethod(view, Settings("gptq", calibration=str(tmp_path / "text.txt")))
    (tmp_path / "text.txt").write_text("other words")
    two = CalibratedMethod(view, Settings("gptq", calibration=str(tmp_path / "text.txt")))
    assert one.text_sha256 != two.text_sha256


class CutOff(Watcher):
    """Ends the run once a layer is written."""

    def layer(self, index, seconds, resumed):
        if not resumed:
            raise KeyboardInterrupt


def contents(directory):
    return {f.name: f.read_bytes() for f in directory.iterdir() if f.suffix == ".safetensors"}


@pytest.mark.parametrize("method", ["gptq", "awq", "awq-gptq"])
def test_from_the_model_to_a_directory(method, model, tmp_path):
    """The model writes its own text; a run that was cut off ends in the same bytes."""
    pytest.importorskip("torch")
    settings = Settings(method, group_size=32, num_sequences=2, seq_len=24)
    whole = quantize_model(model, tmp_path / "whole", settings, eval_windows=1, eval_length=16)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            quantize_model(
                model, tmp_path / "cut", settings, eval_windows=0, watcher=CutOff(),
            )  # fmt: skip
    quantize_model(model, tmp_path / "cut", settings, eval_windows=0)
    assert contents(tmp_path / "whole") == contents(tmp_path / "cut")
    facts = json.loads((tmp_path / "whole" / "quantize.json").read_text())
    assert facts["calibration"] == {
        "text": "self", "sha256": None, "num_sequences": 2, "seq_len": 24, "seed": 0,
    }  # fmt: skip
    assert facts == whole.facts and 0 < facts["measured"]["kl"] < 1
    assert method in (tmp_path / "whole" / "README.md").read_text()


def test_an_option_that_nobody_reads(model, tmp_path):
    settings = Settings("gptq", extra={"dampning": 0.1}, num_sequences=1, seq_len=8)
    with pytest.raises(ConfigError, match="dampning.*did you mean 'damping'"):
        quantize_model(model, tmp_path / "out", settings, eval_windows=0)
    assert not list(tmp_path.iterdir())


def test_a_budget_for_a_method_that_needs_no_text(model, tmp_path):
    """rtn's floats' minima, which no layout holds, are asked for as integer zero points."""
    settings = Settings("rtn", bits_budget=6.0, group_size=16, num_sequences=2, seq_len=32)
    made = quantize_model(str(model), tmp_path / "out", settings, eval_windows=0)
    assert 4.3 < made.facts["bits_per_weight"] <= 6.1
    schemes = json.loads((made.path / "config.json").read_text())["quantization_config"]
    found = {group["weights"]["num_bits"] for group in schemes["config_groups"].values()}
    assert found == {4, 8}


@pytest.mark.parametrize(
    "settings,reason",
    [
        ({"bits": 4}, "leave out bits"),
        ({"plan": {"layers.0.qkv": 8}}, "leave out plan"),
        ({"layout": "int-quantized"}, "int-quantized holds 8 bits, a bits budget mixes them"),
    ],
)
def test_a_budget_stands_alone(model, tmp_path, settings, reason):
    with pytest.raises(ConfigError, match=reason):
        quantize_model(str(model), tmp_path / "out", Settings("gptq", bits_budget=6.0, **settings))
    assert not list(tmp_path.glob("out*"))
