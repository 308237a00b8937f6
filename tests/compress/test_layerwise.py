"""Layer by layer: what each layer sees, folding, resuming."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tiny_models import TINY, reference  # noqa: E402

from pyllmlite import hookimpl  # noqa: E402
from pyllmlite.compress.layered_model import LayeredModel  # noqa: E402
from pyllmlite.compress.layerwise import (  # noqa: E402
    MethodSettings,
    get_weight,
    install,
    quantize_layers,
    rows_of,
    set_weight,
)
from pyllmlite.core.errors import ConfigError, ModelError  # noqa: E402
from pyllmlite.core.weights import LinearShape, LinearWeight  # noqa: E402
from pyllmlite.hooks.quantizer import (  # noqa: E402
    InputStatistics,
    Quantizer,
    QuantizerNeeds,
)
from pyllmlite.hooks.registry import Registry  # noqa: E402
from pyllmlite.model.source import open_checkpoint  # noqa: E402
from pyllmlite_plugins.quantizer.awq import AWQ  # noqa: E402
from pyllmlite_plugins.quantizer.gptq import GPTQ  # noqa: E402
from pyllmlite_plugins.quantizer.rtn import RoundToNearest  # noqa: E402


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices are tiny: threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = TINY[name](tmp_path_factory.mktemp(name))
        return made[name]

    return folder


def registry(*classes):
    class Plugin:
        @hookimpl
        def pyllmlite_quantizers(self):
            return list(classes)

    found = Registry()
    found.register(Plugin())
    return found


def tokens(sequences=6, length=40, seed=0):
    return np.random.default_rng(seed).integers(3, 331, (sequences, length)).astype(np.int32)


def logits_of(source, results, ids):
    model = LayeredModel(source)
    full = model.fill()
    for result in results:
        install(model, full.get_submodule(model.layer_name(result.index)), result)
    with torch.no_grad():
        return full(ids).logits


class Scaled(Quantizer):
    """Keeps floats, with columns multiplied at random and the inputs divided: AWQ unrounded."""

    name = "scaled"
    needs_calibration = True

    def quantize(self, shape, weight, calibration=None):
        rng = np.random.default_rng(len(shape.name) + shape.in_features)
        scale = np.exp(rng.standard_normal(shape.in_features)).astype(np.float32)
        if calibration.shared is not None:
            scale = scale[calibration.shared]
        return LinearWeight("f32", weight * scale, input_scale=1 / scale)


@pytest.mark.parametrize(
    "name", ["llama", "llama-mha", "llama-bias", "qwen3", "gemma3", "phi3", "gpt2", "bloom", "mpt"]
)
def test_scaled_and_unscaled_layers_are_equal_before_rounding(name, folders):
    """Folded into norms (with bias, or one added), rows of v and up, and their biases."""
    source = open_checkpoint(folders(name))
    settings = MethodSettings("scaled")
    results = list(quantize_layers(source, settings, tokens(2, 20), registry=registry(Scaled)))
    left = {
        name.split(".")[-1]
        for result in results
        for name, made in result.linears.items()
        if made.input_scale is not None
    }
    # Behind an activation nothing can take a scale over.
    down = {"gpt2": {"c_proj"}, "bloom": {"dense_4h_to_h"}, "mpt": {"down_proj"}}
    assert left == down.get(name, set())
    assert all(result.changed for result in results)
    ids = torch.from_numpy(tokens(2, 30, seed=1).astype(np.int64))
    with torch.no_grad():
        wanted = reference(folders(name))(ids).logits
    found = logits_of(source, results, ids)
    assert torch.allclose(found, wanted, atol=2e-3, rtol=1e-3)
    assert results[0].loss["layers.0.qkv"] < 1e-6


def test_rows_of_v_take_over_nothing_that_query_heads_do_not_share(folders):
    class Selfish(Scaled):
        def quantize(self, shape, weight, calibration=None):
            free = replace(calibration, shared=None)
            return super().quantize(shape, weight, free)

    source = open_checkpoint(folders("llama"))
    results = list(
        quantize_layers(source, MethodSettings("scaled"), tokens(), registry=registry(Selfish))
    )
    kept = results[1].linears["model.layers.1.self_attn.o_proj"]
    assert kept.input_scale is not None
    ids = torch.from_numpy(tokens(1, 12).astype(np.int64))
    with torch.no_grad():
        wanted = reference(folders("llama"))(ids).logits
    assert torch.allclose(logits_of(source, results, ids), wanted, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_each_matrix_sees_what_the_quantized_ones_before_it_make(name, folders):
    """Beside a walk by hand: hooks on the whole model, whose matrices are replaced one by one."""
    source = open_checkpoint(folders(name))
    settings = MethodSettings("gptq", group_size=16)
    calibration = tokens()
    results = list(quantize_layers(source, settings, calibration))
    model = LayeredModel(source)
    full = model.fill()
    quantizer = GPTQ(QuantizerNeeds("cpu", "bf16", (), None, 16))
    ids = torch.from_numpy(calibration.astype(np.int64))
    for index, layer in enumerate(model.layers):
        for stage in model.layout.stages:
            seen = []
            hook = layer.get_submodule(stage.modules[0]).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0])
            )
            with torch.no_grad():
                full(ids)
            hook.remove()
            inputs = seen[0].reshape(-1, seen[0].shape[-1]).double().numpy()
            gram = inputs.T @ inputs / len(inputs)
            magnitude = np.abs(inputs).mean(axis=0).astype(np.float32)
            weight = np.concatenate([get_weight(layer, m) for m in stage.modules])
            shape = LinearShape(f"layers.{index}.{stage.kind}", stage.kind, *weight.shape)
            made = quantizer.quantize(shape, weight, InputStatistics(len(inputs), gram, magnitude))
            first = 0
            for module in stage.modules:
                last = first + len(get_weight(layer, module))
                found = results[index].linears[f"{model.layer_name(index)}.{module}"]
                same = (found.values == made.values[first:last]).mean()
                assert same > 0.98, (index, module)  # what lies on an edge may fall either way
                assert np.array_equal(found.scales, made.scales[first:last])
                set_weight(layer, module, found.float32())
                first = last


@pytest.mark.parametrize("settings", [
    MethodSettings("gptq", group_size=16),
    MethodSettings("awq", group_size=16),
    MethodSettings("awq-gptq", group_size=16),
], ids=lambda s: s.quantizer)  # fmt: skip
def test_a_run_goes_on_where_it_stopped_to_the_bit(settings, folders):
    source = open_checkpoint(folders("llama"))
    whole = list(quantize_layers(source, settings, tokens()))
    asked = []

    def done(index):
        asked.append(index)
        return whole[index] if index < 2 else None

    resumed = list(quantize_layers(source, settings, tokens(), done))
    assert asked == [0, 1, 2] and resumed[1] is whole[1]
    for name, made in whole[2].linears.items():
        other = resumed[2].linears[name]
        assert np.array_equal(made.values, other.values)
        assert np.array_equal(made.scales, other.scales)
        assert np.array_equal(made.zero_points, other.zero_points)
    assert whole[2].changed.keys() == resumed[2].changed.keys()
    for name, value in whole[2].changed.items():
        assert np.array_equal(value, resumed[2].changed[name])


def test_methods_beat_rounding_on_the_whole_model(folders):
    source = open_checkpoint(folders("llama-mha"))
    calibration = tokens(24, 60)
    ids = torch.from_numpy(tokens(4, 60, seed=5).astype(np.int64))
    with torch.no_grad():
        wanted = reference(folders("llama-mha"))(ids).logits.log_softmax(-1)

    def loss(name, **extra):
        settings = MethodSettings(name, 4, 64, extra=extra)
        results = list(quantize_layers(source, settings, calibration))
        found = logits_of(source, results, ids).log_softmax(-1)
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    plain = loss("rtn", integer_zeros=True)
    assert loss("gptq") < 0.9 * plain
    assert loss("awq") < 0.95 * plain
    assert loss("awq-gptq") < 0.8 * plain


def test_rounding_needs_no_tokens(folders):
    source = open_checkpoint(folders("llama"))
    results = list(quantize_layers(source, MethodSettings("rtn", 4, 32), None))
    made = results[2].linears["model.layers.2.mlp.down_proj"]
    layer = LayeredModel(source).layer(2)
    weight = get_weight(layer, "mlp.down_proj")
    needs = QuantizerNeeds("cpu", "bf16", (), 4, 32)
    direct = RoundToNearest(needs).quantize(LinearShape("m", "mlp_down", *weight.shape), weight)
    assert np.array_equal(made.values, direct.values)
    assert 0 < results[2].loss["layers.2.mlp_down"] < 0.02


def test_plans_give_single_matrices_other_bits(folders):
    source = open_checkpoint(folders("llama"))
    plan = {"layers.1.qkv": 8, "layers.0.mlp_down": 3}
    results = list(
        quantize_layers(source, MethodSettings("gptq", 4, 16, plan=plan), tokens(4, 20))
    )
    assert results[1].linears["model.layers.1.self_attn.k_proj"].format == "int8"
    assert results[0].linears["model.layers.0.mlp.down_proj"].values.max() == 7
    assert results[0].linears["model.layers.0.self_attn.k_proj"].values.max() == 15
    with pytest.raises(ConfigError, match="'layers.7.qkv', which the model does not have"):
        next(quantize_layers(source, MethodSettings(plan={"layers.7.qkv": 8}), tokens()))


def test_refusals_are_one_clear_line(folders):
    source = open_checkpoint(folders("llama"))
    cases = [
        (MethodSettings("gptq"), None, ConfigError, "'gptq' needs calibration tokens"),
        (MethodSettings("gptq", group_size=4096), tokens(), ConfigError, "4096 fits no layer"),
        (MethodSettings("gptq"), tokens() + 400, ConfigError, "outside the model's vocabulary"),
    ]
    for settings, given, kind, text in cases:
        with pytest.raises(kind, match=text) as caught:
            next(quantize_layers(source, settings, given))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["gptq", "rtn"])
def test_weights_that_are_not_finite_are_named(name, bad, folders, tmp_path):
    from safetensors.torch import load_file, save_file

    state = load_file(folders("llama") / "model.safetensors")
    state["model.layers.1.self_attn.k_proj.weight"][1, 4] = bad
    (tmp_path / "config.json").write_bytes((folders("llama") / "config.json").read_bytes())
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers.1.qkv") as caught:
        list(quantize_layers(open_checkpoint(tmp_path), MethodSettings(name), tokens(2, 8)))
    assert "\n" not in str(caught.value)


def test_rows_of_a_matrix():
    made = AWQ(QuantizerNeeds("cpu", "f32", (), 4, 8)).quantize(
        LinearShape("m", "qkv", 6, 20),
        np.random.default_rng(0).standard_normal((6, 20)).astype(np.float32),
        InputStatistics(9, np.eye(20), np.ones(20, np.float32)),
    )
    assert np.array_equal(rows_of(made, 2, 5).float32(), made.float32()[2:5])
