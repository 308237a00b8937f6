"""Checkpoints of other tools: exactly the stored values, transformers' logits, clear refusals."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
from model.numpy_forward import NumpyModel
from model.program_logits import build_tiny, program_logits
from model.quantized_models import INT8_LAYOUTS, LAYOUTS, write

from pyllmlite.core.errors import ModelError
from pyllmlite.core.weights import LinearShape
from pyllmlite.hooks.quantizer import QuantizerNeeds
from pyllmlite.model.source import open_checkpoint
from pyllmlite.model.weights import SplitMatrix, load_matrix, plan_matrices
from pyllmlite_plugins.quantizer.none import Unquantized

torch = pytest.importorskip("torch")

MODULES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}  # fmt: skip


@pytest.fixture(scope="module", params=[*LAYOUTS, *INT8_LAYOUTS])
def made(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    return request.param, path, write(path, {**LAYOUTS, **INT8_LAYOUTS}[request.param])


def weight_of(model, name):
    _, layer, part = name.split(".")[:3]
    return model.get_submodule(f"model.layers.{layer}.{MODULES[part]}").weight.detach().numpy()


def linear_names(source):
    parts = [name for name in source.names() if set(name.split(".")[2:3]) & set(MODULES)]
    assert len(parts) == 7 * source.spec.num_layers
    return parts


def test_values_are_the_stored_ones(made):
    _, path, model = made
    source = open_checkpoint(path)
    for name in linear_names(source):
        want = weight_of(model, name)
        tensor = source.raw(name)
        np.testing.assert_array_equal(source.get(name), want)
        for part in (slice(0, 1), slice(3, 29), slice(len(want) - 5, None), slice(7, 7)):
            np.testing.assert_array_equal(tensor.float32(part), want[part])
        picked = np.array([len(want) - 1, 0, 4])
        np.testing.assert_array_equal(tensor.float32(picked), want[picked])
        codes = tensor.codes(picked)
        if codes is not None:
            np.testing.assert_array_equal(codes.float32(), want[picked])


def test_packed_values_are_the_stored_ones(made):
    """What the kernels read, in packed order, column by column."""
    name, path, model = made
    source = open_checkpoint(path)
    plans = plan_matrices(source.spec)
    quantizer = Unquantized(QuantizerNeeds("cpu", "f32", tuple(p.shape for p in plans)))
    for plan in plans:
        if plan.shape.kind in ("embed", "head"):
            continue
        matrix = load_matrix(source, plan, quantizer)
        parts = matrix.parts if isinstance(matrix, SplitMatrix) else [matrix]
        rows = np.concatenate([in_order(part) for part in parts])
        first = 0
        for part in plan.parts:
            want = weight_of(model, part.name)
            found = rows[first : first + len(want), : want.shape[1]]
            np.testing.assert_array_equal(found, want, err_msg=f"{name} {part.name}")
            assert not rows[first + len(want) : first + part.rows].any()
            first += part.rows


def in_order(matrix):
    values = matrix.packed.unpack()
    if matrix.input_permutation is None:
        return values
    plain = np.empty_like(values)
    plain[:, matrix.input_permutation] = values
    return plain


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_are_those_of_the_stored_values(name, tmp_path):
    model = write(tmp_path, LAYOUTS[name])
    built = build_tiny(tmp_path)
    tokens = np.random.default_rng(1).integers(3, 131, size=70).tolist()
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(theirs).max() > 0.1
    ours = program_logits(built, tokens)
    assert np.abs(ours - theirs).max() < 2e-3
    np.testing.assert_array_equal(program_logits(built, tokens, chunk=9), ours)
    light = program_logits(build_tiny(tmp_path, dtype="auto"), tokens)
    assert np.linalg.norm(light - theirs) < 0.06 * np.linalg.norm(theirs)


class Int8Inputs(NumpyModel):
    """Inputs of the layers' matrices rounded to int8, a scale a row; those above the threshold
    are left alone."""

    threshold = np.inf

    def _linear(self, x, name):
        large = np.abs(x) > self.threshold
        rest = np.where(large, 0, x)
        scale = np.abs(rest).max(axis=1, keepdims=True) / 127
        return super()._linear(np.where(large, x, np.rint(rest / scale) * scale), name)


@pytest.mark.parametrize("name", INT8_LAYOUTS)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_schemes_with_int8_activations_run_as_they_say(name, dtype, tmp_path):
    write(tmp_path, INT8_LAYOUTS[name])
    source = open_checkpoint(tmp_path)
    reference = Int8Inputs(source)
    reference.threshold = INT8_LAYOUTS[name].config.get("llm_int8_threshold", np.inf)
    tokens = np.random.default_rng(1).integers(3, 131, size=40).tolist()
    want = reference.logits(tokens)
    got = program_logits(build_tiny(tmp_path, dtype=dtype), tokens)
    plain = NumpyModel(source).logits(tokens)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    # A value on the edge between two codes may fall either way; with bf16, embedding, head and KV
    # are rounded as well.
    assert error < (0.02 if dtype == "f32" else 0.06)
    assert dtype == "bf16" or error < 0.3 * np.linalg.norm(plain - want) / np.linalg.norm(want)


def test_parts_that_differ_have_ops_of_their_own(tmp_path):
    expected = {
        "gptq-other-order": ["layers.0.qkv.0", "layers.0.qkv.1", "layers.0.qkv.2"],
        "gptq-other-up": ["layers.0.gate_up.0", "layers.0.gate_up.1"],
        "pack-some-floats": ["layers.0.qkv.0", "layers.0.qkv.1", "layers.1.gate_up.1"],
        "gptq-desc-act": [],
    }
    for name, split in expected.items():
        write(tmp_path / name, LAYOUTS[name])
        ops = [entry.name for entry in build_tiny(tmp_path / name).program.entries]
        assert set(split) <= set(ops)
        assert split or not any(".qkv." in op or ".gate_up." in op for op in ops)


def test_explain_says_what_is_multiplied(tmp_path):
    for name, words in {
        "nf4": "codebook4 x f32",
        "llm-int8": "int8 x int8, above 2 in f32",
        "awq": "int4 x f32",
    }.items():
        write(tmp_path / name, {**LAYOUTS, **INT8_LAYOUTS}[name])
        assert words in build_tiny(tmp_path / name).explain()


def test_only_some_parts_need_float32_scales(tmp_path):
    """One part's scales fit float16 and are all in the middle, the other's neither."""
    layout = copy.copy(LAYOUTS["pack-float-scales"])
    plain = layout.make

    def make(rng, module, rows, columns):
        tensors, weight = plain(rng, module, rows, columns)
        if "k_proj" not in module:
            return tensors, weight
        scale = tensors["weight_scale"] = np.full_like(tensors["weight_scale"], 0.0625)
        tensors["weight_zero_point"] = np.full_like(tensors["weight_zero_point"], 0)
        tensors["weight_zero_point"].view(np.uint32)[:] = 0x88888888
        packed = tensors["weight_packed"].view(np.uint32)
        codes = np.stack([(packed >> (4 * i)) & 15 for i in range(8)], axis=-1)
        codes = codes.reshape(rows, -1)[:, :columns].astype(np.float32)
        return tensors, (codes - 8) * scale[0, 0]

    layout.make = make
    model = write(tmp_path, layout)
    built = build_tiny(tmp_path)
    assert "layers.0.qkv" in [entry.name for entry in built.program.entries]
    tokens = [5, 9, 100, 7]
    with torch.no_grad():
        theirs = model(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(program_logits(built, tokens) - theirs).max() < 2e-3


def test_int8_activations_can_be_chosen(tmp_path):
    write(tmp_path, LAYOUTS["awq"])
    tokens = [3, 4, 5, 60, 61]
    exact = program_logits(build_tiny(tmp_path), tokens)
    options = {"dtype": "bf16", "kv_cache_dtype": "f32"}
    floats = build_tiny(tmp_path, extra={"int8_activations": False}, **options)
    codes = build_tiny(tmp_path, **options)
    near = np.abs(program_logits(floats, tokens) - exact).max()
    far = np.abs(program_logits(codes, tokens) - exact).max()
    assert near < far


def test_configs_in_files_of_their_own(tmp_path):
    for name, file, changes in (
        ("gptq", "quantize_config.json", {}),
        ("awq", "quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}),
    ):
        path = tmp_path / name
        model = write(path, LAYOUTS[name])
        config = json.loads((path / "config.json").read_text())
        own = config.pop("quantization_config")
        del own["quant_method"]
        for key in changes and ("bits", "group_size"):
            del own[key]
        (path / "config.json").write_text(json.dumps(config))
        (path / file).write_text(json.dumps(own | changes))
        source = open_checkpoint(path)
        want = model.model.layers[0].mlp.down_proj.weight.detach().numpy()
        np.testing.assert_array_equal(source.get("layers.0.down.weight"), want)


@pytest.mark.parametrize("asked", [{"quantizer": "rtn", "bits": 4}, {"bits": 4}])
def test_a_quantizer_may_round_again_and_says_so(asked, tmp_path, caplog):
    """Asked for by name or bits, as with any checkpoint: the stored values are quantized anew."""
    write(tmp_path, LAYOUTS["gptq-8bit"])
    tokens = [3, 4, 5, 60, 61]
    exact = program_logits(build_tiny(tmp_path), tokens)
    assert not caplog.messages
    again = program_logits(build_tiny(tmp_path, **asked), tokens)
    assert 0 < np.linalg.norm(again - exact) < 0.5 * np.linalg.norm(exact)
    assert len(caplog.messages) == 1
    assert "quantized already (gptq-int8), and quantizer 'rtn' rounds them once" in caplog.text


def test_a_quantizer_that_keeps_the_codes_says_nothing(tmp_path, caplog):
    write(tmp_path, INT8_LAYOUTS["llm-int8"])
    build_tiny(tmp_path, quantizer="int8")
    build_tiny(tmp_path, quantizer="none")
    assert not caplog.messages


def test_a_scheme_of_the_kv_cache_is_not_followed_and_that_is_said(tmp_path, caplog):
    write(tmp_path, LAYOUTS["pack-symmetric"])
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    settings(tmp_path, lambda config: config.update(kv_cache_scheme=None))
    expected = open_checkpoint(tmp_path).get("layers.0.q.weight")
    assert not caplog.messages
    settings(tmp_path, lambda config: config.update(kv_cache_scheme=scheme))
    rewrite(tmp_path, lambda tensors: tensors.update(
        {f"model.layers.{i}.self_attn.k_scale": np.ones(1, np.float32) for i in range(2)}
    ))  # fmt: skip
    source = open_checkpoint(tmp_path)
    np.testing.assert_array_equal(source.get("layers.0.q.weight"), expected)
    assert len(caplog.messages) == 1 and "kv_cache_scheme is not followed" in caplog.text


def test_shape_of_a_layout_is_what_the_quantizer_sees(tmp_path):
    write(tmp_path, LAYOUTS["nf4"])
    codes = open_checkpoint(tmp_path).raw("layers.0.q.weight").codes()
    shape = LinearShape("layers.0.qkv", "qkv", 160, 96)
    kept = Unquantized(QuantizerNeeds("cpu", "bf16", ())).keep(shape, codes)
    assert kept is codes and not kept.int8_activations and kept.group_size == 32


def rewrite(path, change):
    """Load the one shard, let ``change`` edit the tensors, and save it again."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def settings(path, change):
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))


