"""``int8``: LLM.int8(), int8 weights and inputs with outlier inputs left as floats."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pyllmlite.core.errors import ConfigError
from pyllmlite.core.weights import LinearShape, LinearWeight
from pyllmlite.hooks.quantizer import Quantizer, QuantizerNeeds
from pyllmlite_plugins.quantizer.checks import require_finite
from pyllmlite_plugins.quantizer.none import bf16_weight

DEFAULT_THRESHOLD = 6.0
DEFAULT_GROUP = 64  # columns of the input
UNTOUCHED = ("embed", "head")
WHOLE_ROW = -1
LEAST = 1e-35  # a row whose largest weight is smaller becomes zeros: 127 / it nears overflow


class LLMInt8(Quantizer):
    """LLM.int8() (Dettmers et al. 2022): vector-wise scales and mixed-precision decomposition.

    A weight row is scaled by its largest magnitude, a row of inputs (after the norm) likewise,
    64 columns at a time; inputs whose magnitude exceeds the threshold are taken out of their row
    first and multiplied in float32 with the int8 weight's own values.  They are found row by row,
    so that no request feels another's.  Weights are kept in int8 only; embedding and head stay
    bf16, as in the paper.

    Options (``extra``):

    - ``outlier_threshold`` (6.0).
    - ``activation_group`` (64): columns of the input that share a scale; 0: the whole row, which is
      the paper's rule (section 3.1).  What is lost is nearly all the rounding of the inputs, and
      a scale of their own for fewer of them costs no time.
    """

    name = "int8"
    priority = 5
    rowwise = True

    @classmethod
    def supports(cls, need: QuantizerNeeds) -> str | None:
        if need.bits not in (None, 8):
            return f"makes 8 bits, not {need.bits}"
        if need.group_size:
            return f"scales whole rows, not groups of {need.group_size}"
        if need.symmetric is False:
            return "is symmetric"
        return None

    def __init__(self, needs: QuantizerNeeds) -> None:
        super().__init__(needs)
        threshold = needs.extra.get("outlier_threshold", DEFAULT_THRESHOLD)
        number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
        if not number or not 0 < threshold < np.inf:
            raise ConfigError(f"outlier_threshold must be a number above 0, got {threshold!r}")
        self.threshold = float(threshold)
        group = needs.extra.get("activation_group", DEFAULT_GROUP)
        if isinstance(group, bool) or not isinstance(group, int) or group < 0 or group % 8:
            raise ConfigError(f"activation_group must be a multiple of 8 (0: a row), got {group!r}")
        self.activation_group = group or WHOLE_ROW

    def bits_per_weight(self, shape: LinearShape) -> float:
        return 16.0 if shape.kind in UNTOUCHED else 8 + 32.0 / shape.in_features

    def keep(self, shape: LinearShape, stored: LinearWeight) -> LinearWeight | None:
        """int8 rows with a scale each (W8A8, another tool's LLM.int8()) are what this method
        makes: they get its way with the inputs."""
        plain = (
            stored.format == "int8"
            and not stored.group_size
            and stored.mins is None
            and stored.zero_points is None
            and stored.input_permutation is None
        )
        return self._with_outliers(stored) if plain else None

    def quantize(
        self, shape: LinearShape, weight: np.ndarray, calibration: Any = None
    ) -> LinearWeight:
        if shape.kind in UNTOUCHED:
            return bf16_weight(shape, weight)
        require_finite(shape, weight)
        codes, scales = int8_rows(weight)
        return self._with_outliers(LinearWeight("int8", codes, scales))

    def _with_outliers(self, weight: LinearWeight) -> LinearWeight:
        return replace(
            weight,
            int8_activations=True,
            activation_group=self.activation_group,
            outlier_threshold=self.threshold,
        )


def int8_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 ``[out, in]`` and scales float32 ``[out, 1]``: each row's largest magnitude
    becomes 127 (section 3.1 of the paper)."""
    largest = np.maximum(weight.max(axis=1), -weight.min(axis=1))[:, None]
    inverse = np.where(largest > LEAST, np.float32(127) / np.maximum(largest, LEAST), 0)
    codes = np.rint(weight * inverse.astype(np.float32)).astype(np.int8)
    return codes, (largest / np.float32(127)).astype(np.float32)
