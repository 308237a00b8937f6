"""NF4, FP4 and LLM.int8() beside their papers' formulas and beside bitsandbytes' own outputs.

``bitsandbytes_outputs.npz`` holds what bitsandbytes 0.50.2 made on a CPU of random float16
matrices: ``quantize_4bit`` of ``x`` (nf4, fp4) and, with double quantization, of ``y``;
``int8_vectorwise_quant`` of ``x``.
"""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from pyllmlite.core.errors import ConfigError, ModelError
from pyllmlite.core.weights import LinearShape, LinearWeight
from pyllmlite.hooks.quantizer import QuantizerNeeds
from pyllmlite_plugins.quantizer.int8 import LLMInt8, int8_rows
from pyllmlite_plugins.quantizer.nf4 import (
    CODEBOOKS,
    DYNAMIC,
    NormalFloat4,
    codes_of,
    doubly_quantized,
    dynamic_codes,
)

STORED = dict(np.load(Path(__file__).parent / "bitsandbytes_outputs.npz"))


def needs(**changes):
    return QuantizerNeeds(**({"device": "cpu", "dtype": "f32", "shapes": ()} | changes))


def quantize(cls, weight, kind="qkv", **changes):
    weight = np.asarray(weight, np.float32)
    return cls(needs(**changes)).quantize(LinearShape("m", kind, *weight.shape), weight)


