"""What the strategies that calibrate share: options, and what they do with other matrices."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from pyllmlite.core.errors import ConfigError, ModelError
from pyllmlite.core.weights import LinearShape, LinearWeight
from pyllmlite.hooks.quantizer import InputStatistics, Quantizer, QuantizerNeeds
from pyllmlite_plugins.quantizer.checks import require_finite
from pyllmlite_plugins.quantizer.int8 import int8_rows

if TYPE_CHECKING:
    import torch

GROUP_MULTIPLE = 8
DEFAULT_GROUP = 64
UNTOUCHED = ("embed", "head")


class CalibratedQuantizer(Quantizer):
    """Integer grids with a scale and a zero point for every row and group of columns.

    ``bits`` 2, 3, 4 (kept in int4) or 8 (kept in int8); 4 unless asked otherwise.  ``group_size``
    64 (8 bits: a row); any multiple of 8, the last group of a row may be short; 0: a row.
    Asymmetric unless ``symmetric``.  Embedding and head, which feel errors most, are kept in int8.
    """

    needs_calibration = True
    rowwise = False
    # Negative: never chosen by auto, which runs at load and has no calibration text.
    priority = -1

    @classmethod
    def supports(cls, need: QuantizerNeeds) -> str | None:
        if need.bits not in (None, 2, 3, 4, 8):
            return f"makes 2, 3, 4 or 8 bits, not {need.bits}"
        size = need.group_size
        if size is not None and (size < 0 or size % GROUP_MULTIPLE):
            return f"group_size must be a multiple of {GROUP_MULTIPLE} (0: a row), got {size}"
        return None

    def __init__(self, needs: QuantizerNeeds) -> None:
        super().__init__(needs)
        self.bits = needs.bits or 4
        default = DEFAULT_GROUP if self.bits <= 4 else 0
        self.group_size = default if needs.group_size is None else needs.group_size
        self.symmetric = self.bits == 8 if needs.symmetric is None else needs.symmetric
        self.int8_activations = bool(needs.extra.get("int8_activations", True))

    def bits_per_weight(self, shape: LinearShape) -> float:
        """As stored in other tools' layouts: a zero point takes as many bits as a code."""
        if shape.kind in UNTOUCHED:
            return 8 + 32.0 / shape.in_features
        group = 16.0 if self.symmetric else 16.0 + self.bits
        return self.bits + group / (self.group_size or shape.in_features)

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number among the options; ``ConfigError`` outside ``low .. high``."""
        value = self.needs.extra.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not (
            low <= value <= high
        ):
            raise ConfigError(f"{name} must be a number in {low:g}..{high:g}, got {value!r}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.needs.extra.get(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be true or false, got {value!r}")
        return value

    def quantize(
        self,
        shape: LinearShape,
        weight: np.ndarray,
        calibration: InputStatistics | None = None,
    ) -> LinearWeight:
        require_finite(shape, weight)
        if shape.kind in UNTOUCHED:
            codes, scales = int8_rows(weight)
            return LinearWeight("int8", codes, scales, int8_activations=self.int8_activations)
        if calibration is None:
            raise ModelError(
                f"quantizer {self.name!r} needs calibration statistics for {shape.name}: quantize "
                "the model to a directory first, then load that"
            )
        import torch

        with torch.no_grad():
            gram = torch.from_numpy(np.ascontiguousarray(calibration.gram, np.float64))
            return self.calibrated(shape, torch.from_numpy(weight), gram, calibration)

    @abstractmethod
    def calibrated(
        self,
        shape: LinearShape,
        weight: torch.Tensor,
        gram: torch.Tensor,
        statistics: InputStatistics,
    ) -> LinearWeight:
        """As :meth:`quantize`, of a matrix that is finite and has statistics."""

    def group_of(self, columns: int) -> int:
        return min(self.group_size or columns, max(columns, 1))
