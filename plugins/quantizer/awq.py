"""``awq``: input channels that matter are scaled up before rounding; then ranges are clipped."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from pyllmlite.core.weights import LinearShape, LinearWeight
from pyllmlite.hooks.quantizer import InputStatistics, QuantizerNeeds
from pyllmlite_plugins.quantizer.calibrated import CalibratedQuantizer
from pyllmlite_plugins.quantizer.grid import Grid, extreme_grid, group_blocks, packed, searched_grid

if TYPE_CHECKING:
    import torch

STEPS = 20  # alphas 0, 0.05, ...: the paper's grid
LEAST = 1e-4


class AWQ(CalibratedQuantizer):
    """AWQ (Lin et al. 2023): columns are multiplied by ``s = mean|x|^alpha``, inputs divided by it.

    ``alpha`` is searched for the least error of the outputs, ``tr(E G E^T)`` on the Gram matrix of
    the inputs: the tokens themselves are not needed again.  Then the range of each row and group is
    shrunk step by step, likewise.  Matrices that share their input (q, k, v; gate, up) are one, so
    they share ``s``.  ``1/s`` is returned as ``input_scale``; who walks through the model folds it
    into the op before.

    Options (``extra``): ``alpha_steps`` (20), ``clip`` (true).
    """

    name = "awq"

    def __init__(self, needs: QuantizerNeeds) -> None:
        super().__init__(needs)
        self.steps = int(self.number("alpha_steps", STEPS, 1, 1000))
        self.clip = self.flag("clip", True)

    def calibrated(
        self,
        shape: LinearShape,
        weight: torch.Tensor,
        gram: torch.Tensor,
        statistics: InputStatistics,
    ) -> LinearWeight:
        size = self.group_of(weight.shape[1])
        scale = search_scale(weight, gram, statistics, self.bits, size, self.symmetric, self.steps)
        scaled, inner = weight * scale, gram / scale.outer(scale)
        grid = self.grid(scaled, inner, size)
        made = packed(shape, grid, grid.round(scaled), self.int8_activations)
        return with_input_scale(made, scale)

    def grid(self, weight: torch.Tensor, gram: torch.Tensor, size: int) -> Grid:
        if not self.clip:
            return extreme_grid(weight, self.bits, size, self.symmetric)
        blocks = group_blocks(gram, size)
        return searched_grid(weight, self.bits, size, self.symmetric, blocks, refine=False)


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
) -> torch.Tensor:
    """The scales ``mean|x|^alpha``, with their largest and least around 1, that cost least.

    Returns:
        float32 ``[in]``; ones where none is better than none.
    """
    import torch

    magnitude = torch.from_numpy(statistics.mean_magnitude).float()
    if statistics.shared is not None:
        shared = torch.from_numpy(statistics.shared.astype(np.int64))
        count = int(shared.max()) + 1
        sums = torch.zeros(count).index_add_(0, shared, magnitude)
        magnitude = (sums / torch.bincount(shared, minlength=count).clamp_(min=1))[shared]
    matrix = gram.float()
    best, best_cost = torch.ones_like(magnitude), float("inf")
    for step in range(steps):
        scale = magnitude.pow(step / steps).clamp_(min=LEAST)
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
