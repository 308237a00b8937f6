"""``awq``: input channels that matter are scaled up before rounding; then ranges are clipped."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pyllmlite.core.weights import LinearShape, LinearWeight
from pyllmlite.hooks.quantizer import InputStatistics, QuantizerNeeds
from pyllmlite_plugins.quantizer.calibrated import CalibratedQuantizer
from pyllmlite_plugins.quantizer.grid import (
    ROWS,
    Grid,
    extreme_grid,
    extreme_range,
    group_blocks,
    grouped,
    packed,
    rounding_error,
    searched_grid,
)

if TYPE_CHECKING:
    import torch

STEPS = 20  # alphas 0, 0.05, ...: the paper's grid
COARSE = 4  # of these alphas every fourth is tried first
LEAST = 1e-4


class AWQ(CalibratedQuantizer):
    """AWQ (Lin et al. 2023): columns are multiplied by ``s = mean|x|^alpha``, inputs divided by it.

    ``alpha`` is searched for the least error of the outputs, ``tr(E G E^T)`` on the Gram matrix of
    the inputs: the tokens themselves are not needed again.  ``duo_scaling``: the same number of
    ``mean|x|^alpha / mean|w|^(1 - alpha)`` is tried too, as AutoAWQ does, with ``|w|`` relative to
    the largest of its group.  Then (``clip``) the range of each row and group is shrunk step by
    step, and its scale and zero point moved a little, likewise.  Matrices that share their input
    (q, k, v; gate, up) are one, so they share ``s``.  ``1/s`` is returned as ``input_scale``; who
    walks through the model folds it into the op before.

    Options (``extra``): ``alpha_steps`` (20), ``duo_scaling`` (true), ``clip`` (true).
    """

    name = "awq"

    def __init__(self, needs: QuantizerNeeds) -> None:
        super().__init__(needs)
        self.steps = int(self.number("alpha_steps", STEPS, 1, 1000))
        self.duo = self.flag("duo_scaling", True)
        self.clip = self.flag("clip", True)

    def calibrated(
        self,
        shape: LinearShape,
        weight: torch.Tensor,
        gram: torch.Tensor,
        statistics: InputStatistics,
    ) -> LinearWeight:
        size = self.group_of(weight.shape[1])
        scale = search_scale(
            weight, gram, statistics, self.bits, size, self.symmetric, self.steps, self.duo
        )
        scaled, inner = weight * scale, gram / scale.outer(scale)
        grid = self.grid(scaled, inner, size)
        made = packed(shape, grid, grid.round(scaled), self.int8_activations)
        return with_input_scale(made, scale)

    def grid(self, weight: torch.Tensor, gram: torch.Tensor, size: int) -> Grid:
        if not self.clip:
            return extreme_grid(weight, self.bits, size, self.symmetric)
        return searched_grid(weight, self.bits, size, self.symmetric, group_blocks(gram, size))


def with_input_scale(made: LinearWeight, scale: torch.Tensor) -> LinearWeight:
    """A matrix whose columns were multiplied by ``scale``; as it is where they were not."""
    if bool((scale == 1).all()):
        return made
    return replace(made, input_scale=(1 / scale).float().numpy().astype(np.float32))


def search_scale(
    weight: torch.Tensor,
    gram: torch.Tensor,
    statistics: InputStatistics,
    bits: int,
    group_size: int,
    symmetric: bool,
    steps: int,
    duo: bool = True,
) -> torch.Tensor:
    """The scales, with their largest and least around 1, that cost least: ``mean|x|^alpha``, and
    with ``duo`` ``mean|x|^alpha / mean|w|^(1 - alpha)`` as well.

    The cost is smooth in alpha, so of its ``steps`` values only every fourth is tried, then those
    around the best, nearer and nearer.

    Returns:
        float32 ``[in]``; ones where none is better than none.
    """
    import torch

    shared = statistics.shared
    columns = torch.arange(weight.shape[1]) if shared is None else torch.from_numpy(shared).long()
    inputs = _means(torch.from_numpy(statistics.mean_magnitude).float(), columns)
    weights = _means(_relative_magnitude(weight, group_size), columns) if duo else None
    matrix = gram.float()

    def scale_of(alpha: float, by_weight: bool) -> torch.Tensor:
        made = inputs.pow(alpha)
        if by_weight:
            assert weights is not None
            made = made / (weights.pow(1 - alpha) + LEAST)
        # Taken apart only here: powers of equal numbers may differ from lane to lane.
        scale = made.clamp(min=LEAST)[columns]
        return scale / (scale.max() * scale.min()).sqrt()

    best, best_cost = torch.ones(weight.shape[1]), float("inf")
    for by_weight in (False, True) if duo else (False,):
        seen: dict[int, float] = {}
        stride, wanted = COARSE, list(range(0, steps, COARSE))
        while stride:
            wanted = [step for step in wanted if 0 <= step < steps and step not in seen]
            scales = [scale_of(step / steps, by_weight) for step in wanted]
            for step, scale, cost in zip(
                wanted,
                scales,
                scaled_costs(weight, matrix, scales, bits, group_size, symmetric),
                strict=True,
            ):
                seen[step] = cost
                if cost < best_cost:
                    best, best_cost = scale, cost
            middle = min(seen, key=lambda step: seen[step])
            stride //= 2
            wanted = [middle - stride, middle + stride]
    return best


def scaled_costs(
    weight: torch.Tensor,
    gram: torch.Tensor,
    scales: list[torch.Tensor],
    bits: int,
    group_size: int,
    symmetric: bool,
) -> list[float]:
    """``tr(E G E^T)`` of a matrix that is rounded with each of these scales on its columns;
    infinite for scales that are not finite.  Some rows at a time, so that they stay near the
    cache."""
    import torch

    costs = [0.0 if bool(torch.isfinite(scale).all()) else float("inf") for scale in scales]
    for rows in torch.split(weight, ROWS):
        scaled = torch.empty_like(rows)
        for number, scale in enumerate(scales):
            if costs[number] == float("inf"):
                continue
            torch.mul(rows, scale, out=scaled)
            groups = grouped(scaled, group_size)
            wide, zero = extreme_range(groups, bits, symmetric)
            error = rounding_error(groups, wide, zero, (1 << bits) - 1)
            error = error.reshape(len(rows), -1)[:, : weight.shape[1]].div_(scale)
            costs[number] += float((error @ gram).mul_(error).sum(dim=1).sum(dtype=torch.float64))
    return costs


def _relative_magnitude(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """``[in]``: the mean of ``|w|`` over the rows, each relative to the largest of its group."""
    groups = grouped(weight.abs(), group_size)
    relative = groups / groups.amax(dim=2, keepdim=True).clamp_(min=1e-30)
    return relative.mean(dim=0).reshape(-1)[: weight.shape[1]]


def _means(values: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Means of the values ``[in]`` whose number in ``columns`` is the same, by that number."""
    import torch

    count = int(columns.max()) + 1 if len(columns) else 0
    sums = torch.zeros(count).index_add_(0, columns, values)
    return sums / torch.bincount(columns, minlength=count).clamp_(min=1)