Q = "model.layers.1.self_attn.q_proj."
DAMAGES = [
    ("gptq", lambda t: t.pop(Q + "scales"), "lacks the tensor .*q_proj.scales"),
    ("gptq", lambda t: t.pop(Q + "qweight"), "lacks the tensor .*q_proj.weight"),
    ("gptq", lambda t: t.update({Q + "qzeros": t[Q + "qzeros"][:1]}), r"qzeros has shape \[1,"),
    ("gptq", lambda t: t[Q + "scales"].__setitem__((1, 5), np.nan), "scale that is not finite"),
    ("gptq", lambda t: t[Q + "g_idx"].__setitem__(0, 2), "g_idx does not part 96 inputs"),
    ("gptq", lambda t: t.update({Q + "qweight": np.ones((12, 96))}), "expected i32"),
    ("awq", lambda t: t[Q + "scales"].__setitem__((0, 0), np.inf), "scale that is not finite"),
    ("awq", lambda t: t.update({Q + "scales": t[Q + "scales"][:, :8]}), "scales has shape"),
    ("pack-symmetric", lambda t: t.pop(Q + "weight_shape"), "lacks the tensor .*weight_shape"),
    ("pack-asymmetric", lambda t: t.pop(Q + "weight_zero_point"), "has no weight_zero_point"),
    ("pack-asymmetric", lambda t: t[Q + "weight_scale"].fill(np.nan), "scale that is not finite"),
    ("int-weights", lambda t: t.pop(Q + "weight_scale"), "lacks the tensor .*weight_scale"),
    ("nf4", lambda t: t.pop(Q + "weight.nested_absmax"), "lacks nested_absmax"),
    ("nf4", lambda t: t.pop(Q + "weight.quant_state.bitsandbytes__nf4"), "without their scales"),
    ("nf4", lambda t: t[Q + "weight.quant_map"].fill(np.nan), "scale that is not finite"),
    ("nf4", lambda t: t.update({Q + "weight": t[Q + "weight"][:9]}), "has 9 bytes"),
    ("llm-int8", lambda t: t.pop(Q + "SCB"), "without their scales"),
    ("llm-int8", lambda t: t[Q + "SCB"].fill(np.inf), "scale that is not finite"),
    ("llm-int8", lambda t: t[Q + "weight_format"].fill(2), "weight_format '2' is not read"),
]  # fmt: skip


