"""``rtn``: round to nearest, int8 a row or int4 in groups of columns; needs no data."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from pyllmlite.core.errors import ConfigError, ModelError
from pyllmlite.core.weights import LinearShape, LinearWeight
from pyllmlite.hooks.quantizer import Quantizer, QuantizerNeeds
from pyllmlite_plugins.quantizer.checks import require_finite

GROUP_MULTIPLE = 8  # the packed formats begin a group on a multiple of 8 columns
DEFAULT_GROUP = 64
F16_MAX = 65504.0
SCALE_RULES = ("extreme", "signed", "mse")
SHRINK_STEPS = 20


class RoundToNearest(Quantizer):
    """Scales from the largest values, codes by rounding.

    8 bits: symmetric, one scale a row (or ``group_size`` columns).  4 bits: ``group_size``
    columns (64 unless asked otherwise) share a scale and, unless ``symmetric``, a minimum;
    embedding and head, which feel errors most, are kept in 8.  Scales are rounded to f16, up,
    before the codes are computed, so that no code is cut off and a weight is off by at most
    half a scale (and the f16 step of the minimum).

    Options (``extra``):

    - ``int8_activations`` (true): activations are quantized to int8 inside the op.
    - ``scale_rule`` (``extreme``), for 4 bits.  ``signed``: symmetric, the extreme value with its
      sign goes to -8 (llama.cpp's Q4_0).  ``mse``: the range is shrunk, and the zero point moved,
      where that makes the squared error least.
    - ``integer_zeros`` (false): zero points are codes, 0..15, as other tools store them: 4 bits a
      group in the place of a 16-bit minimum.  ``mse`` has them always.
    """

    name = "rtn"
    priority = 10
    rowwise = True

    @classmethod
    def supports(cls, need: QuantizerNeeds) -> str | None:
        if need.bits not in (None, 4, 8):
            return f"makes 4 or 8 bits, not {need.bits}"
        size = need.group_size
        if size is not None and (size < 0 or size % GROUP_MULTIPLE):
            return f"group_size must be a multiple of {GROUP_MULTIPLE} (0: a row), got {size}"
        if need.bits == 8 and need.symmetric is False:
            return "int8 is symmetric; symmetric=False needs bits=4"
        return None

    def __init__(self, needs: QuantizerNeeds) -> None:
        super().__init__(needs)
        self.bits = needs.bits or 4
        default = DEFAULT_GROUP if self.bits == 4 else 0
        self.group_size = default if needs.group_size is None else needs.group_size
        self.symmetric = bool(needs.symmetric)
        self.int8_activations = bool(needs.extra.get("int8_activations", True))
        self.scale_rule = needs.extra.get("scale_rule", "extreme")
        if self.scale_rule not in SCALE_RULES:
            raise ConfigError(
                f"scale_rule must be one of {', '.join(SCALE_RULES)}, got {self.scale_rule!r}"
            )
        if self.scale_rule == "signed" and not self.symmetric:
            raise ConfigError("scale_rule 'signed' is symmetric: ask for symmetric=True")
        self.integer_zeros = bool(needs.extra.get("integer_zeros", self.scale_rule == "mse"))

    def bits_per_weight(self, shape: LinearShape) -> float:
        eight = self.bits == 8 or shape.kind in ("embed", "head")
        group = self.group_size if self.bits == 8 or not eight else 0
        scale, least = 16.0, 4.0 if self.integer_zeros else 16.0
        own = scale if eight or self.symmetric else scale + least
        return (8 if eight else 4) + own / (group or shape.in_features)

    def quantize(
        self, shape: LinearShape, weight: np.ndarray, calibration: Any = None
    ) -> LinearWeight:
        require_finite(shape, weight)
        if self.bits == 8:
            return self._int8(shape, weight, self.group_size)
        if shape.kind in ("embed", "head"):
            return self._int8(shape, weight, 0)
        return self._int4(shape, weight)

    def _int8(self, shape: LinearShape, weight: np.ndarray, group_size: int) -> LinearWeight:
        groups = _grouped(weight, group_size)
        largest = np.maximum(groups.max(axis=2), -groups.min(axis=2))
        scales = _f16_up(shape, largest / 127)
        codes = _codes(groups, scales, None, -127, 127).astype(np.int8)
        return self._made("int8", weight, codes, scales, None, group_size)

    def _int4(self, shape: LinearShape, weight: np.ndarray) -> LinearWeight:
        groups = _grouped(weight, self.group_size)
        high, low = groups.max(axis=2), groups.min(axis=2)
        if self.scale_rule == "mse" or (self.integer_zeros and not self.symmetric):
            return self._searched(shape, weight, groups, high, low)
        if self.scale_rule == "signed":
            scales = _f16(shape, np.where(high > -low, high, low) / -8)
            codes = _codes(groups, scales, scales.astype(np.float32) * -8, 0, 15)
            return self._made("int4", weight, codes.astype(np.uint8), scales, None, self.group_size)
        if self.symmetric:  # codes 0..15 stand for -8..7 scales
            scales = _f16_up(shape, np.maximum(np.maximum(high / 7, low / -8), 0))
            codes = _codes(groups, scales, scales.astype(np.float32) * -8, 0, 15)
            return self._made("int4", weight, codes.astype(np.uint8), scales, None, self.group_size)
        mins = _f16_down(shape, low)
        scales = _f16_up(shape, (high - mins.astype(np.float32)) / 15)
        codes = _codes(groups, scales, mins.astype(np.float32), 0, 15)
        return self._made("int4", weight, codes.astype(np.uint8), scales, mins, self.group_size)

    def _searched(
        self,
        shape: LinearShape,
        weight: np.ndarray,
        groups: np.ndarray,
        high: np.ndarray,
        low: np.ndarray,
    ) -> LinearWeight:
        """Integer zero points, and with ``mse`` the shrunk range that costs least."""
        high, low = np.maximum(high, 0), np.minimum(low, 0)
        steps = SHRINK_STEPS if self.scale_rule == "mse" else 1
        best: list[np.ndarray] = []
        for step in range(steps):
            shrink = np.float32(1 - 0.5 * step / steps)
            if self.symmetric:
                scales = _f16(shape, np.maximum(high, -low) * shrink / 7)
                zeros = np.full_like(scales, 8)
            else:
                scales = _f16(shape, (high - low) * shrink / 15)
                wide = np.where(scales == 0, 1, scales).astype(np.float32)
                zeros = np.clip(np.rint(-low * shrink / wide), 0, 15).astype(np.float16)
            width = scales.astype(np.float32)
            mins = -width * zeros.astype(np.float32)
            codes = _codes(groups, scales, mins, 0, 15)
            error = codes * width[:, :, None] + mins[:, :, None] - groups
            error[:, -1, weight.shape[1] - (groups.shape[1] - 1) * groups.shape[2] :] = 0
            cost = np.einsum("rgk,rgk->rg", error, error)
            if not best:
                best = [cost, scales, zeros, codes]
                continue
            better = cost < best[0]
            for kept, new in zip(best, (cost, scales, zeros, codes), strict=True):
                kept[better] = new[better]
        _, scales, zeros, codes = best
        made = self._made("int4", weight, codes.astype(np.uint8), scales, None, self.group_size)
        return made if self.symmetric else replace(made, zero_points=zeros.astype(np.int16))

    def _made(
        self,
        format: str,
        weight: np.ndarray,
        codes: np.ndarray,
        scales: np.ndarray,
        mins: np.ndarray | None,
        group_size: int,
    ) -> LinearWeight:
        rows, columns = weight.shape
        flat = np.ascontiguousarray(codes.reshape(rows, -1)[:, :columns])
        return LinearWeight(format, flat, scales, mins, group_size, self.int8_activations)


def _grouped(weight: np.ndarray, group_size: int) -> np.ndarray:
    """``[rows, groups, group_size]``; a short last group repeats its last column, which changes
    neither its largest nor its smallest value."""
    rows, columns = weight.shape
    size = group_size or max(columns, 1)
    short = -columns % size
    if short:
        weight = np.concatenate([weight, np.repeat(weight[:, -1:], short, axis=1)], axis=1)
    return weight.reshape(rows, -1, size)


def _codes(
    groups: np.ndarray, scales: np.ndarray, mins: np.ndarray | None, low: int, high: int
) -> np.ndarray:
    """Nearest codes, float32.  A scale of 0 belongs to a group in which all values are equal to
    its minimum."""
    wide = scales.astype(np.float32)
    wide[wide == 0] = 1
    codes = groups - mins[:, :, None] if mins is not None else groups.copy()
    codes /= wide[:, :, None]
    np.rint(codes, out=codes)
    return np.clip(codes, low, high, out=codes)


def _f16_up(shape: LinearShape, values: np.ndarray) -> np.ndarray:
    """The nearest f16 that is not smaller."""
    rounded = _f16(shape, values)
    small = rounded.astype(np.float32) < values
    rounded[small] = np.nextafter(rounded[small], np.float16(np.inf))
    return rounded


def _f16_down(shape: LinearShape, values: np.ndarray) -> np.ndarray:
    rounded = _f16(shape, values)
    large = rounded.astype(np.float32) > values
    rounded[large] = np.nextafter(rounded[large], np.float16(-np.inf))
    return rounded


def _f16(shape: LinearShape, values: np.ndarray) -> np.ndarray:
    # One step below the largest, so that rounding up or down stays finite.
    worst = float(np.abs(values).max(initial=0))
    if worst > F16_MAX - 32:
        raise ModelError(
            f"{shape.name} holds weights so large that their scales ({worst:.3g}) do not fit "
            "into f16; use quantizer='none'"
        )
    return values.astype(np.float16)
