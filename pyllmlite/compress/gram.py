"""Sums over the calibration tokens: what the inputs of a matrix look like."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyllmlite.core.errors import ModelError
from pyllmlite.hooks.quantizer import InputStatistics

if TYPE_CHECKING:
    import torch

PANEL = 512  # columns of a block; blocks below the diagonal are mirrored, not multiplied


class Gram:
    """``X^T X`` and the mean magnitudes of inputs ``X`` ``[tokens, in_features]``.

    Each chunk is multiplied in float32 and added up in float64: the error is that of one chunk's
    products, however many there are.
    """

    def __init__(self, in_features: int) -> None:
        import torch

        self.sums = torch.zeros((in_features, in_features), dtype=torch.float64)
        self.magnitudes = torch.zeros(in_features, dtype=torch.float64)
        self.tokens = 0

    def add(self, inputs: torch.Tensor) -> None:
        n = inputs.shape[1]
        for first in range(0, n, PANEL):
            last = min(first + PANEL, n)
            product = inputs[:, first:last].T @ inputs[:, first:]
            self.sums[first:last, first:] += product
        self.magnitudes += inputs.abs().sum(dim=0)
        self.tokens += inputs.shape[0]

    def statistics(self, name: str, shared: np.ndarray | None = None) -> InputStatistics:
        """Raises ``ModelError`` where an input was NaN or infinite."""
        n = self.sums.shape[0]
        for first in range(PANEL, n, PANEL):
            last = min(first + PANEL, n)
            self.sums[first:last, :first] = self.sums[:first, first:last].T
        count = max(self.tokens, 1)
        gram = self.sums.div_(count).numpy()
        if not np.isfinite(gram).all():
            raise ModelError(
                f"{name}: its inputs are NaN or infinite on the calibration text; the checkpoint "
                "is damaged, or the model overflows float32"
            )
        magnitude = (self.magnitudes / count).float().numpy()
        return InputStatistics(self.tokens, gram, magnitude, shared)
