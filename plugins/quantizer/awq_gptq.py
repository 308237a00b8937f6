"""``awq-gptq``: scales, searched grids and error feedback together: the best quality a bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyllmlite.core.weights import LinearShape, LinearWeight
from pyllmlite.hooks.quantizer import InputStatistics, QuantizerNeeds
from pyllmlite_plugins.quantizer import feedback
from pyllmlite_plugins.quantizer.awq import search_scale, with_input_scale
from pyllmlite_plugins.quantizer.calibrated import CalibratedQuantizer
from pyllmlite_plugins.quantizer.grid import group_blocks, packed, searched_grid

if TYPE_CHECKING:
    import torch


class AWQGPTQ(CalibratedQuantizer):
    """AWQ's scales and searched ranges, GPTQ's error feedback, then both once more.

    Input channels are scaled as :class:`~pyllmlite_plugins.quantizer.awq.AWQ` does; the grid of
    each row and group is searched for the least error of the outputs, in range, scale and zero
    point; columns are rounded with error feedback on these grids.  Then, ``rounds`` times, codes
    descend column by column over the whole matrix (QuantEase, Behdin et al. 2023), and all scales
    of a row are solved for with the codes as they are.

    Options (``extra``): ``damping`` (0.1), ``alpha_steps`` (20; 0: no input scales), ``rounds``
    (1).
    """

    name = "awq-gptq"

    def __init__(self, needs: QuantizerNeeds) -> None:
        super().__init__(needs)
        self.damping = self.number("damping", 0.1, 0.0, 10.0)
        self.steps = int(self.number("alpha_steps", 20, 0, 1000))
        self.rounds = int(self.number("rounds", 1, 0, 100))

    def calibrated(
        self,
        shape: LinearShape,
        weight: torch.Tensor,
        gram: torch.Tensor,
        statistics: InputStatistics,
    ) -> LinearWeight:
        import torch

        size = self.group_of(weight.shape[1])
        scale = torch.ones(weight.shape[1])
        if self.steps:
            scale = search_scale(
                weight, gram, statistics, self.bits, size, self.symmetric, self.steps
            )
        scaled, inner = weight * scale, gram / scale.outer(scale)
        blocks = group_blocks(inner, size)
        grid = searched_grid(scaled, self.bits, size, self.symmetric, blocks)
        order = torch.argsort(inner.diagonal(), descending=True, stable=True)
        codes = feedback.gptq(scaled, inner, grid, order, self.damping)
        for _ in range(self.rounds):
            codes = feedback.descend(scaled, inner, grid, codes, damping=self.damping)
            grid = feedback.refit_scales(scaled, inner, grid, codes)
        if self.rounds:
            codes = feedback.descend(scaled, inner, grid, codes, damping=self.damping)
        return with_input_scale(packed(shape, grid, codes, self.int8_activations), scale)
