"""Fake quantization beside plain NumPy, beside the packed kernels' reader, and its gradients beside
autograd through the same formula in float64."""

import numpy as np
import pytest
import torch

from pyllmlite.compress.learn.fake_quant import (
    FakeQuant,
    FakeQuantLinear,
    float16_scale,
)
from pyllmlite.core.errors import ConfigError, ModelError
from pyllmlite.core.weights import LinearShape, LinearWeight
from pyllmlite.hooks.quantizer import QuantizerNeeds
from pyllmlite_plugins.quantizer.grid import extreme_grid, half, packed
from pyllmlite_plugins.quantizer.rtn import RoundToNearest


def rtn(weight, bits, group_size, symmetric):
    """A start as the quantizers make it, 3 bits in int4 too."""
    shape = LinearShape("layers.0.qkv", "qkv", *weight.shape)
    columns = weight.shape[1]
    if bits == 8:
        needs = QuantizerNeeds("cpu", "f32", (shape,), 8, group_size, True)
        return RoundToNearest(needs).quantize(shape, weight)
    wide = torch.from_numpy(weight)
    grid = extreme_grid(wide, bits, min(group_size or columns, columns), symmetric)
    return packed(shape, grid, grid.round(wide), False)


def matrix(rows=7, columns=72, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


FORMATS = [
    (bits, group, symmetric)
    for bits in (3, 4, 8)
    for group in (32, 64, 128, 0)
    for symmetric in (True, False)
    if symmetric or bits != 8
]


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), FORMATS)
def test_starts_as_the_quantizer_left_it_and_comes_out_as_it_is(bits, group_size, symmetric):
    weight = matrix(columns=200)  # 32, 64 and 128 do not divide it
    made = rtn(weight, bits, group_size, symmetric)
    quant = FakeQuant(made, weight, bits)
    assert np.array_equal(quant().detach().numpy(), made.float32())
    out = quant.linear_weight()
    assert np.array_equal(out.values, made.values) and np.array_equal(out.scales, made.scales)
    assert out.format == made.format and out.group_size == made.group_size
    assert (out.zero_points is None) == (made.zero_points is None)


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), FORMATS)
def test_trained_values_are_those_of_the_packed_kernel(bits, group_size, symmetric):
    from pyllmlite.runtime.native import native

    weight = matrix(rows=48, columns=136)
    quant = FakeQuant(rtn(weight, bits, group_size, symmetric), weight, bits)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        quant.latent += torch.randn(quant.latent.shape, generator=generator)
        quant.ratio += 0.1 * torch.randn(quant.ratio.shape, generator=generator)
    graph = quant().detach().numpy()
    out = quant.linear_weight()
    assert np.array_equal(graph, out.float32())
    assert 0 <= out.values.view(np.uint8).min() or out.format == "int8"
    if out.format == "int4":
        assert out.values.max() < 1 << bits
    points = None if out.zero_points is None else out.zero_points.astype(np.float16)
    linear = native().PackedLinear(
        out.format, out.values, out.scales, None, group_size=out.group_size, zero_points=points
    )
    assert np.allclose(linear.unpack(), graph, rtol=0, atol=1e-7)


def test_latent_weights_lean_to_the_weights_they_came_from():
    weight = matrix()
    made = rtn(weight, 4, 64, False)
    made.values[0, 0] = min(made.values[0, 0] + 2, 15)  # as GPTQ may: another than the nearest
    quant = FakeQuant(made, weight, 4)
    assert np.array_equal(quant().detach().numpy(), made.float32())
    zero = np.repeat(made.zero_points, 64, axis=1)[:, :72]
    scale = np.repeat(made.scales.astype(np.float32), 64, axis=1)[:, :72]
    middle = made.values.astype(np.float32) - zero
    away = weight / scale - middle
    inside = np.clip(away, -0.5, 0.5)
    inside[0, 0] = np.sign(away[0, 0]) * max(1 - abs(away[0, 0]), 0)  # mirrored at the edge
    lean = quant.latent.detach().numpy() - middle
    assert np.abs(lean).max() < 0.5 and 0.2 < np.abs(lean[1:]).mean() < 0.3  # spread over the cells
    rest = slice(1, None)  # the first row's own cut-off weights aside
    kept = np.abs(away[rest]) <= 0.5
    assert kept.mean() > 0.95
    assert np.allclose(lean[rest][kept], 0.98 * inside[rest][kept], atol=1e-4)
    assert lean[0, 0] == pytest.approx(0.98 * inside[0, 0], abs=1e-4)
    assert np.array_equal(FakeQuant(made, None, 4).latent.detach().numpy(), middle)


def composed(latent, ratio, start, zero, low, high, group):
    """The same formula out of pieces that autograd knows, roundings as identities."""

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, rounded):
            return rounded.clone()

        @staticmethod
        def backward(ctx, slope):
            return slope, None

    scale = start * ratio
    scale = Identity.apply(scale, float16_scale(scale))
    x = latent * start[:, group] / scale[:, group]
    level = Identity.apply(x, x.round()) + zero[:, group]
    code = torch.where((level < low) | (level > high), level.clamp(low, high).detach(), level)
    return scale[:, group] * (code - zero[:, group])


