"""Bits where they buy the most: a plan of bits for a budget.

How much a fused matrix feels its rounding is measured: it alone is rounded, the model runs on some
calibration tokens, and the KL divergence of its predictions to the float model's is taken.  While
losses are small they add up, and each falls by 4 a bit (the error's square), so the best plan under
a budget is found by giving bits to the matrix where a bit saves most, again and again.  Smaller
groups are another way to spend bits, on all matrices alike: they are taken where less is lost so.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllmlite.compress.layered_model import LayeredModel
from pyllmlite.compress.layerwise import MethodSettings, Quantizers, get_weight, set_weight
from pyllmlite.core.errors import ConfigError
from pyllmlite.core.weights import LinearShape
from pyllmlite.hooks.registry import Registry

if TYPE_CHECKING:
    import torch

    from pyllmlite.model.source import ModelSource

PROBE_BITS = 4  # what matrices are rounded to when their sensitivity is measured
PROBE_GROUP = 64
PROBE_TOKENS = 512
GROUPS = (64, 32)  # tried where no group size was asked for


@dataclass(frozen=True)
class BitPlan:
    """Plain data, to be stored beside the model.

    Attributes:
        plan: Fused matrix (``layers.3.qkv``) to its bits: ``MethodSettings.plan``.
        bits: Mean bits per weight of these matrices, scales and zero points included.
        sensitivity: Fused matrix to the KL divergence, in nats per token, that rounding it alone
            to 4 bits costs.
        group_size: Of the matrices of 4 bits and fewer; None: as it was asked for.
    """

    plan: dict[str, int]
    bits: float
    sensitivity: dict[str, float]
    group_size: int | None = None


def plan_bits(
    source: ModelSource,
    settings: MethodSettings,
    tokens: np.ndarray,
    budget: float,
    choices: Sequence[int] = (4, 8),
    registry: Registry | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> BitPlan:
    """Measure every matrix, then spend ``budget`` bits per weight (embedding and head apart).

    Args:
        settings: The method that the plan is for; its ``bits`` and ``plan`` do not count.
        tokens: Calibration tokens ``[sequences, length]``; about 512 of them are used.
        choices: Bits that a matrix may get.
        progress: Called with (matrices measured, matrices in all).
    Raises:
        ConfigError: The budget is less than the fewest bits cost.
    """
    registry = registry or Registry.load()
    sensitivity, shapes = measure_sensitivity(source, tokens, progress)
    given = settings.group_size
    widest = max(shape.in_features for shape in shapes.values())
    groups: list[int | None] = [given]
    if given is None:
        groups = [size for size in GROUPS if size <= widest] or [None]
    made: list[BitPlan] = []
    losses: list[float] = []
    refused: ConfigError | None = None
    for size in groups:
        asked = replace(settings, group_size=size)
        try:
            plan, bits = spend(source, asked, budget, choices, sensitivity, shapes, registry)
        except ConfigError as error:  # smaller groups cost too much
            refused = refused or error
            continue
        made.append(BitPlan(plan, bits, sensitivity, size if given is None else None))
        losses.append(
            sum(sensitivity[name] * _loss_factor(plan[name], size or widest) for name in plan)
        )
    if not made:
        assert refused is not None
        raise refused
    return made[losses.index(min(losses))]


def spend(
    source: ModelSource,
    settings: MethodSettings,
    budget: float,
    choices: Sequence[int],
    sensitivity: Mapping[str, float],
    shapes: Mapping[str, LinearShape],
    registry: Registry,
) -> tuple[dict[str, int], float]:
    """The plan of least loss within the budget, and its mean bits per weight."""
    if not choices or len(set(choices)) != len(choices):
        raise ConfigError(f"choices of bits must be different numbers, got {list(choices)}")
    options = sorted(choices)
    costs: dict[int, dict[str, float]] = {}
    for bits in options:
        # The base in which the settings' group size and symmetry count is that of 4 bits and less.
        base = MethodSettings(
            settings.quantizer,
            None if bits == 8 else bits,
            settings.group_size,
            settings.symmetric,
            dict.fromkeys(shapes, bits),
            settings.extra,
            settings.integer_zeros,
        )
        quantizers = Quantizers(source, base, registry)
        costs[bits] = {
            name: quantizers.of(name).bits_per_weight(shape) for name, shape in shapes.items()
        }
    sizes = {name: shape.out_features * shape.in_features for name, shape in shapes.items()}
    total = sum(sizes.values())
    spent = sum(sizes[name] * costs[options[0]][name] for name in shapes)
    if spent > budget * total * (1 + 1e-9):
        raise ConfigError(
            f"a budget of {budget:g} bits per weight is less than the {spent / total:.2f} that "
            f"{options[0]} bits take with their scales; raise it, or allow fewer bits"
        )
    plan = dict.fromkeys(shapes, options[0])
    heap = [step for name in shapes for step in _steps(name, options[0], options, sensitivity,
                                                       costs, sizes)]  # fmt: skip
    heapq.heapify(heap)
    while heap:
        _, name, start, bits, price = heapq.heappop(heap)
        if plan[name] != start or spent + price > budget * total:
            continue
        plan[name] = bits
        spent += price
        for step in _steps(name, bits, options, sensitivity, costs, sizes):
            heapq.heappush(heap, step)
    return plan, spent / total


def _steps(
    name: str,
    start: int,
    options: Iterable[int],
    sensitivity: Mapping[str, float],
    costs: Mapping[int, Mapping[str, float]],
    sizes: Mapping[str, int],
) -> list[tuple[float, str, int, int, float]]:
    """Ways to give a matrix more bits, the one that saves most a bit first: (-saving a bit, name,
    from, to, price in bits)."""
    found = []
    for bits in options:
        price = sizes[name] * (costs[bits][name] - costs[start][name])
        if bits > start and price > 0:
            saving = sensitivity[name] * (_loss_factor(start) - _loss_factor(bits))
            found.append((-saving / price, name, start, bits, price))
    return sorted(found)


def _loss_factor(bits: int, group_size: int = PROBE_GROUP) -> float:
    """Loss at so many bits, and columns of a group, over that at the probe's: the square of the
    step."""
    steps = (2**PROBE_BITS - 1) / (2**bits - 1)
    return (steps * _normal_range(group_size) / _normal_range(PROBE_GROUP)) ** 2


@lru_cache
def _normal_range(count: int) -> float:
    """The mean range of so many normal values: the integral of ``1 - F^n - (1 - F)^n``."""
    width, normal = 0.01, NormalDist()
    below = [normal.cdf(i * width) for i in range(-800, 801)]
    return sum(1 - f**count - (1 - f) ** count for f in below) * width


def measure_sensitivity(
    source: ModelSource,
    tokens: np.ndarray,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, float], dict[str, LinearShape]]:
    """KL divergence in nats per token that rounding each fused matrix alone to 4 bits costs, and
    the matrices' shapes."""
    import torch

    model = LayeredModel(source)
    full = model.fill()
    ids = torch.from_numpy(_probe(tokens).astype(np.int64))
    stages = model.layout.stages
    shapes: dict[str, LinearShape] = {}
    sensitivity: dict[str, float] = {}
    with torch.no_grad():
        reference, hidden = _trace(model, full, ids)
        for index, layer in enumerate(model.layers):
            for stage in stages:
                name = f"layers.{index}.{stage.kind}"
                kept = [get_weight(layer, module) for module in stage.modules]
                rows = sum(len(weight) for weight in kept)
                gated = stage.kind == "gate_up"
                shapes[name] = LinearShape(name, stage.kind, rows, kept[0].shape[1], gated)
                for module, weight in zip(stage.modules, kept, strict=True):
                    set_weight(layer, module, rounded(weight))
                other = _from_layer(model, full, ids, index, hidden[index])
                sensitivity[name] = _divergence(reference, other)
                for module, weight in zip(stage.modules, kept, strict=True):
                    set_weight(layer, module, weight)
                if progress is not None:
                    progress(len(sensitivity), len(model.layers) * len(stages))
    return sensitivity, shapes


