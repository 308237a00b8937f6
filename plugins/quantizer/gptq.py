"""``gptq``: rounding that makes up for its errors with the columns not rounded yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyllmlite.core.errors import ConfigError
from pyllmlite.core.weights import LinearShape, LinearWeight
from pyllmlite.hooks.quantizer import InputStatistics, QuantizerNeeds
from pyllmlite_plugins.quantizer import feedback
from pyllmlite_plugins.quantizer.calibrated import CalibratedQuantizer
from pyllmlite_plugins.quantizer.grid import (
    Grid,
    extreme_grid,
    group_blocks,
    packed,
    searched_grid,
)

if TYPE_CHECKING:
    import torch

SCALE_RULES = ("minmax", "mse", "output")


class GPTQ(CalibratedQuantizer):
    """GPTQ (Frantar et al. 2022).

    Options (``extra``):

    - ``damping`` (0.01): added to the Hessian's diagonal, as a share of its mean.
    - ``act_order`` (true): columns whose inputs are largest are rounded first.  Groups are static:
      they lie as the columns lie and their grids are made beforehand, so that nothing is permuted
      at run time.
    - ``scale_rule`` (``minmax``): grids from the extreme values; ``mse``: shrunk where that makes
      the weights' error least; ``output``: where it makes the error of the outputs least.
    """

    name = "gptq"

    def __init__(self, needs: QuantizerNeeds) -> None:
        super().__init__(needs)
        self.damping = self.number("damping", 0.01, 0.0, 10.0)
        self.act_order = self.flag("act_order", True)
        self.scale_rule = needs.extra.get("scale_rule", "minmax")
        if self.scale_rule not in SCALE_RULES:
            raise ConfigError(
                f"scale_rule must be one of {', '.join(SCALE_RULES)}, got {self.scale_rule!r}"
            )

    def calibrated(
        self,
        shape: LinearShape,
        weight: torch.Tensor,
        gram: torch.Tensor,
        statistics: InputStatistics,
    ) -> LinearWeight:
        import torch

        size = self.group_of(weight.shape[1])
        grid = self.grid(weight, gram, size)
        order = None
        if self.act_order:
            order = torch.argsort(gram.diagonal(), descending=True, stable=True)
        refit = order is None and self.scale_rule == "minmax"
        codes = feedback.gptq(weight, gram, grid, order, self.damping, refit)
        return packed(shape, grid, codes, self.int8_activations)

    def grid(self, weight: torch.Tensor, gram: torch.Tensor, size: int) -> Grid:
        if self.scale_rule == "minmax":
            return extreme_grid(weight, self.bits, size, self.symmetric)
        blocks = group_blocks(gram, size) if self.scale_rule == "output" else None
        return searched_grid(weight, self.bits, size, self.symmetric, blocks)
