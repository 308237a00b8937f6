"""What every quantizer refuses."""

from __future__ import annotations

import numpy as np

from pyllmlite.core.errors import ModelError
from pyllmlite.core.weights import LinearShape


def require_finite(shape: LinearShape, weight: np.ndarray) -> None:
    """``ModelError`` naming the matrix and the first bad place, if a weight is NaN or infinite.

    The sum of a row is finite only if its entries are; only a row whose sum is not needs the
    closer look that costs a copy.
    """
    with np.errstate(all="ignore"):
        suspects = np.flatnonzero(~np.isfinite(weight.sum(axis=1, dtype=np.float64)))
    for row in suspects.tolist():
        bad = np.flatnonzero(~np.isfinite(weight[row]))
        if bad.size:
            raise ModelError(
                f"{shape.name} holds {weight[row, bad[0]]} (row {row}, column {bad[0]}): "
                "the checkpoint is damaged or was saved from a diverged run"
            )
