"""GPTQ, AWQ and their combination beside plain formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pyllmlite.core.errors import ConfigError, ModelError  # noqa: E402
from pyllmlite.core.weights import LinearShape  # noqa: E402
from pyllmlite.hooks.quantizer import InputStatistics, QuantizerNeeds  # noqa: E402
from pyllmlite.testing import QuantizerConformance  # noqa: E402
from pyllmlite_plugins.quantizer import feedback  # noqa: E402
from pyllmlite_plugins.quantizer.awq import AWQ, scaled_costs, search_scale  # noqa: E402
from pyllmlite_plugins.quantizer.awq_gptq import AWQGPTQ  # noqa: E402
from pyllmlite_plugins.quantizer.gptq import GPTQ  # noqa: E402
from pyllmlite_plugins.quantizer.grid import (  # noqa: E402
    Grid,
    extreme_grid,
    group_blocks,
    searched_grid,
)

METHODS = {"gptq": GPTQ, "awq": AWQ, "awq-gptq": AWQGPTQ}


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices are tiny: threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

def statistics(columns, tokens=400, seed=0, shared=None):
    """Correlated inputs, some channels much larger than the rest, one that is never seen."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((columns, columns)) * 0.3 / np.sqrt(columns) + np.eye(columns)
    inputs = rng.standard_normal((tokens, columns)) @ mix
    inputs *= np.exp(rng.standard_normal(columns))
    if columns > 4:
        inputs[:, 3] = 0
    gram = inputs.T @ inputs / tokens
    return InputStatistics(tokens, gram, np.abs(inputs).mean(axis=0).astype(np.float32), shared)


def normal(rows, columns, seed=1):
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * 0.05).astype(np.float32)


def make(name, **changes):
    arguments = {"device": "cpu", "dtype": "f32", "shapes": ()} | changes
    return METHODS[name](QuantizerNeeds(**arguments))


def error(weight, made, stats):
    difference = (made.float32() - weight).astype(np.float64)
    return float(np.trace(difference @ stats.gram @ difference.T))


