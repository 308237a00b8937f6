"""Plans of bits: what is measured, and how a budget is spent."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tiny_models import TINY  # noqa: E402

from pyllmlite.compress.bits import measure_sensitivity, plan_bits, rounded, spend  # noqa: E402
from pyllmlite.compress.layered_model import LayeredModel  # noqa: E402
from pyllmlite.compress.layerwise import (  # noqa: E402
    MethodSettings,
    get_weight,
    quantize_layers,
    set_weight,
)
from pyllmlite.core.errors import ConfigError  # noqa: E402
from pyllmlite.hooks.registry import Registry  # noqa: E402
from pyllmlite.model.source import open_checkpoint  # noqa: E402

SETTINGS = MethodSettings("gptq", group_size=16)


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices are tiny: threads would wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

@pytest.fixture(scope="module", params=["llama", "bloom"])
def source(request, tmp_path_factory):
    return open_checkpoint(TINY[request.param](tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(3, 331, (3, 40)).astype(np.int32)


@pytest.fixture(scope="module")
def measured(source, tokens):
    return measure_sensitivity(source, tokens)


def test_sensitivity_is_the_divergence_that_one_matrix_costs(source, tokens, measured):
    sensitivity, shapes = measured
    assert len(sensitivity) == 12 and sensitivity.keys() == shapes.keys()
    full = LayeredModel(source).fill()
    ids = torch.from_numpy(tokens[:2].astype(np.int64))
    with torch.no_grad():
        wanted = full(ids).logits.log_softmax(-1)
        model = LayeredModel(source)
        other = model.fill()
        stage = model.layout.stages[2]
        for module in stage.modules:
            weight = get_weight(model.layers[1], module)
            set_weight(model.layers[1], module, rounded(weight))
        found = other(ids).logits.log_softmax(-1)
    expected = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert sensitivity[f"layers.1.{stage.kind}"] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_a_budget_is_kept_and_used(source, measured):
    sensitivity, shapes = measured
    total = sum(s.out_features * s.in_features for s in shapes.values())
    largest = max(s.out_features * s.in_features for s in shapes.values())
    losses = []
    for budget in (5.3, 6.0, 7.0, 9.5):
        plan, bits = spend(
            source, SETTINGS, budget, (4, 8), sensitivity, shapes, Registry.load()
        )
        assert bits <= budget and set(plan.values()) <= {4, 8} and plan.keys() == shapes.keys()
        if budget < 9:
            assert bits > budget - 4 * largest / total
        else:
            assert set(plan.values()) == {8}
        losses.append(sum(sensitivity[n] for n, b in plan.items() if b == 4))
    assert losses == sorted(losses, reverse=True)


def test_bits_go_where_they_save_most():
    from pyllmlite.compress.bits import _steps

    sizes, costs = {"m": 100}, {b: {"m": b + 0.25} for b in (3, 4, 8)}
    steps = _steps("m", 3, (3, 4, 8), {"m": 1.0}, costs, sizes)
    assert [s[3] for s in steps] == [4, 8]  # the first bit saves most
    assert steps[0][4] == pytest.approx(100)


def test_three_bits_where_four_are_too_many(source, tokens):
    made = plan_bits(source, SETTINGS, tokens, 5.0, choices=(3, 4, 8))
    assert made.bits <= 5.0 and 3 in made.plan.values()
    results = list(
        quantize_layers(source, MethodSettings("gptq", group_size=16, plan=made.plan), tokens)
    )
    assert len(results) == 3


def test_refusals(source, measured):
    sensitivity, shapes = measured
    with pytest.raises(ConfigError, match="budget of 4 bits per weight is less than the 5.25"):
        spend(source, SETTINGS, 4, (4, 8), sensitivity, shapes, Registry.load())
    with pytest.raises(ConfigError, match="different numbers"):
        spend(source, SETTINGS, 6, (4, 4), sensitivity, shapes, Registry.load())


def test_range_of_normal_values():
    """From the table of d2 in statistical quality control."""
    from pyllmlite.compress.bits import _normal_range

    for count, expected in ((2, 1.128), (5, 2.326), (10, 3.078), (25, 3.931)):
        assert _normal_range(count) == pytest.approx(expected, abs=1e-3)


def test_groups_are_chosen_where_none_are_asked_for(source, tokens, measured, monkeypatch):
    """Where all weights feel rounding alike, smaller groups are the better way to spend bits;
    where the budget does not pay for them, they are not taken."""
    shapes = measured[1]
    alike = {name: float(s.out_features * s.in_features) for name, s in shapes.items()}
    monkeypatch.setattr("pyllmlite.compress.bits.GROUPS", (32, 16))
    monkeypatch.setattr(
        "pyllmlite.compress.bits.measure_sensitivity", lambda *_: (alike, shapes)
    )
    found = {}
    for budget in (4.9, 6.0):
        made = plan_bits(source, MethodSettings("gptq"), tokens, budget)
        found[budget] = made.group_size
        assert made.bits <= budget
    assert found == {4.9: 32, 6.0: 16}
    assert plan_bits(source, SETTINGS, tokens, 6.0).group_size is None
