"""RTN and ``none`` beside their formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyllmlite.core.errors import ModelError
from pyllmlite.core.weights import LinearShape
from pyllmlite.hooks.quantizer import QuantizerNeeds
from pyllmlite.testing.quantizer import dequantized
from pyllmlite_plugins.quantizer.none import Unquantized
from pyllmlite_plugins.quantizer.rtn import RoundToNearest


def needs(**changes):
    arguments = {"device": "cpu", "dtype": "f32", "shapes": ()} | changes
    return QuantizerNeeds(**arguments)


def quantize(weight, kind="qkv", **changes):
    weight = np.asarray(weight, np.float32)
    return RoundToNearest(needs(**changes)).quantize(LinearShape("m", kind, *weight.shape), weight)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_bf16_rounds_as_torch_does():
    weight = (normal(64, 70) * 10.0 ** np.arange(-35, 35)).astype(np.float32)
    weight[0, :4] = [1 + 2**-8, 1 + 3 * 2**-8, -0.0, 1e-40]  # ties go to even
    made = Unquantized(needs(dtype="bf16")).quantize(LinearShape("m", "qkv", 64, 70), weight)
    want = torch.from_numpy(weight).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    assert made.format == "bf16" and (made.values == want).all()


def test_bf16_refuses_what_would_become_infinite():
    weight = np.full((1, 8), 3.4e38, np.float32)
    with pytest.raises(ModelError, match="m holds weights too large for bf16"):
        Unquantized(needs(dtype="bf16")).quantize(LinearShape("m", "qkv", 1, 8), weight)


def test_int8_is_symmetric_per_channel():
    weight = normal(20, 77)
    made = quantize(weight, bits=8)
    assert (made.format, made.group_size, made.mins) == ("int8", 0, None)
    assert made.scales.shape == (20, 1) and made.int8_activations
    ideal = np.abs(weight).max(axis=1, keepdims=True) / 127
    assert np.allclose(made.scales.astype(np.float32), ideal, rtol=1e-3)
    assert (np.abs(made.values).max(axis=1) >= 126).all() and made.values.min() >= -127
    step = made.scales.astype(np.float32)
    assert (np.abs(dequantized(made) - weight) <= 0.5001 * step).all()


@pytest.mark.parametrize("columns", [1, 7, 63, 64, 65, 200])
@pytest.mark.parametrize("group", [None, 32, 0])
@pytest.mark.parametrize("symmetric", [None, True])
def test_int4_is_off_by_half_a_step(columns, group, symmetric):
    weight = normal(9, columns) * 0.02 + 0.01
    made = quantize(weight, bits=4, group_size=group, symmetric=symmetric)
    size = {None: 64, 32: 32, 0: 0}[group]
    groups = 1 if size == 0 else -(-columns // size)
    assert made.format == "int4" and made.group_size == size
    assert made.scales.shape == (9, groups) and (made.mins is None) == bool(symmetric)
    assert made.values.dtype == np.uint8 and made.values.max() <= 15
    index = np.arange(columns) // (size or columns)
    step = made.scales.astype(np.float32)[:, index]
    assert (np.abs(dequantized(made) - weight) <= 0.5001 * step + 1e-7).all()


def test_int4_minimum_far_from_zero_stays_in_range():
    weight = 100 + normal(4, 64) * 0.01
    made = quantize(weight, bits=4)
    # f16 has steps of 1/16 there: the minimum goes down by up to one, the scale makes room.
    assert (np.abs(dequantized(made) - weight) <= 0.5001 * made.scales.astype(np.float32)).all()


def test_int4_keeps_embedding_and_head_in_int8():
    formats = {"embed": "int8", "head": "int8", "qkv": "int4", "mlp_down": "int4"}
    for kind, format in formats.items():
        made = quantize(normal(8, 64), kind)
        assert made.format == format
        assert made.group_size == (0 if format == "int8" else 64)


def test_constant_and_zero_rows():
    weight = np.array([[0.0] * 64, [0.5] * 64, [-0.25] * 64])
    assert (dequantized(quantize(weight, bits=4)) == weight).all()
    assert np.allclose(dequantized(quantize(weight, bits=8)), weight, rtol=1e-3, atol=0)
    symmetric = dequantized(quantize(weight, bits=4, symmetric=True))
    assert np.allclose(symmetric, weight, rtol=0.07)


def test_tiny_values_use_subnormal_scales_without_cutting_off():
    weight = normal(4, 64) * 1e-6
    for bits in (4, 8):
        made = quantize(weight, bits=bits)
        step = made.scales.astype(np.float32)
        assert (np.abs(dequantized(made) - weight) <= 0.5001 * step + 1e-7).all()


@pytest.mark.parametrize("factor", [1e5, 1e7, 1e30, 3e38])
def test_huge_values_are_refused_by_name(factor):
    weight = np.clip(normal(4, 64), -1, 1) * np.float32(factor)
    for changes in ({"bits": 4}, {"bits": 4, "symmetric": True}, {"bits": 8}):
        try:
            made = quantize(weight, **changes)
        except ModelError as error:
            assert "m holds weights so large" in str(error) and "quantizer='none'" in str(error)
        else:
            assert np.isfinite(dequantized(made)).all()
            assert np.abs(dequantized(made) - weight).max() <= 0.08 * factor
    assert factor < 1e6 or pytest.raises(ModelError, quantize, weight, bits=4)


def test_not_finite_names_the_place():
    weight = normal(5, 70)
    weight[3, 66] = np.nan
    with pytest.raises(ModelError, match=r"m holds nan \(row 3, column 66\)"):
        quantize(weight)
    weight[3, 66] = np.float32(3e38)
    weight[3, 67] = np.float32(3e38)  # the sum overflows float32, the entries are finite
    made = Unquantized(needs()).quantize(LinearShape("m", "qkv", 5, 70), weight)
    assert made.format == "f32" and (made.values == weight).all()


def test_options():
    assert not quantize(normal(4, 64), extra={"int8_activations": False}).int8_activations
    assert quantize(normal(4, 64), bits=8, group_size=32).scales.shape == (4, 2)
    for changes, reason in [
        ({"bits": 3}, "4 or 8 bits"),
        ({"group_size": 12}, "multiple of 8"),
        ({"group_size": -8}, "multiple of 8"),
        ({"bits": 8, "symmetric": False}, "int8 is symmetric"),
    ]:
        assert reason in RoundToNearest.supports(needs(**changes))
    assert "4 bits" in Unquantized.supports(needs(bits=4))
    assert "not 'f16'" in Unquantized.supports(needs(dtype="f16"))
