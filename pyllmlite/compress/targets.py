"""Weights that make up for what the layers before have lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def corrected(
    weight: np.ndarray, gram: np.ndarray, wanted: torch.Tensor, ridge: float
) -> np.ndarray:
    """The weight that comes nearest, in the mean over tokens, to other outputs than its own.

    With inputs ``x`` of the quantized model and wanted outputs ``W x + d``, least squares give
    ``W + E[d x^T] (E[x x^T] + r I)^-1``.

    Args:
        gram: ``E[x x^T]`` float64 ``[in, in]``.
        wanted: ``E[d x^T]`` float64 ``[out, in]``.
        ridge: ``r`` as a share of the mean diagonal: how much the calibration text is trusted.
    Returns:
        float32 ``[out, in]``.
    """
    import torch

    matrix = torch.from_numpy(gram.copy())
    diagonal = matrix.diagonal()
    diagonal += ridge * diagonal.mean() + 1e-12
    factor = torch.linalg.cholesky(matrix)
    change = torch.cholesky_solve(wanted.T, factor).T
    return weight + change.float().numpy()