def _probe(tokens: np.ndarray) -> np.ndarray:
    """Some of the calibration tokens: the beginnings of two sequences."""
    sequences = tokens[:2]
    return sequences[:, : max(2, PROBE_TOKENS // len(sequences))]


def rounded(weight: np.ndarray) -> np.ndarray:
    """To the nearest of 16 evenly spaced values between least and greatest of 64 columns."""
    rows, columns = weight.shape
    short = -columns % PROBE_GROUP
    groups = np.pad(weight, ((0, 0), (0, short)), mode="edge").reshape(rows, -1, PROBE_GROUP)
    low = groups.min(axis=2, keepdims=True)
    step = (groups.max(axis=2, keepdims=True) - low) / (2**PROBE_BITS - 1)
    step[step == 0] = 1
    made = np.rint((groups - low) / step) * step + low
    return np.ascontiguousarray(made.reshape(rows, -1)[:, :columns], np.float32)


def _trace(
    model: LayeredModel, full: Any, ids: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probabilities, and the hidden states before every layer."""
    hidden: list[torch.Tensor] = []

    def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0] if args else kwargs["hidden_states"])

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in model.layers]
    try:
        logits = full(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits.log_softmax(dim=-1), hidden


def _from_layer(
    model: LayeredModel,
    full: Any,
    ids: torch.Tensor,
    index: int,
    hidden: torch.Tensor,
) -> torch.Tensor:
    """Log-probabilities when layer ``index`` begins with ``hidden``; those before do not run."""
    given = (hidden, None) if model.returns_tuple else hidden

    def give(*args: Any, **kwargs: Any) -> Any:
        return given

    for layer in model.layers[:index]:
        layer.forward = give
    try:
        return full(input_ids=ids, use_cache=False).logits.log_softmax(dim=-1)
    finally:
        for layer in model.layers[:index]:
            del layer.forward


def _divergence(reference: torch.Tensor, other: torch.Tensor) -> float:
    return float((reference.exp() * (reference - other)).sum(dim=-1).mean())