@pytest.mark.parametrize("columns", [8, 20, 33])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradients_in_float64(columns, symmetric):
    rng = np.random.default_rng(columns)
    weight = rng.standard_normal((5, columns)).astype(np.float32)
    quant = FakeQuant(rtn(weight, 3, 16, symmetric), weight, 3).double()
    with torch.no_grad():
        quant.latent += torch.from_numpy(rng.standard_normal((5, columns)) * 1.5)
        quant.ratio *= torch.from_numpy(rng.uniform(0.8, 1.25, quant.ratio.shape))
    probe = torch.from_numpy(rng.standard_normal((5, columns)))
    group = torch.arange(columns) // quant.group_size
    ours, theirs = quant(), composed(
        quant.latent, quant.ratio, quant.start, quant.zero, *quant.limits, group
    )
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-14)
    loss = [(out * probe).sum() + (out**2).sum() for out in (ours, theirs)]
    found = [torch.autograd.grad(one, (quant.latent, quant.ratio)) for one in loss]
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    outside = (found[0][0] == 0).sum()
    assert 0 < outside < found[0][0].numel()  # both sides of the range were there


def test_the_slope_by_the_scale_is_lsqs():
    """Esser et al. 2020, equation 3, for one weight at a time, by hand."""
    made = LinearWeight("int4", np.array([[8, 9, 15, 0]], np.uint8), np.array([[0.5]], np.float16))
    quant = FakeQuant(made).double()
    with torch.no_grad():
        quant.latent.copy_(torch.tensor([[0.25, 1.4, 9.0, -30.0]], dtype=torch.float64))
    for i, expected in enumerate([0 - 0.25, 1 - 1.4, 7.0, -8.0]):
        (slope,) = torch.autograd.grad(quant()[0, i], quant.ratio)
        assert float(slope) == pytest.approx(0.5 * expected, abs=1e-12)


def test_scales_round_as_the_quantizers_round_them():
    scale = torch.tensor([1e-8, 3e-6, 6e-5, 0.013, 0.5003, 60000.0, 0.0])
    assert torch.equal(float16_scale(scale), half(scale))


def test_a_group_of_zeros_stays_one():
    weight = matrix(columns=64)
    weight[2] = 0
    quant = FakeQuant(rtn(weight, 4, 32, False), weight, 4)
    quant().sum().backward()
    assert torch.isfinite(quant.latent.grad).all() and torch.isfinite(quant.ratio.grad).all()
    assert not quant()[2].any() and not quant.linear_weight().float32()[2].any()


def test_a_scale_does_not_vanish():
    weight = matrix(columns=64)
    quant = FakeQuant(rtn(weight, 4, 64, True), weight, 4)
    with torch.no_grad():
        quant.ratio.fill_(-1.0)
    quant().sum().backward()
    assert not quant.ratio.grad.any()
    assert np.isfinite(quant.linear_weight().float32()).all()
    assert (quant.linear_weight().scales > 0).all()


def test_a_rounded_linear_equals_a_plain_one_of_the_same_values():
    weight = matrix(rows=6, columns=40)
    bias = torch.nn.Parameter(torch.arange(6.0))
    linear = FakeQuantLinear(FakeQuant(rtn(weight, 4, 32, False), weight, 4), bias)
    inputs = torch.from_numpy(matrix(rows=3, columns=40, seed=4))
    plain = torch.nn.functional.linear(inputs, linear.weight, bias)
    assert torch.equal(linear(inputs), plain)
    linear(inputs).sum().backward()
    assert linear.quant.latent.grad.any() and linear.quant.ratio.grad.any()


def test_what_cannot_be_trained_is_refused():
    weight = matrix()
    made = rtn(weight, 4, 32, False)
    with pytest.raises(ConfigError, match="no scales to train"):
        FakeQuant(LinearWeight("f32", weight))
    shape = LinearShape("x", "qkv", *weight.shape)
    minima = RoundToNearest(QuantizerNeeds("cpu", "f32", (shape,), 4, 32)).quantize(shape, weight)
    with pytest.raises(ConfigError, match="integer zero points"):
        FakeQuant(minima)
    made.input_permutation = np.arange(weight.shape[1], dtype=np.int32)
    with pytest.raises(ConfigError, match="permuted"):
        FakeQuant(made)
    with pytest.raises(ConfigError, match="3 bits"):
        FakeQuant(rtn(weight, 4, 32, False), weight, 3)


def test_a_diverged_matrix_is_refused_when_it_is_written():
    quant = FakeQuant(rtn(matrix(), 4, 32, False))
    with torch.no_grad():
        quant.latent[0, 0] = float("nan")
    with pytest.raises(ModelError, match="smaller learning rate"):
        quant.linear_weight()