def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def nearest_by_hand(weight, codebook, size):
    """Each block by itself, each value against all sixteen."""
    rows, columns = weight.shape
    codes, scales = np.zeros(weight.shape, int), np.zeros((rows, -(-columns // size)), np.float32)
    for r in range(rows):
        for g, start in enumerate(range(0, columns, size)):
            block = weight[r, start : start + size].astype(np.float64)
            scales[r, g] = np.abs(block).max()
            for i, value in enumerate(block):
                codes[r, start + i] = np.argmin(np.abs(codebook * float(scales[r, g]) - value))
    return codes, scales


@pytest.mark.parametrize("kind", CODEBOOKS)
@pytest.mark.parametrize("columns,group", [(64, 64), (200, 64), (7, 0), (96, 32)])
def test_codes_are_the_nearest_values(kind, columns, group):
    weight, codebook = normal(6, columns), CODEBOOKS[kind]
    codes, scales = codes_of(weight, codebook, group)
    want, want_scales = nearest_by_hand(weight, codebook.astype(np.float64), group or columns)
    np.testing.assert_array_equal(scales, want_scales)
    # FP4 has two zeros: equal values count, not equal codes.
    np.testing.assert_array_equal(codebook[codes], codebook[want])


@pytest.mark.parametrize("kind", CODEBOOKS)
def test_codes_and_absmax_are_bitsandbytes_own(kind):
    codes, scales = codes_of(STORED["x"].astype(np.float32), CODEBOOKS[kind], 64)
    np.testing.assert_array_equal(codes, STORED[kind])
    np.testing.assert_array_equal(scales.reshape(-1), STORED[kind + "_absmax"])


def test_double_quantization_is_bitsandbytes_own():
    _, scales = codes_of(STORED["y"].astype(np.float32), CODEBOOKS["nf4"], 64)
    flat = scales.reshape(-1)
    mean = np.float32(flat.mean(dtype=np.float64))
    codes, outer = dynamic_codes(flat - mean)
    np.testing.assert_array_equal(codes, STORED["nested_absmax"])
    np.testing.assert_allclose(mean, STORED["nested_offset"], rtol=1e-6)
    np.testing.assert_allclose(outer, STORED["nested_outer"], rtol=1e-5)
    np.testing.assert_allclose(DYNAMIC, STORED["nested_map"], rtol=2e-7)
    theirs = STORED["nested_map"][STORED["nested_absmax"]]
    theirs = theirs * np.repeat(STORED["nested_outer"], 256)[: flat.size] + STORED["nested_offset"]
    np.testing.assert_allclose(doubly_quantized(scales).reshape(-1), theirs, rtol=2e-6)


def test_int8_rows_are_bitsandbytes_own():
    codes, scales = int8_rows(STORED["x"].astype(np.float32))
    np.testing.assert_array_equal(codes, STORED["int8"])
    np.testing.assert_allclose(scales[:, 0] * 127, STORED["scb"], rtol=1e-6)


def test_nf4_is_made_of_normal_quantiles():
    """QLoRA, section 3: quantiles of N(0, 1) for each sign, scaled so that the ends are 1."""
    edge, inverse = 0.9677083, NormalDist().inv_cdf
    positive = [inverse(p) for p in np.linspace(edge, 0.5, 9)[:-1]]
    negative = [-inverse(p) for p in np.linspace(edge, 0.5, 8)[:-1]]
    values = np.sort([*positive, 0.0, *negative]) / max(positive)
    np.testing.assert_allclose(CODEBOOKS["nf4"], values, atol=2e-6)


def test_dynamic_map_is_symmetric_but_for_the_one():
    assert DYNAMIC.size == 256 and (np.diff(DYNAMIC) > 0).all()
    assert DYNAMIC[-1] == 1 and (DYNAMIC == 0).sum() == 1
    np.testing.assert_array_equal(DYNAMIC[:127], -DYNAMIC[128:255][::-1])


def test_what_nf4_makes():
    made = quantize(NormalFloat4, normal(16, 256))
    assert (made.format, made.group_size, made.scales.dtype) == ("codebook4", 64, np.float16)
    assert not made.int8_activations and made.mins is None
    fp4 = quantize(NormalFloat4, normal(16, 256), extra={"kind": "fp4"}, group_size=32)
    assert fp4.group_size == 32 and np.array_equal(fp4.codebook, CODEBOOKS["fp4"])
    double = quantize(NormalFloat4, normal(16, 256), extra={"double_quant": True})
    assert np.array_equal(double.values, made.values)
    near = double.scales.astype(np.float32) / made.scales.astype(np.float32)
    assert 0.97 < near.min() < near.max() < 1.03 and not np.array_equal(double.scales, made.scales)
    for kind in ("embed", "head"):
        assert quantize(NormalFloat4, normal(4, 64), kind).format == "int8"
    bits = NormalFloat4(needs()).bits_per_weight
    assert bits(LinearShape("m", "qkv", 16, 256)) == 4.25
    assert bits(LinearShape("m", "head", 16, 256)) == 8.125


def test_what_int8_makes():
    made = quantize(LLMInt8, normal(16, 200))
    assert made.format == "int8" and made.values.min() >= -127
    assert (np.abs(made.values).max(axis=1) == 127).all()
    assert made.int8_activations and made.activation_group == 64 and made.outlier_threshold == 6
    assert quantize(LLMInt8, normal(2, 9), extra={"activation_group": 0}).activation_group == -1
    error = np.abs(made.float32() - normal(16, 200))
    assert (error <= 0.5001 * made.scales).all()
    for kind in ("embed", "head"):
        assert quantize(LLMInt8, normal(4, 64), kind).format == "bf16"
    bits = LLMInt8(needs()).bits_per_weight
    assert bits(LinearShape("m", "qkv", 16, 256)) == 8.125
    assert bits(LinearShape("m", "head", 16, 256)) == 16
    other = quantize(LLMInt8, normal(2, 9), extra={"outlier_threshold": 4})
    assert other.outlier_threshold == 4


def test_what_is_kept():
    shape = LinearShape("m", "qkv", 4, 64)
    codes = np.zeros((4, 64), np.int8)
    plain = LinearWeight("int8", codes, np.ones((4, 1), np.float16))
    kept = LLMInt8(needs()).keep(shape, plain)
    assert kept.values is codes and kept.outlier_threshold == 6 and kept.activation_group == 64
    grouped = LinearWeight("int8", codes, np.ones((4, 2), np.float16), None, 32)
    assert LLMInt8(needs()).keep(shape, grouped) is None
    nf4 = quantize(NormalFloat4, normal(4, 64))
    assert NormalFloat4(needs()).keep(shape, nf4) is nf4
    assert NormalFloat4(needs(extra={"kind": "fp4"})).keep(shape, nf4) is None
    assert NormalFloat4(needs()).keep(shape, plain) is None


def test_refusals():
    for cls, changes, reason in [
        (LLMInt8, {"bits": 4}, "8 bits, not 4"),
        (LLMInt8, {"group_size": 64}, "whole rows"),
        (LLMInt8, {"symmetric": False}, "symmetric"),
        (NormalFloat4, {"bits": 8}, "4 bits, not 8"),
        (NormalFloat4, {"group_size": 12}, "multiple of 8"),
        (NormalFloat4, {"symmetric": True}, "not evenly spaced"),
    ]:
        assert reason in cls.supports(needs(**changes))
    for cls, extra, reason in [
        (LLMInt8, {"outlier_threshold": "six"}, "outlier_threshold must be a number"),
        (LLMInt8, {"outlier_threshold": 0}, "outlier_threshold must be a number above 0"),
        (LLMInt8, {"outlier_threshold": True}, "outlier_threshold must be a number above 0"),
        (LLMInt8, {"activation_group": 12}, "activation_group must be a multiple of 8"),
        (LLMInt8, {"activation_group": -8}, "activation_group must be a multiple of 8"),
        (NormalFloat4, {"kind": "nf5"}, "kind must be one of nf4, fp4"),
    ]:
        with pytest.raises(ConfigError, match=reason):
            cls(needs(extra=extra))
    with pytest.raises(ModelError, match="m holds weights so large"):
        quantize(NormalFloat4, normal(2, 64) * 1e6)
    huge = quantize(LLMInt8, normal(2, 64) * np.float32(1e37))
    assert np.isfinite(huge.scales).all() and np.abs(huge.values).max() == 127
