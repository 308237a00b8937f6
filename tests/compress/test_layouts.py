"""Layouts written, held to packings by plain loops and to the readers."""

import numpy as np
import pytest
from loops import pack_rows

from pyllmlite.compress.layouts import layout_named
from pyllmlite.compress.layouts.packing import take_apart
from pyllmlite.compress.shard import write_shard
from pyllmlite.core.errors import ConfigError, ModelError
from pyllmlite.core.weights import LinearWeight
from pyllmlite.model.quantized import reader_for
from pyllmlite.model.safetensors import SafetensorsCheckpoint

MODULE = "model.layers.0.mlp.down_proj"


def weight(rows, columns, bits=4, group=8, symmetric=False, order=None, low=1, seed=0):
    rng = np.random.default_rng(seed)
    groups = -(-columns // group) if group else 1
    scales = rng.uniform(0.01, 0.1, (rows, groups)).astype(np.float16)
    zeros = None
    if bits == 4:
        values = rng.integers(0, 16, (rows, columns)).astype(np.uint8)
        if not symmetric:
            zeros = rng.integers(low, 16, (rows, groups)).astype(np.int16)
    else:
        values = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
        if not symmetric:
            zeros = rng.integers(low - 128, 128, (rows, groups)).astype(np.int16)
    return LinearWeight(
        "int4" if bits == 4 else "int8", values, scales, None, group, input_permutation=order,
        zero_points=zeros,
    )  # fmt: skip


def written(tmp_path, layout, made):
    """The tensors of one matrix, and the matrix as the reader gives it."""
    entries, scheme = layout.entries(MODULE, made)
    path = tmp_path / "one.safetensors"
    write_shard(path, entries)
    stored = SafetensorsCheckpoint(path)
    parts = {
        name.removeprefix(MODULE + "."): stored.tensor(name).plain().reshape(
            stored.tensor(name).shape
        )
        for name in stored.names()
    }
    config = layout.config({MODULE: scheme}, [], "lm_head")
    read = reader_for(path, config)(SafetensorsCheckpoint(path)).tensor(MODULE + ".weight")
    return parts, read, config


CASES = [
    pytest.param({"rows": 16, "columns": 32, "group": 8}, id="plain"),
    pytest.param({"rows": 16, "columns": 32, "group": 8, "symmetric": True}, id="symmetric"),
    pytest.param({"rows": 13, "columns": 37, "group": 0}, id="odd sizes, whole rows"),
    pytest.param({"rows": 1, "columns": 8, "group": 0, "symmetric": True}, id="one row"),
    pytest.param({"rows": 8, "columns": 48, "group": 32}, id="a short last group"),
    pytest.param({"rows": 8, "columns": 24, "group": 24}, id="one group"),
    pytest.param({"rows": 16, "columns": 32, "group": 16, "bits": 8}, id="int8"),
    pytest.param(
        {"rows": 9, "columns": 21, "group": 0, "bits": 8, "symmetric": True}, id="int8, odd sizes"
    ),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["pack-quantized", "gptq", "gptq_v2"])
def test_read_back_exactly(tmp_path, name, case):
    made = weight(**case)
    _, read, _ = written(tmp_path, layout_named(name), made)
    back = read.codes()
    assert back.format == made.format
    np.testing.assert_array_equal(back.values, made.values)
    np.testing.assert_array_equal(back.float32(), made.float32())


@pytest.mark.parametrize("case", [c for c in CASES if "int8" in str(c.id)])
def test_int_quantized(tmp_path, case):
    made = weight(**case)
    parts, read, config = written(tmp_path, layout_named("int-quantized"), made)
    np.testing.assert_array_equal(parts["weight"], made.values)
    np.testing.assert_array_equal(read.codes().float32(), made.float32())
    assert config["config_groups"]["group_0"]["input_activations"] is None


def test_int8_inputs(tmp_path):
    made = weight(16, 32, bits=8, group=0, symmetric=True)
    _, read, _ = written(tmp_path, layout_named("int-quantized", True), made)
    back = read.codes()
    assert back.int8_activations and back.activation_group == -1
    grouped = weight(16, 32, bits=8, group=8, symmetric=True)
    with pytest.raises(ModelError, match="one scale a row"):
        layout_named("int-quantized", True).entries(MODULE, grouped)
    with pytest.raises(ConfigError, match="int-quantized"):
        layout_named("gptq", True)


@pytest.mark.parametrize("bits", [4, 8])
def test_pack_quantized_by_plain_loops(tmp_path, bits):
    """From compressed-tensors' description: unsigned codes, lowest bits first, zeros by outputs."""
    made = weight(11, 19, bits, group=0)
    unsigned = made.values.astype(np.int64) + (128 if bits == 8 else 0)
    zeros = made.zero_points.astype(np.int64) + (128 if bits == 8 else 0)
    parts, _, _ = written(tmp_path, layout_named("pack-quantized"), made)
    np.testing.assert_array_equal(parts["weight_packed"], pack_rows(unsigned, bits))
    np.testing.assert_array_equal(parts["weight_zero_point"], pack_rows(zeros.T, bits).T)
    np.testing.assert_array_equal(parts["weight_shape"], [11, 19])
    np.testing.assert_array_equal(parts["weight_scale"].view(np.float16), made.scales)


@pytest.mark.parametrize("name,less", [("gptq", 1), ("gptq_v2", 0)])
def test_gptq_by_plain_loops(tmp_path, name, less):
    order = np.random.default_rng(3).permutation(32).astype(np.int32)
    made = weight(16, 32, group=8, order=order)
    parts, read, config = written(tmp_path, layout_named(name), made)
    plain = np.empty_like(made.values)
    plain[:, order] = made.values
    np.testing.assert_array_equal(parts["qweight"], pack_rows(plain, 4).T)
    np.testing.assert_array_equal(parts["qzeros"], pack_rows(made.zero_points.T - less, 4))
    np.testing.assert_array_equal(parts["g_idx"], np.argsort(order) // 8)
    np.testing.assert_array_equal(parts["scales"].view(np.float16), made.scales.T)
    assert config["desc_act"] is True and config["checkpoint_format"] == name
    np.testing.assert_array_equal(read.float32(), made.float32())


def test_order_of_columns_within_groups_needs_no_table(tmp_path):
    order = np.concatenate([np.arange(8)[::-1], np.arange(8, 32)]).astype(np.int32)
    made = weight(16, 32, group=8, order=order)
    _, read, _ = written(tmp_path, layout_named("pack-quantized"), made)
    np.testing.assert_array_equal(read.float32(), made.float32())


def test_group_that_does_not_divide_is_written_in_smaller_ones():
    codes = take_apart(MODULE, weight(4, 576, group=128))
    assert codes.group_size == 64 and codes.scales.shape == (4, 9)
    np.testing.assert_array_equal(codes.scales[:, 0], codes.scales[:, 1])


def test_group_that_shares_no_divisor(tmp_path):
    made = weight(8, 148, group=24)
    with pytest.raises(ModelError, match="148 columns do not part into groups of 24"):
        layout_named("pack-quantized").entries(MODULE, made)
    _, read, _ = written(tmp_path, layout_named("gptq"), made)
    np.testing.assert_array_equal(read.float32(), made.float32())
    assert read.codes().group_size == 24


def test_exact_minima_become_zero_points():
    made = weight(8, 32, group=8)
    minima = -made.scales.astype(np.float32) * made.zero_points
    exact = minima.astype(np.float16).astype(np.float32) == minima
    made.scales[...] = 0.25  # a power of two: its multiples are float16
    as_minima = LinearWeight(
        "int4", made.values, made.scales, (-0.25 * made.zero_points).astype(np.float16), 8
    )
    assert not exact.all()
    codes = take_apart(MODULE, as_minima)
    np.testing.assert_array_equal(codes.zeros, made.zero_points)
    as_minima.mins[0, 0] += np.float16(0.1)
    with pytest.raises(ModelError, match="integer zero points"):
        take_apart(MODULE, as_minima)


def test_scale_of_zero():
    made = weight(8, 32, group=8, symmetric=True)
    made.scales[2] = 0
    assert take_apart(MODULE, made).symmetric


@pytest.mark.parametrize(
    "change,words",
    [
        ({"format": "codebook4"}, "no layout holds"),
        ({"input_scale": np.ones(32, np.float32)}, "folded"),
        ({"zero_points": np.full((8, 4), 16)}, "zero point of 16"),
        ({"zero_points": np.full((8, 4), -1)}, "zero point of -1"),
        ({"values": np.full((8, 32), 16, np.uint8)}, "above 15"),
    ],
)
def test_what_no_layout_holds(change, words):
    made = weight(8, 32, group=8)
    for name, value in change.items():
        setattr(made, name, value)
    with pytest.raises(ModelError, match=words):
        take_apart(MODULE, made)


def test_what_one_layout_does_not_hold():
    order = np.random.default_rng(3).permutation(32).astype(np.int32)
    with pytest.raises(ModelError, match="static groups"):
        layout_named("pack-quantized").entries(MODULE, weight(8, 32, group=8, order=order))
    with pytest.raises(ModelError, match="gptq_v2"):
        layout_named("gptq").entries(MODULE, weight(8, 32, group=8, low=0, seed=1))
    wide = weight(8, 32, group=8)
    wide.scales = wide.scales.astype(np.float32) * np.float32(1.0001)
    with pytest.raises(ModelError, match="float32 scales"):
        layout_named("gptq").entries(MODULE, wide)
    with pytest.raises(ModelError, match="holds 8"):
        layout_named("int-quantized").entries(MODULE, weight(8, 32))
    with pytest.raises(ConfigError, match="gptq_v2"):
        layout_named("awq")


@pytest.mark.parametrize("name", ["pack-quantized", "gptq_v2"])
def test_modules_that_differ(tmp_path, name):
    """Bits and groups of its own for a module, and one that stays floats."""
    layout = layout_named(name)
    modules = {
        "model.layers.0.self_attn.q_proj": weight(16, 32, group=8),
        "model.layers.0.self_attn.k_proj": weight(8, 32, group=8, seed=1),
        MODULE: weight(16, 64, bits=8, group=0, symmetric=True),
    }
    entries, schemes = [], {}
    for module, made in modules.items():
        more, schemes[module] = layout.entries(module, made)
        entries += more
    path = tmp_path / "one.safetensors"
    write_shard(path, entries)
    config = layout.config(schemes, ["model.layers.0.mlp.up_proj"], "lm_head")
    read = reader_for(path, config)(SafetensorsCheckpoint(path))
    for module, made in modules.items():
        np.testing.assert_array_equal(read.tensor(module + ".weight").float32(), made.float32())
    if name == "gptq_v2":
        assert config["dynamic"] == {
            r"+:^model\.layers\.0\.mlp\.down_proj$": {"bits": 8, "group_size": -1},
            r"-:^model\.layers\.0\.mlp\.up_proj$": {},
        }
    else:
        assert config["ignore"] == ["lm_head", "model.layers.0.mlp.up_proj"]
        assert len(config["config_groups"]) == 2