def naive_gptq(weight, gram, bits, group, symmetric, act_order, damping=0.01):
    """Algorithm 1 of the paper in float64, column by column, with the inverse of the remaining
    Hessian computed anew for every column (equation 2); scales as the quantizer's: float16."""
    weight = weight.astype(np.float64).copy()
    rows, n = weight.shape
    hessian = gram.copy()
    seen = np.diag(hessian) > 0
    hessian[~seen, ~seen] = 1.0
    hessian += damping * np.diag(hessian).mean() * np.eye(n)
    top = 2**bits - 1
    groups = np.arange(n) // (group or n)
    order = np.argsort(-np.diag(gram), kind="stable") if act_order else np.arange(n)

    def grid(columns):
        low, high = np.minimum(columns.min(axis=1), 0), np.maximum(columns.max(axis=1), 0)
        if symmetric:
            scale = np.maximum(high, -low) / (top - (top + 1) // 2)
            return scale.astype(np.float16).astype(np.float64), (top + 1) // 2
        scale = ((high - low) / top).astype(np.float16).astype(np.float64)
        return scale, np.clip(np.rint(-low / scale), 0, top)

    static = {g: grid(weight[:, groups == g]) for g in range(groups.max() + 1)}
    made = np.empty_like(weight)
    for step, j in enumerate(order):
        left = order[step:]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        if not act_order and (step == 0 or groups[j] != groups[order[step - 1]]):
            static[groups[j]] = grid(weight[:, groups == groups[j]])
        scale, zero = static[groups[j]]
        codes = np.clip(np.rint(weight[:, j] / scale) + zero, 0, top)
        made[:, j] = (codes - zero) * scale
        weight[:, left] -= np.outer((weight[:, j] - made[:, j]) / inverse[0, 0], inverse[0])
    return made


@pytest.mark.parametrize(
    ("columns", "bits", "group", "symmetric", "act_order"),
    [
        (40, 4, 0, False, False),
        (150, 4, 64, False, True),
        (150, 4, 64, True, False),  # a group lies across the blocks of 128
        (144, 4, 48, False, False),
        (136, 3, 32, False, True),
        (30, 8, 8, True, True),
        (9, 2, 8, False, True),
        (1, 4, 8, False, True),
    ],
)
def test_gptq_as_the_paper_writes_it(columns, bits, group, symmetric, act_order):
    weight, stats = normal(12, columns), statistics(columns)
    made = make(
        "gptq", bits=bits, group_size=group, symmetric=symmetric, extra={"act_order": act_order}
    ).quantize(LinearShape("m", "qkv", *weight.shape), weight, stats)
    wanted = naive_gptq(weight, stats.gram, bits, group, symmetric, act_order)
    difference = wanted - weight
    best = float(np.trace(difference @ stats.gram @ difference.T))
    assert error(weight, made, stats) == pytest.approx(best, rel=2e-3, abs=1e-12)
    # A tie that float32 breaks the other way changes what follows in its row, no more.
    same = np.isclose(made.float32(), wanted, atol=1e-6).all(axis=1)
    assert same.mean() >= 0.75


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [64, 128, 0])
def test_better_than_rounding(name, symmetric, group):
    """Groups that do not divide the columns: the last is short."""
    weight, stats = normal(24, 200), statistics(200)
    made = make(name, group_size=group, symmetric=symmetric).quantize(
        LinearShape("m", "qkv", 24, 200), weight, stats
    )
    assert made.scales.shape == (24, 1 if group == 0 else -(-200 // group))
    size = group or 200
    grid = extreme_grid(torch.from_numpy(weight), 4, size, symmetric)
    plain = grid.values(grid.round(torch.from_numpy(weight))).numpy() - weight
    rounding = float(np.trace(plain @ stats.gram @ plain.T))
    assert error(weight, made, stats) < {"gptq": 0.8, "awq": 0.8, "awq-gptq": 0.6}[name] * rounding


@pytest.mark.parametrize(("bits", "format"), [(2, "int4"), (3, "int4"), (4, "int4"), (8, "int8")])
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_stand_for_the_grid(bits, format, symmetric):
    weight, stats = normal(8, 40), statistics(40)
    made = make("gptq", bits=bits, symmetric=symmetric, group_size=16).quantize(
        LinearShape("m", "qkv", 8, 40), weight, stats
    )
    assert made.format == format and made.mins is None
    levels = made.values.astype(int) + (128 if bits == 8 else 0)
    assert levels.min() >= 0 and levels.max() < 2**bits
    step = made.scales.astype(np.float32)[:, np.arange(40) // 16]
    assert (np.abs(made.float32() - weight) < 3 * step).all()  # feedback moves codes, not far
    assert (made.zero_points is None) == (symmetric and bits in (4, 8))


def test_descent_and_refitting_never_lose():
    weight, stats = torch.from_numpy(normal(16, 140)), statistics(140)
    gram = torch.from_numpy(stats.gram)
    grid = searched_grid(weight, 4, 64, False, group_blocks(gram, 64))
    codes = feedback.gptq(weight, gram, grid)
    last = None
    for _ in range(3):
        for step in ("descend", "refit"):
            if step == "descend":
                codes = feedback.descend(weight, gram, grid, codes)
            else:
                grid = feedback.refit_scales(weight, gram, grid, codes)
            now = float(feedback.output_error(weight, gram.float(), grid.values(codes)).sum())
            assert last is None or now <= last * 1.001
            last = now
    assert codes.min() >= 0 and codes.max() <= 15


def test_a_searched_range_costs_no_more_than_the_extremes():
    weight, stats = torch.from_numpy(normal(16, 100)), statistics(100)
    blocks = group_blocks(torch.from_numpy(stats.gram), 32)
    plain = extreme_grid(weight, 4, 32, False)
    for given in (None, blocks):
        found = searched_grid(weight, 4, 32, False, given)
        costs = []
        for grid in (plain, found):
            off = (grid.values(grid.round(weight)) - weight).numpy()
            off = np.pad(off, ((0, 0), (0, 28))).reshape(16, 4, 32)
            inner = np.eye(32)[None] if given is None else blocks.numpy()
            inner = np.broadcast_to(inner, (4, 32, 32))
            costs.append(np.einsum("rgi,gij,rgj->rg", off, inner, off))
        assert (costs[1] <= costs[0] * 1.0001 + 1e-9).all()
        assert costs[1].sum() < 0.9 * costs[0].sum()


def test_awq_scales_by_the_magnitude_of_inputs():
    weight, stats = normal(32, 96), statistics(96)
    made = make("awq", extra={"clip": False, "duo_scaling": False}).quantize(
        LinearShape("m", "qkv", 32, 96), weight, stats
    )
    assert made.input_scale is not None
    scale = np.log(1 / made.input_scale[stats.mean_magnitude > 0].astype(np.float64))
    magnitude = np.log(stats.mean_magnitude[stats.mean_magnitude > 0].astype(np.float64))
    slope, offset = np.polyfit(magnitude, scale, 1)
    assert 0.05 <= slope < 1 and np.abs(slope * 20 - round(slope * 20)) < 0.01
    assert np.abs(scale - slope * magnitude - offset).max() < 1e-4


def test_awq_scales_by_the_magnitude_of_weights_too():
    """``mean|x|^a / mean|w|^(1 - a)``, worked out by loops: taken where it costs less."""
    weight, stats = normal(48, 40), statistics(40)
    weight *= np.exp(np.random.default_rng(5).standard_normal(40) * 1.5).astype(np.float32)
    shape = LinearShape("m", "mlp_down", 48, 40)
    options = {"clip": False, "duo_scaling": False, "alpha_steps": 10}
    plain = make("awq", group_size=16, extra=options).quantize(shape, weight, stats)
    both = make("awq", group_size=16, extra=options | {"duo_scaling": True}).quantize(
        shape, weight, stats
    )
    assert error(weight, both, stats) < 0.95 * error(weight, plain, stats)
    relative = np.zeros(40)
    for column in range(40):
        group = slice(column // 16 * 16, min(column // 16 * 16 + 16, 40))
        for row in np.abs(weight).astype(np.float64):
            relative[column] += row[column] / row[group].max() / 48
    scale = 1 / both.input_scale.astype(np.float64)
    ways = []
    for alpha in np.arange(10) / 10:
        want = stats.mean_magnitude.astype(np.float64) ** alpha / (relative ** (1 - alpha) + 1e-4)
        want = np.maximum(want, 1e-4)
        ways.append(np.abs(scale / (want / np.sqrt(want.max() * want.min())) - 1).max())
    assert min(ways) < 1e-4


def test_costs_of_scales_are_those_of_the_rounded_matrix():
    """In float64, of the weights as they come out; rows in more than one block, a short group."""
    weight, stats = normal(530, 40), statistics(40)
    rng = np.random.default_rng(2)
    scales = [np.exp(rng.standard_normal(40) * 0.5).astype(np.float32) for _ in range(2)]
    scales.insert(1, np.full(40, np.inf, np.float32))
    found = scaled_costs(
        torch.from_numpy(weight), torch.from_numpy(stats.gram).float(),
        [torch.from_numpy(scale) for scale in scales], 4, 16, False,
    )  # fmt: skip
    assert found[1] == float("inf")
    for scale, cost in zip(scales[::2], found[::2], strict=True):
        scaled = torch.from_numpy(weight * scale)
        grid = extreme_grid(scaled, 4, 16, False)
        rounded = grid.values(grid.round(scaled)).double().numpy() / scale
        difference = rounded - weight
        assert cost == pytest.approx(np.trace(difference @ stats.gram @ difference.T), rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_the_coarse_search_finds_what_all_alphas_would(seed):
    weight, stats = normal(64, 96, seed), statistics(96, seed=seed)
    tensors = torch.from_numpy(weight), torch.from_numpy(stats.gram)
    best = search_scale(*tensors, stats, 4, 32, False, 20, duo=False)
    magnitude = torch.from_numpy(stats.mean_magnitude)
    scales = [best]
    for step in range(20):
        scale = magnitude.pow(step / 20).clamp(min=1e-4)
        scales.append(scale / (scale.max() * scale.min()).sqrt())
    cost, *every = scaled_costs(tensors[0], tensors[1].float(), scales, 4, 32, False)
    assert cost <= 1.02 * min(every)


def test_awq_gives_shared_inputs_one_scale():
    shared = np.repeat(np.arange(24).reshape(2, 12), 3, axis=0).reshape(-1)
    weight, stats = normal(32, 72), statistics(72, shared=shared)
    made = make("awq").quantize(LinearShape("m", "attn_out", 32, 72), weight, stats)
    assert made.input_scale is not None
    for number in range(24):
        assert len(set(made.input_scale[shared == number])) == 1


@pytest.mark.parametrize("name", METHODS)
def test_refusals(name):
    stats = statistics(16)
    shape = LinearShape("layers.2.qkv", "qkv", 4, 16)
    with pytest.raises(ModelError, match="needs calibration statistics for layers.2.qkv"):
        make(name).quantize(shape, normal(4, 16))
    with pytest.raises(ModelError, match=r"layers.2.qkv holds inf \(row 1, column 5\)"):
        weight = normal(4, 16)
        weight[1, 5] = np.inf
        make(name).quantize(shape, weight, stats)
    for changes, reason in [({"bits": 5}, "not 5"), ({"group_size": 12}, "multiple of 8")]:
        arguments = {"device": "cpu", "dtype": "f32", "shapes": ()} | changes
        assert reason in METHODS[name].supports(QuantizerNeeds(**arguments))


def test_options_are_checked():
    for extra in ({"damping": -1}, {"damping": "much"}, {"act_order": 1}, {"scale_rule": "best"}):
        with pytest.raises(ConfigError, match=next(iter(extra))):
            make("gptq", extra=extra)
    with pytest.raises(ConfigError, match="rounds"):
        make("awq-gptq", extra={"rounds": 1000})


def test_a_gram_matrix_without_rank():
    """Fewer tokens than inputs."""
    weight, stats = normal(8, 64), statistics(64, tokens=3)
    for name in METHODS:
        made = make(name).quantize(LinearShape("m", "qkv", 8, 64), weight, stats)
        assert np.isfinite(made.float32()).all()


def test_grids_of_zeros_stay_zeros():
    weight = torch.zeros(3, 20)
    grid = extreme_grid(weight, 4, 16, False)
    assert isinstance(grid, Grid) and (grid.values(grid.round(weight)) == 0).all()


class _Calibrated(QuantizerConformance):
    # Error feedback and clipping raise the weights' own error; the outputs' is what they lower.
    relative_error = {"int8": 0.02, "int4": 0.25}
    half_steps = 8.0
    shapes = ((1, 8), (16, 64), (33, 200), (5, 7), (24, 144))

    def calibration(self, weight):
        columns = weight.shape[1]
        mixed = np.random.default_rng(columns).standard_normal((16, columns))
        gram = np.eye(columns) + mixed.T @ mixed / 160
        return InputStatistics(1000, gram, np.sqrt(np.diag(gram)).astype(np.float32))


class TestGPTQ(_Calibrated):
    strategy = GPTQ


class TestAWQ(_Calibrated):
    strategy = AWQ


class TestAWQGPTQ(_Calibrated):
    strategy = AWQGPTQ
