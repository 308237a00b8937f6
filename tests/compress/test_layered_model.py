"""transformers' modules with our weights: the same model, layer by layer."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from gguf_models import write_gguf  # noqa: E402
from tiny_models import TINY, reference  # noqa: E402

from pyllmlite.compress.layer_run import LayerRun  # noqa: E402
from pyllmlite.compress.layered_model import LayeredModel  # noqa: E402
from pyllmlite.compress.layerwise import get_weight, set_weight  # noqa: E402
from pyllmlite.core.errors import ModelError  # noqa: E402
from pyllmlite.model.source import open_checkpoint  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(name):
        if name not in made:
            made[name] = TINY[name](tmp_path_factory.mktemp(name))
        return made[name]

    return folder


def walk(model, tokens, run_layer):
    """Hidden states behind every layer."""
    calls = model.layer_arguments(*tokens.shape)
    hidden, states = model.enter(tokens), []
    for index, call in enumerate(calls):
        hidden = run_layer(model.layer(index), call, hidden)
        states.append(hidden)
    return states


@pytest.mark.parametrize("name", TINY)
def test_layer_by_layer_as_the_whole_model(name, folders):
    model = LayeredModel(open_checkpoint(folders(name)))
    tokens = torch.from_numpy(torch.randint(3, 331, (2, 45)).numpy())
    with torch.no_grad():
        full = reference(folders(name))(tokens, output_hidden_states=True)

        def staged(layer, call, hidden):
            run = LayerRun(layer, model.layout, [call], [hidden])
            for stage, found in enumerate(model.layout.stages):
                inputs = list(run.inputs(stage))
                assert inputs[0].shape == (90, get_weight(layer, found.modules[0]).shape[1])
                again = list(run.inputs(stage))
                assert all(torch.equal(a, b) for a, b in zip(inputs, again, strict=True))
            return next(run.outputs())

        states = walk(model, tokens, staged)
        for ours, theirs in zip(states[:-1], full.hidden_states[1:-1], strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)
        logits = model.fill()(tokens).logits
    assert torch.allclose(logits, full.logits, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "phi3"])
def test_a_replayed_layer_uses_the_weights_it_has_by_then(name, folders):
    """Weights replaced between the stages: the same output as a plain run with the new ones."""
    model = LayeredModel(open_checkpoint(folders(name)))
    tokens = torch.randint(3, 331, (2, 20))
    call = model.layer_arguments(2, 20)[1]
    hidden = [model.enter(tokens)]
    layer = model.layer(1)
    run = LayerRun(layer, model.layout, [call], hidden)
    for number, stage in enumerate(model.layout.stages):
        list(run.inputs(number))
        for module in stage.modules:
            set_weight(layer, module, get_weight(layer, module) * 1.25)
    replayed = next(run.outputs())
    plain = next(LayerRun(layer, model.layout, [call], hidden).outputs())
    assert torch.equal(replayed, plain)


def test_layers_write_what_they_keep_into_the_same_memory(folders):
    model = LayeredModel(open_checkpoint(folders("llama")))
    chunks = torch.split(torch.randint(3, 331, (3, 20)), 2)  # the last one is smaller
    hidden = [model.enter(chunk) for chunk in chunks]
    apart = [h.clone() for h in hidden]
    buffers, places = {}, []
    for index in range(2):
        layer = model.layer(index)
        calls = [model.layer_arguments(len(chunk), 20)[index] for chunk in chunks]
        shared = LayerRun(layer, model.layout, calls, hidden, buffers)
        alone = LayerRun(layer, model.layout, calls, apart)
        for stage in range(4):
            for ours, theirs in zip(shared.inputs(stage), alone.inputs(stage), strict=True):
                assert torch.equal(ours, theirs)
        shared.advance()
        apart = list(alone.outputs())
        assert all(torch.equal(a, b) for a, b in zip(hidden, apart, strict=True))
        places.append([t.data_ptr() for kept in (*buffers.values(), hidden) for t in kept])
    assert places[0] == places[1] and len(places[0]) == 6


def test_names_rows_and_norms(folders):
    model = LayeredModel(open_checkpoint(folders("phi3")))
    module, rows = model.module_of("layers.1.v.weight")
    assert module == "model.layers.1.self_attn.qkv_proj" and rows == slice(96, 120)
    assert model.module_of("layers.0.up.weight") == (
        "model.layers.0.mlp.gate_up_proj", slice(148, 296))  # fmt: skip
    assert model.norm_offset("layers.0.attn_norm.weight") == 0.0
    gemma = LayeredModel(open_checkpoint(folders("gemma3")))
    assert gemma.norm_offset("layers.0.mlp_norm.weight") == 1.0
    with pytest.raises(ModelError, match="no module holds 'layers.9.q.weight'"):
        model.module_of("layers.9.q.weight")


def test_a_layer_does_not_stay_in_memory(folders):
    model = LayeredModel(open_checkpoint(folders("llama")))
    model.layer(1)
    assert all(p.device.type == "meta" for p in model.layers.parameters())


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2", "phi3", "gpt2", "bloom", "mpt"])
def test_from_gguf(name, folders, tmp_path):
    pytest.importorskip("gguf")
    theirs = reference(folders(name))
    more = {"attention__scale": 24**-0.5} if name == "gemma2" else {}
    path = write_gguf(theirs, tmp_path / "model.gguf", **more)
    tokens = torch.randint(3, 331, (1, 30))
    with torch.no_grad():
        logits = LayeredModel(open_checkpoint(path)).fill()(tokens).logits
        assert torch.allclose(logits, theirs(tokens).logits, atol=1e-3)
