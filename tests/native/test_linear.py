"""The linear and embedding ops through the bindings, against NumPy in double precision."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pyllmlite import _native

# format, group_size, mins, int8 activations
FORMATS = [
    ("f32", 0, False, False),
    ("bf16", 0, False, False),
    ("int8", 0, False, False),
    ("int8", 0, False, True),
    ("int8", 32, True, True),
    ("int4", 32, False, False),
    ("int4", 64, True, False),
    ("int4", 64, False, True),
    ("int4", 32, True, True),
]


@pytest.fixture(params=_native.info()["available"], autouse=True)
def isa(request):
    before = _native.info()["isa"]
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


def to_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def make_weight(rng, fmt, n, k, group, with_mins, gated=False):
    """A packed matrix and its exact values, float64 [n, k]."""
    if fmt in ("f32", "bf16"):
        values = rng.standard_normal((n, k)).astype(np.float32)
        packed = _native.PackedLinear(fmt, values, gated=gated)
        return packed, (to_bf16(values) if fmt == "bf16" else values).astype(np.float64)
    size = group or k
    groups = -(-k // size)
    codes = (
        rng.integers(-128, 128, (n, k)).astype(np.int8)
        if fmt == "int8"
        else rng.integers(0, 16, (n, k)).astype(np.uint8)
    )
    scales = rng.uniform(0.01, 0.05, (n, groups)).astype(np.float16)
    mins = rng.uniform(-0.5, 0.5, (n, groups)).astype(np.float16) if with_mins else None
    packed = _native.PackedLinear(fmt, codes, scales, mins, group_size=group, gated=gated)
    column = np.arange(k) // size
    low = mins if with_mins else (-8 * scales if fmt == "int4" else np.zeros_like(scales))
    values = scales.astype(np.float64)[:, column] * codes + low.astype(np.float64)[:, column]
    return packed, values


def quantized_rows(x: np.ndarray, group: int) -> np.ndarray:
    """What the op multiplies: rows rounded to int8 per group, as float64."""
    out = np.empty(x.shape, np.float64)
    for begin in range(0, x.shape[1], group):
        part = x[:, begin : begin + group].astype(np.float32)
        amax = np.abs(part).max(axis=1, keepdims=True)
        codes = np.rint(part * (np.float32(127) / amax))
        out[:, begin : begin + group] = codes * (amax / np.float32(127)).astype(np.float64)
    return out


def seen_by_op(x: np.ndarray, fmt: str, group: int, int8: bool) -> np.ndarray:
    if int8:
        return quantized_rows(x, 32 if group % 32 == 0 else group)
    return to_bf16(x).astype(np.float64) if fmt == "bf16" else x.astype(np.float64)


def close(got: np.ndarray, want: np.ndarray, scale: np.ndarray) -> None:
    assert np.all(np.abs(got - want) <= 3e-6 * scale + 1e-5)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("fmt,group,mins,int8", FORMATS)
def test_product(fmt, group, mins, int8, rows):
    rng = np.random.default_rng(0)
    n, k = 70, 200
    packed, values = make_weight(rng, fmt, n, k, group, mins)
    assert packed.shape == (n, k)
    np.testing.assert_allclose(packed.unpack(), values, rtol=1e-6, atol=1e-7)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    out = np.zeros((rows, n), np.float32)
    _native.run_op(_native.linear(packed, int8_activations=int8), [x, out], None, 2)
    y = seen_by_op(x, fmt, group, int8)
    close(out, y @ values.T, np.abs(y) @ (np.abs(values) + 0.5).T)


@pytest.mark.parametrize("fmt,group,mins,int8", FORMATS)
def test_rows_do_not_feel_their_neighbours(fmt, group, mins, int8):
    rng = np.random.default_rng(1)
    packed, _ = make_weight(rng, fmt, 48, 96, group, mins)
    x = rng.standard_normal((33, 96)).astype(np.float32)
    op_args = {"int8_activations": int8, "norm": _native.NormArgs("rms", 1e-6)}
    together = np.zeros((33, 48), np.float32)
    _native.run_op(_native.linear(packed, **op_args), [x, together], None, 2)
    for first, last in [(0, 1), (7, 9), (20, 33), (32, 33)]:
        alone = np.zeros((last - first, 48), np.float32)
        _native.run_op(_native.linear(packed, **op_args), [x[first:last].copy(), alone], None, 1)
        assert np.array_equal(alone.view(np.uint32), together[first:last].view(np.uint32))


@pytest.mark.parametrize("k,group", [(2048, 2048), (1090, 1090), (2000, 40), (2112, 48)])
@pytest.mark.parametrize("fmt,mins", [("int8", False), ("int4", True)])
def test_long_rows_are_walked_through_in_blocks(fmt, mins, k, group):
    """Blocks of columns, which begin where many rows meet a tile, end with whole pairs of segments
    whatever the activation group is."""
    rng = np.random.default_rng(2)
    packed, values = make_weight(rng, fmt, 32, k, 0, mins)
    x = rng.standard_normal((40, k)).astype(np.float32)
    op = _native.linear(packed, int8_activations=True, activation_group=group)
    together, alone = np.zeros((40, 32), np.float32), np.zeros((1, 32), np.float32)
    _native.run_op(op, [x, together], None, 2)
    y = quantized_rows(x, group)
    close(together, y @ values.T, np.abs(y) @ (np.abs(values) + 0.5).T)
    op = _native.linear(packed, int8_activations=True, activation_group=group)
    _native.run_op(op, [x[7:8].copy(), alone], None, 1)
    assert np.array_equal(alone[0].view(np.uint32), together[7].view(np.uint32))


def norm_of(x: np.ndarray, kind: str, eps: float, weight, bias) -> np.ndarray:
    x = x.astype(np.float64)
    if kind == "layer":
        x = x - x.mean(axis=1, keepdims=True)
    y = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps) * weight
    return y if bias is None else y + bias


ACTIVATIONS = {
    "none": lambda x: x,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": np.vectorize(lambda x: 0.5 * x * math.erfc(-x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_gated_epilogue(activation, kind):
    rng = np.random.default_rng(2)
    rows, n, k = 6, 52, 65
    packed, values = make_weight(rng, "f32", n, k, 0, False, gated=True)
    weight, bias, offset = (rng.standard_normal(m).astype(np.float32) for m in (k, n, k))
    x = (3 * rng.standard_normal((rows, k))).astype(np.float32)
    out = rng.standard_normal((rows, n // 2)).astype(np.float32)
    before = out.astype(np.float64)
    norm = _native.NormArgs(kind, 1e-5, weight, offset if kind == "layer" else None)
    op = _native.linear(
        packed,
        norm,
        bias=bias,
        activation=activation,
        gated=True,
        residual=True,
        output_scale=0.5,
    )
    _native.run_op(op, [x, out], None, 1)
    z = norm_of(x, kind, 1e-5, weight, offset if kind == "layer" else None) @ values.T * 0.5 + bias
    want = before + ACTIVATIONS[activation](z[:, : n // 2]) * z[:, n // 2 :]
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-4)


def test_permutation_scale_and_softcap():
    rng = np.random.default_rng(3)
    n, k = 17, 96
    packed, values = make_weight(rng, "int4", n, k, 32, True)
    x = rng.standard_normal((3, k)).astype(np.float32)
    permutation = rng.permutation(k).astype(np.int32)
    scale = rng.uniform(0.5, 2, k).astype(np.float32)
    out = np.zeros((3, n), np.float32)
    op = _native.linear(packed, input_permutation=permutation, input_scale=scale, softcap=4.0)
    _native.run_op(op, [x, out], None, 1)
    y = (x * scale).astype(np.float64)[:, permutation]
    np.testing.assert_allclose(out, 4 * np.tanh(y @ values.T / 4), rtol=1e-5, atol=2e-5)


def test_int8_rows_cost_little_accuracy():
    """Against the plain product: a row's int8 step is amax / 254 at most, per group of 64."""
    rng = np.random.default_rng(4)
    packed, values = make_weight(rng, "int8", 64, 512, 0, False)
    x = rng.standard_normal((8, 512)).astype(np.float32)
    out = np.zeros((8, 64), np.float32)
    _native.run_op(_native.linear(packed, int8_activations=True), [x, out], None, 1)
    want = x.astype(np.float64) @ values.T
    assert np.linalg.norm(out - want) / np.linalg.norm(want) < 0.01


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("fmt,group,mins,int8", FORMATS)
def test_a_spoilt_row_spoils_no_other(fmt, group, mins, int8, bad):
    rng = np.random.default_rng(5)
    packed, _ = make_weight(rng, fmt, 32, 64, group, mins)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    clean, out = np.zeros((2, 5, 32), np.float32)
    _native.run_op(_native.linear(packed, int8_activations=int8), [x, clean], None, 1)
    x[2, 3] = bad
    _native.run_op(_native.linear(packed, int8_activations=int8), [x, out], None, 1)
    assert not np.isfinite(out[2]).any()
    keep = [0, 1, 3, 4]
    assert np.array_equal(out[keep], clean[keep])


def test_refusals():
    rng = np.random.default_rng(6)
    with pytest.raises(ValueError, match="multiple of 8"):
        make_weight(rng, "int4", 16, 100, 12, False)
    with pytest.raises(ValueError, match="even"):
        make_weight(rng, "f32", 15, 8, 0, False, gated=True)
    packed, _ = make_weight(rng, "int4", 16, 96, 32, False)
    with pytest.raises(ValueError, match="divide"):
        _native.linear(packed, int8_activations=True, activation_group=48)
    plain, _ = make_weight(rng, "f32", 16, 96, 0, False)
    with pytest.raises(ValueError, match="int8 or int4 weight"):
        _native.linear(plain, int8_activations=True)
