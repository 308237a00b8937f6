"""Weights of other tools through the linear op: codebooks, float32 scales, integer zero points,
LLM.int8()'s outliers; against NumPy in double precision."""

from __future__ import annotations

import numpy as np
import pytest

from pyllmlite import _native
from pyllmlite.core.weights import LinearWeight


@pytest.fixture(params=_native.info()["available"], autouse=True)
def isa(request):
    before = _native.info()["isa"]
    _native.set_isa(request.param)
    yield request.param
    _native.set_isa(before)


def packed(weight: LinearWeight, gated: bool = False):
    points = weight.zero_points
    if points is not None:
        points = points.astype(weight.scales.dtype)
    return _native.PackedLinear(
        weight.format, weight.values, weight.scales, weight.mins, weight.group_size, gated,
        zero_points=points, codebook=weight.codebook,
    )  # fmt: skip


def run(op, x, columns, threads=2, out=None):
    out = np.zeros((len(x), columns), np.float32) if out is None else out
    _native.run_op(op, [x, out], None, threads)
    return out


def random_weight(rng, fmt, n, k, group, wide=False, points=False, mins=False) -> LinearWeight:
    groups = -(-k // (group or k))
    low, high = (-128, 128) if fmt == "int8" else (0, 16)
    codes = rng.integers(low, high, (n, k)).astype(np.int8 if fmt == "int8" else np.uint8)
    dtype = np.float32 if wide else np.float16
    return LinearWeight(
        fmt,
        codes,
        rng.uniform(0.01, 0.05, (n, groups)).astype(dtype),
        rng.uniform(-0.5, 0.5, (n, groups)).astype(dtype) if mins else None,
        group,
        zero_points=rng.integers(low, high, (n, groups)).astype(np.int16) if points else None,
        codebook=np.sort(rng.uniform(-1, 1, 16)).astype(np.float32)
        if fmt == "codebook4"
        else None,
    )


CASES = [
    ("codebook4", 64, {}),
    ("codebook4", 8, {"wide": True}),
    ("codebook4", 0, {"wide": True}),
    ("int4", 32, {"points": True}),
    ("int4", 128, {"wide": True}),
    ("int4", 32, {"wide": True, "mins": True}),
    ("int8", 0, {"wide": True}),
    ("int8", 32, {"points": True, "wide": True}),
]


@pytest.mark.parametrize("rows", [1, 3, 17, 100])
@pytest.mark.parametrize("fmt,group,options", CASES)
def test_product(fmt, group, options, rows):
    rng = np.random.default_rng(rows)
    n, k = 83, 203
    weight = random_weight(rng, fmt, n, k, group, **options)
    matrix = packed(weight)
    np.testing.assert_array_equal(matrix.unpack(), weight.float32())
    x = rng.standard_normal((rows, k)).astype(np.float32)
    want = x.astype(np.float64) @ weight.float32().astype(np.float64).T
    near = np.abs(x).astype(np.float64) @ (np.abs(weight.float32()) + 0.5).T
    assert (np.abs(run(_native.linear(matrix), x, n) - want) <= 3e-6 * near + 1e-5).all()
    alone = run(_native.linear(matrix), x[-1:].copy(), n, threads=1)
    together = run(_native.linear(matrix), x, n)
    assert np.array_equal(alone[0].view(np.uint32), together[-1].view(np.uint32))


def to_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize("rows", [1, 4, 13, 100])
@pytest.mark.parametrize("k", [1, 6, 203, 600])
@pytest.mark.parametrize("fmt,group,options", CASES)
def test_product_of_bf16_rows(fmt, group, options, k, rows):
    """Rows and codebook are rounded, codes, scales and sums are not."""
    rng = np.random.default_rng(rows + k)
    n = 83
    weight = random_weight(rng, fmt, n, k, group, **options)
    op = _native.linear(packed(weight), bf16_activations=True)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    if weight.codebook is not None:
        weight.codebook = to_bf16(weight.codebook)
    y, values = to_bf16(x).astype(np.float64), weight.float32().astype(np.float64)
    got = run(op, x, n)
    near = np.abs(y) @ (np.abs(values) + 0.5).T
    assert (np.abs(got - y @ values.T) <= 3e-6 * near + 1e-5).all()
    for r in (0, rows - 1):
        op = _native.linear(packed(weight), bf16_activations=True)
        alone = run(op, x[r : r + 1].copy(), n, 1)
        assert np.array_equal(alone[0].view(np.uint32), got[r].view(np.uint32))


def test_bf16_rows_are_those_of_bf16_weights():
    """Codes that are the weights themselves give what the bf16 format gives."""
    rng = np.random.default_rng(3)
    codes = rng.integers(-128, 128, (40, 256)).astype(np.int8)
    x = rng.standard_normal((9, 256)).astype(np.float32)
    scales = np.ones((40, 1), np.float16)
    coded = _native.PackedLinear("int8", codes, scales)
    plain = _native.PackedLinear("bf16", codes.astype(np.float32))
    got = run(_native.linear(coded, bf16_activations=True), x, 40)
    np.testing.assert_allclose(got, run(_native.linear(plain), x, 40), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("fmt,group,options", [case for case in CASES if case[0] != "codebook4"])
def test_product_of_int8_rows(fmt, group, options):
    rng = np.random.default_rng(5)
    n, k = 40, 256
    weight = random_weight(rng, fmt, n, k, group, **options)
    x = rng.standard_normal((5, k)).astype(np.float32)
    op = _native.linear(packed(weight), int8_activations=True, activation_group=k)
    scale = np.abs(x).max(axis=1, keepdims=True) / 127
    rounded = np.rint(x / scale) * scale
    want = rounded.astype(np.float64) @ weight.float32().astype(np.float64).T
    np.testing.assert_allclose(run(op, x, n), want, rtol=1e-4, atol=2e-3)


def test_embedding_rows_of_every_format():
    rng = np.random.default_rng(6)
    for fmt, group, options in CASES:
        weight = random_weight(rng, fmt, 40, 72, group, **options)
        program = _native.Program(4, 1, _native.ThreadPool(1))
        out = program.add_buffer("out", "tokens", 72)
        program.add_op(_native.embed(packed(weight), scale=2.0), [out], "embed")
        program.finish()
        batch = _native.Batch(1, 8, 4, 1, 40, 0, [(16, np.zeros((1, 1), np.int32))])
        batch.token_table[0, :3] = [39, 0, 17]
        batch.set_step([0], [0], [3], [0])
        program.run(batch)
        np.testing.assert_array_equal(program.buffer(out)[:3], 2 * weight.float32()[[39, 0, 17]])


def llm_int8(x: np.ndarray, weight: LinearWeight, threshold: float) -> np.ndarray:
    """Dettmers et al. 2022, section 3, row by row, in double precision."""
    out = np.zeros((len(x), weight.shape[0]))
    values = weight.float32().astype(np.float64)
    for r, row in enumerate(x):
        large = np.abs(row) > threshold
        rest = np.where(large, 0, row)
        scale = np.float32(np.abs(rest).max()) / np.float32(127)
        codes = np.rint(rest * (np.float32(127) / np.abs(rest).max())) if scale else rest
        out[r] = values @ (codes * np.float64(scale)) + values[:, large] @ row[large]
    return out


@pytest.mark.parametrize("rows", [1, 6, 70])
@pytest.mark.parametrize("wide", [False, True])
def test_outliers_stay_floats(rows, wide):
    rng = np.random.default_rng(7)
    n, k = 50, 203
    weight = random_weight(rng, "int8", n, k, 0, wide=wide)
    x = rng.standard_normal((rows, k)).astype(np.float32)
    x[0, [0, 77, 202]] = [61.5, -7.25, 300.0]
    x[rows // 2, ::3] *= 50  # many of them
    x[rows - 1, 5] = 6.0  # at the threshold: none
    op = _native.linear(
        packed(weight), int8_activations=True, activation_group=k, outlier_threshold=6.0
    )
    want = llm_int8(x, weight, 6.0)
    np.testing.assert_allclose(run(op, x, n), want, rtol=2e-5, atol=2e-3)


@pytest.mark.parametrize("count", [100, 101, 102, 203])
def test_more_outliers_than_are_listed(count):
    """Half of 203 columns are listed, more stand densely: the same sums in the same order."""
    rng = np.random.default_rng(8)
    n, k = 33, 203
    weight = random_weight(rng, "int8", n, k, 0, wide=True)
    x = rng.uniform(-1, 1, (4, k)).astype(np.float32)
    x[2, :count] = 10 + np.arange(count)
    op = _native.linear(
        packed(weight), int8_activations=True, activation_group=k, outlier_threshold=6.0
    )
    np.testing.assert_allclose(run(op, x, n), llm_int8(x, weight, 6.0), rtol=1e-5, atol=2e-3)


def test_no_row_feels_anothers_outliers():
    rng = np.random.default_rng(9)
    n, k = 48, 96
    weight = packed(random_weight(rng, "int8", n, k, 0, wide=True))
    settings = {"int8_activations": True, "activation_group": k, "outlier_threshold": 6.0}
    x = rng.standard_normal((65, k)).astype(np.float32)
    x[::7, 3] = 60
    x[64] *= 100
    together = run(_native.linear(weight, **settings), x, n)
    for r in (0, 1, 7, 63, 64):
        alone = run(_native.linear(weight, **settings), x[r : r + 1].copy(), n, threads=1)
        assert np.array_equal(alone[0].view(np.uint32), together[r].view(np.uint32))
    x[7, 3], x[14, 50] = np.inf, np.nan
    spoilt = run(_native.linear(weight, **settings), x, n)
    assert not np.isfinite(spoilt[[7, 14]]).any()
    keep = [r for r in range(65) if r not in (7, 14)]
    assert np.array_equal(spoilt[keep], together[keep])


def test_gate_and_up_as_two_ops():
    rng = np.random.default_rng(10)
    n, k = 37, 64
    gate = random_weight(rng, "int4", n, k, 32)
    up = random_weight(rng, "codebook4", n, k, 64)
    x = rng.standard_normal((9, k)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    out = run(_native.linear(packed(gate), activation="silu"), x, n)
    out = run(_native.linear(packed(up), bias=bias, multiply=True), x, n, out=out)
    z = x.astype(np.float64) @ gate.float32().T
    want = z / (1 + np.exp(-z)) * (x.astype(np.float64) @ up.float32().T + bias)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)


def test_refusals():
    rng = np.random.default_rng(11)
    plain = packed(random_weight(rng, "int4", 16, 64, 32))
    grouped = packed(random_weight(rng, "int8", 16, 64, 32))
    codes = packed(random_weight(rng, "codebook4", 16, 64, 32))
    for matrix in (plain, grouped, codes):
        with pytest.raises(ValueError, match="outliers need"):
            _native.linear(matrix, int8_activations=True, outlier_threshold=6.0)
    with pytest.raises(ValueError, match="int8 or int4 weight"):
        _native.linear(codes, int8_activations=True)
    with pytest.raises(ValueError, match="exclude int8"):
        _native.linear(plain, int8_activations=True, bf16_activations=True)
    with pytest.raises(ValueError, match="bf16 activations need"):
        floats = _native.PackedLinear("f32", np.zeros((16, 64), np.float32))
        _native.linear(floats, bf16_activations=True)
    with pytest.raises(ValueError, match="exclude each other"):
        _native.linear(plain, residual=True, multiply=True)
    values, scales = np.zeros((16, 64), np.uint8), np.ones((16, 2), np.float16)
    with pytest.raises(ValueError, match="needs a codebook of 16"):
        _native.PackedLinear("codebook4", values, scales, group_size=32)
    with pytest.raises(ValueError, match="no other format, needs a codebook"):
        _native.PackedLinear("int4", values, scales, group_size=32, codebook=np.zeros(16))
    with pytest.raises(ValueError, match="zero_points must be float16"):
        _native.PackedLinear(
            "int4", values, scales, group_size=32, zero_points=np.ones((16, 2), np.float32)
        )


def test_parts_of_a_row_in_ops_of_their_own():
    rng = np.random.default_rng(12)
    weights = [random_weight(rng, "int4", n, 40, 8) for n in (21, 5, 14)]
    program = _native.Program(70, 1, _native.ThreadPool(2))
    x, out = program.add_buffer("x", "tokens", 40), program.add_buffer("out", "tokens", 41)
    first = 1
    for weight in weights:
        n = weight.shape[0]
        view = program.column_view("part", out, first, n)
        program.add_op(_native.linear(packed(weight)), [x, view], "part")
        first += n
    inner = program.column_view("inner", view, 2, 3)
    with pytest.raises(ValueError, match="columns 40 to 42 of 41"):
        program.column_view("wide", out, 40, 2)
    program.finish()
    program.buffer(x)[:] = rng.standard_normal((70, 40))
    program.buffer(out)[:] = 7
    batch = _native.Batch(1, 128, 70, 1, 9, 0, [(16, np.zeros((1, 8), np.int32))])
    batch.set_step([0], [0], [70], [0])
    program.run(batch)
    want = np.concatenate([program.buffer(x) @ weight.float32().T for weight in weights], axis=1)
    np.testing.assert_allclose(program.buffer(out)[:, 1:], want, rtol=1e-4, atol=1e-4)
    assert (program.buffer(out)[:, 0] == 7).all()
    np.testing.assert_array_equal(program.buffer(inner), program.buffer(out)[:, 29:32])
