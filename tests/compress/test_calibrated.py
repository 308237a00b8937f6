"""How methods that calibrate plug in, with a layer walk that stands in for the real one."""

import sys
import types
from dataclasses import dataclass, field

import numpy as np
import pytest

from pyllmlite.compress import calibrated
from pyllmlite.compress.calibrated import CalibratedMethod
from pyllmlite.compress.hf_view import HFView
from pyllmlite.compress.layer_result import LayerResult
from pyllmlite.compress.settings import Settings
from pyllmlite.core.errors import ConfigError
from pyllmlite.model.source import open_model

NORM = "input_layernorm.weight"


@dataclass(frozen=True)
class MethodSettings:
    quantizer: str
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    plan: dict = field(default_factory=dict)
    extra: dict = field(default_factory=dict)


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
        return types.SimpleNamespace(plan={"layers.0.qkv": int(budget) + 2})

    modules = {
        "layerwise": {"quantize_layers": quantize_layers, "MethodSettings": MethodSettings},
        "calibration": {
            "calibration_tokens": calibration_tokens, "DEFAULT_SEQUENCES": 3, "DEFAULT_LENGTH": 900,
        },
        "bits": {"plan_bits": plan_bits},
    }  # fmt: skip
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, f"pyllmlite.compress.{name}", module)
    return seen


def test_names_tokens_and_plan(walk, model, tmp_path):
    view = HFView(open_model(model))
    method = CalibratedMethod(view, Settings("gptq", bits=4, bits_budget=6.0, seed=3))
    assert (method.num_sequences, method.seq_len) == (3, 512)  # the model has 512 positions
    known = LayerResult(1, {}, {f"model.layers.1.{NORM}": np.ones(64, np.float32)})
    results = list(method.layers([None, known].__getitem__, lambda text: None, tmp_path))
    assert [list(r.changed) for r in results] == [[f"model.layers.{i}.{NORM}"] for i in range(2)]
    assert walk.done[0] is None and list(walk.done[1].changed) == [f"model.layers.1.{NORM}"]
    assert walk.settings[0].plan == {"layers.0.qkv": 8} and walk.settings[0].quantizer == "gptq"
    # A run that goes on has the very same tokens and plan, and makes neither again.
    list(method.layers(lambda index: None, lambda text: None, tmp_path))
    assert walk.texts == 1 and walk.tokens[0].shape == (3, 512)
    np.testing.assert_array_equal(walk.tokens[0], walk.tokens[1])
    assert walk.settings[1] == walk.settings[0]
    assert method.facts()["text"] == "self" and method.facts()["sha256"] is None


def test_a_part_that_is_missing(monkeypatch, model):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(calibrated, "import_module", missing)
    with pytest.raises(ConfigError, match="needs calibration"):
        CalibratedMethod(HFView(open_model(model)), Settings("gptq"))


def test_a_file_of_text_is_known_by_its_content(walk, model, tmp_path):
    (tmp_path / "text.txt").write_text("some words")
    view = HFView(open_model(model))
    one = CalibratedMethod(view, Settings("gptq", calibration=str(tmp_path / "text.txt")))
    (tmp_path / "text.txt").write_text("other words")
    two = CalibratedMethod(view, Settings("gptq", calibration=str(tmp_path / "text.txt")))
    assert one.text_sha256 != two.text_sha256