@pytest.mark.parametrize("name,damage,message", DAMAGES)
def test_a_damaged_checkpoint_is_one_clear_line(name, damage, message, tmp_path):
    write(tmp_path, {**LAYOUTS, **INT8_LAYOUTS}[name])
    rewrite(tmp_path, damage)
    with pytest.raises(ModelError, match=message) as error:
        build_tiny(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def weights_of(config):
    return config["config_groups"]["group_0"]["weights"]


def inputs_of(config, **changes):
    group = config["config_groups"]["group_0"]
    group["input_activations"] = {
        "num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token",
        **changes,
    }  # fmt: skip


REFUSALS = [
    ("gptq", lambda c: c.update(quant_method="exl3"), "'exl3', which is not read; known are gptq"),
    ("gptq", lambda c: c.update(checkpoint_format="marlin"), "known are gptq, gptq_v2"),
    ("gptq", lambda c: c.update(bits="four"), "bits must be an integer"),
    ("gptq", lambda c: c.update(bits=5), "bits '5' is not read; known are 2, 3, 4, 8"),
    ("gptq", lambda c: c.update(group_size=-7), "group_size must be an integer of at least -1"),
    ("awq", lambda c: c.update(version="marlin"), "version 'marlin' is not read; known are gemm"),
    ("awq", lambda c: c.update(bits=8), "bits '8' is not read"),
    ("pack-symmetric", lambda c: c.update(format="nvfp4-pack-quantized"), "known are pack-quant"),
    ("pack-symmetric", lambda c: c.pop("config_groups"), "config_groups is missing"),
    ("pack-symmetric", lambda c: weights_of(c).update(type="float"), "weight type 'float'"),
    ("pack-symmetric", lambda c: weights_of(c).update(num_bits=6), "num_bits '6' is not read"),
    ("pack-symmetric", lambda c: weights_of(c).update(strategy="block"), "strategy 'block'"),
    ("pack-symmetric", lambda c: inputs_of(c, type="float"), "input_activations' type 'float'"),
    ("pack-symmetric", lambda c: inputs_of(c, dynamic=False), "dynamic 'False' is not read"),
    ("pack-symmetric", lambda c: c.update(sparsity_config={"format": "x"}), "sparsity_config"),
    ("pack-symmetric",
     lambda c: c["config_groups"]["group_0"].update(targets=["re:("]), "is no pattern"),
    ("nf4", lambda c: c.update(llm_int8_threshold="six"), "llm_int8_threshold must be a number"),
]  # fmt: skip


@pytest.mark.parametrize("name,change,message", REFUSALS)
def test_an_unknown_setting_is_one_clear_line(name, change, message, tmp_path):
    write(tmp_path, LAYOUTS[name])
    settings(tmp_path, change)
    with pytest.raises(ModelError, match=message) as error:
        open_checkpoint(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_a_config_that_names_a_scheme_which_is_not_there(tmp_path):
    for name in ("gptq", "awq", "pack-symmetric", "nf4"):
        path = tmp_path / name
        write(path, LAYOUTS["pack-some-floats"])
        config = json.loads((path / "config.json").read_text())
        other = LAYOUTS["pack-symmetric" if name == "gptq" else "gptq"]
        write(path, other)
        config["quantization_config"] = LAYOUTS[name].config
        (path / "config.json").write_text(json.dumps(config))
        if name == "awq":  # GPTQ's tensors have other shapes
            message = "has shape"
        else:
            message = "but no tensor is"
        with pytest.raises(ModelError, match=message):
            open_checkpoint(path)
        shutil.rmtree(path)


def test_matrices_that_an_architecture_fuses_or_transposes(tmp_path):
    """Other tools store [out, in] always; GPT-2's floats are [in, out], its q, k, v one matrix."""
    from safetensors.numpy import load_file, save_file
    from tiny_models import TINY

    path = TINY["gpt2"](tmp_path)
    plain = open_checkpoint(path)
    want = {name: plain.get(f"layers.1.{name}.weight") for name in ("q", "k", "v", "up")}
    tensors = load_file(path / "model.safetensors")
    for module in ("attn.c_attn", "mlp.c_fc"):
        name = f"transformer.h.1.{module}.weight"
        weight = np.ascontiguousarray(tensors.pop(name).T)
        scb = np.abs(weight).max(axis=1)
        tensors[name] = np.rint(weight * (127 / scb)[:, None]).astype(np.int8)
        tensors[name.replace("weight", "SCB")] = scb
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = INT8_LAYOUTS["llm-int8"].config
    (path / "config.json").write_text(json.dumps(config))
    source = open_checkpoint(path)
    for name, weight in want.items():
        found = source.get(f"layers.1.{name}.weight")
        assert np.abs(found - weight).max() <= np.abs(weight).max() / 250
        assert source.raw(f"layers.1.{name}.weight").codes().outlier_threshold == 2
    built = build_tiny(path)
    assert "int8 x int8, above 2 in f32" in built.explain()
