"""``awq``: input channels that matter are scaled up before rounding; then ranges are clipped."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pyllmlite.core.weights import LinearShape, LinearWeight
from pyllmlite.hooks.quantizer import InputStatistics, QuantizerNeeds
from pyllmlite_plugins.quantizer.calibrated import CalibratedQuantizer
from pyllmlite_plugins.quantizer.grid import (
    Grid,
    extreme_grid,
    group_blocks,
    grouped,
    packed,
    searched_grid,
)

if TYPE_CHECKING:
    import torch

STEPS = 20  # alphas 0, 0.05, ...: the paper's grid
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

    Returns:
        float32 ``[in]``; ones where none is better than none.
    """
    import torch

    shared = statistics.shared
    columns = torch.arange(weight.shape[1]) if shared is None else torch.from_numpy(shared).long()
    inputs = _means(torch.from_numpy(statistics.mean_magnitude).float(), columns)
    alphas = [step / steps for step in range(steps)]
    tried = [inputs.pow(alpha) for alpha in alphas]
    if duo:
        weights = _means(_relative_magnitude(weight, group_size), columns)
        tried += [inputs.pow(alpha) / (weights.pow(1 - alpha) + LEAST) for alpha in alphas]
    matrix = gram.float()
    best, best_cost = torch.ones(weight.shape[1]), float("inf")
    for made in tried:
        # Taken apart only here: powers of equal numbers may differ from lane to lane.
        scale = made.clamp(min=LEAST)[columns]
        scale = scale / (scale.max() * scale.min()).sqrt()
        if not bool(torch.isfinite(scale).all()):
            continue
        scaled = weight * scale
        grid = extreme_grid(scaled, bits, group_size, symmetric)
        error = grid.values(grid.round(scaled)).div_(scale).sub_(weight)
        cost = float(((error @ matrix) * error).sum(dtype=torch.float64))
        if cost < best_cost:
            best, best_cost = scale, cost
    return best


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
