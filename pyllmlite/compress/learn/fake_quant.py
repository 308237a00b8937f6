"""Weights that are rounded in every forward pass, and learn through it.

``w = scale * (code - zero)`` with the codes, float16 scales and integer zero points of the packed
int4 and int8 formats (docs/formats.md).  Rounding has no slope; the backward pass takes it as the
identity (the straight-through estimator, Bengio et al. 2013), and the slope by the scale is LSQ's
(Esser et al. 2020, section 2.1).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pyllmlite.core.errors import ConfigError, ModelError
from pyllmlite.core.weights import LinearWeight

F16_LEAST = 2.0**-24  # the smallest float16 above zero
F16_NORMAL = 2.0**-14  # below it float16 is evenly spaced
F16_MAX = 65504.0
LEAST_RATIO = 1 / 16  # a scale does not shrink below this share of what it started from
NEAR = 0.49  # steps: a latent weight that starts in a cell stays this close to its middle
RANGES = {"int4": (0, 15), "int8": (-128, 127)}


def float16_scale(scale: torch.Tensor) -> torch.Tensor:
    """The float16 that a file holds for a scale, in the scale's own type: the nearest, or below
    2^-14, where float16's steps are coarse, the next one up (as the quantizers do it)."""
    rounded = scale.half().to(scale.dtype)
    coarse = (rounded < scale) & (scale < F16_NORMAL)
    return torch.where(coarse, rounded + F16_LEAST, rounded)


class _Rounding(torch.autograd.Function):
    """``latent`` in steps of the starting scale to the weights that its codes stand for.

    In the forward pass, for each weight (``t`` the starting scale, ``s`` the scale)::

        s = float16(t * ratio);  x = latent * t / s;  code = clamp(round(x) + zero, low, high)
        weight = s * (code - zero)

    Backward, with the roundings taken as identities: inside the range ``d weight/d latent = t``
    and ``d weight/d s = round(x) - x``, the position between two codes; outside of it 0 and
    ``code - zero``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        latent: torch.Tensor,
        ratio: torch.Tensor,
        start: torch.Tensor,
        zero: torch.Tensor,
        limits: tuple[int, int],
        group_size: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(latent, ratio, start, zero)
        ctx.limits, ctx.group_size = limits, group_size
        levels = _levels(latent, ratio, start, zero, limits, group_size)
        levels *= _scales(ratio, start)[0][:, :, None]
        return _flat(levels, latent.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        latent, ratio, start, zero = ctx.saved_tensors
        slope = _folded(gradients[0], ctx.group_size)
        x = _folded(latent, ctx.group_size) * _scales(ratio, start)[1][:, :, None]
        near = x.round()
        level = near.clamp(*_bounds(zero, ctx.limits))
        inside = near == level
        by_scale = level.sub_(x.mul_(inside)).mul_(slope)
        by_ratio = by_scale.sum(dim=2).mul_(start) * (ratio >= LEAST_RATIO)
        by_latent = (slope * inside).mul_(start[:, :, None])
        return _flat(by_latent, latent.shape[1]), by_ratio, None, None, None, None


def _scales(ratio: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales, and what turns steps of the starting ones into steps of theirs; a scale of zero
    belongs to a group of zeros."""
    scale = float16_scale(start * ratio.clamp_min(LEAST_RATIO))
    return scale, torch.where(scale == 0, torch.zeros_like(scale), start / scale)


def _levels(
    latent: torch.Tensor,
    ratio: torch.Tensor,
    start: torch.Tensor,
    zero: torch.Tensor,
    limits: tuple[int, int],
    group_size: int,
) -> torch.Tensor:
    """``code - zero`` as floats, ``[rows, groups, group_size]``."""
    steps = _folded(latent, group_size) * _scales(ratio, start)[1][:, :, None]
    return steps.round_().clamp_(*_bounds(zero, limits))


def _bounds(zero: torch.Tensor, limits: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    wide = zero[:, :, None]
    return limits[0] - wide, limits[1] - wide


def _folded(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """``[rows, columns]`` as ``[rows, groups, group_size]``; zeros behind a short last group."""
    short = -values.shape[1] % group_size
    if short:
        values = torch.nn.functional.pad(values, (0, short))
    return values.reshape(values.shape[0], -1, group_size)


def _flat(values: torch.Tensor, columns: int) -> torch.Tensor:
    return values.reshape(values.shape[0], -1)[:, :columns]


def leaning(distance: torch.Tensor) -> torch.Tensor:
    """Where latent weights start within their cells, in steps from the middle.

    Args:
        distance: Of the float weights from the middle, in steps.

    A weight that was rounded to the nearest code starts where it was.  One that error feedback put
    a code further starts as far behind the edge as the float weight lies before it.  So starts are
    spread over the cells, and codes turn one after another, each step answering to those that have
    turned; were many at one place (at the edge, or near the middle), all would turn at once.
    """
    size = distance.abs()
    inside = torch.where(size <= 0.5, size, (1 - size).clamp(0, 0.5)) * (2 * NEAR)
    return torch.copysign(inside, distance)


class FakeQuant(torch.nn.Module):
    """A matrix ``[out, in]`` in codes that can be trained.

    What is learned has no unit: ``latent`` is the weight in steps of the scale it started from,
    ``ratio`` the scale over that.  So one learning rate means the same for every matrix.

    Args:
        made: A quantizer's answer, from which the training starts: int4 or int8 with integer zero
            points.
        weight: float32 ``[out, in]``, what was quantized.  Latent weights start within the cells
            of their codes, leaning towards it, so that the first forward pass gives the
            quantizer's result and weights that were nearly rounded the other way turn first.
            None: in the middle of the cells.
        bits: Of the codes, where the format could hold more (3 in int4); None: the format's.
    Raises:
        ConfigError: What cannot be trained, or not be written afterwards.
    """

    def __init__(
        self, made: LinearWeight, weight: np.ndarray | None = None, bits: int | None = None
    ) -> None:
        super().__init__()
        if made.format not in RANGES or made.scales is None:
            raise ConfigError(
                f"format {made.format!r} has no scales to train; start from a quantizer that makes "
                "int4 or int8 (rtn, gptq, awq-gptq)"
            )
        if made.mins is not None:
            raise ConfigError(
                "float minima cannot be trained; start from integer zero points "
                "(integer_zeros=true, or symmetric)"
            )
        if made.input_scale is not None or made.input_permutation is not None:
            raise ConfigError(
                "a matrix whose inputs are scaled or permuted as the model runs cannot be trained; "
                "start from gptq"
            )
        columns = made.shape[1]
        self.format, self.bits = made.format, bits or (8 if made.format == "int8" else 4)
        self.stored_group = made.group_size
        self.group_size = min(made.group_size or max(columns, 1), max(columns, 1))
        self.limits = self._limits(made)
        codes = torch.from_numpy(made.values.astype(np.float32))
        start = torch.from_numpy(made.scales.astype(np.float32))
        middle = 8 if made.format == "int4" else 0
        zero = made.zero_points if made.zero_points is not None else np.full(start.shape, middle)
        self.plain = made.zero_points is None
        self.register_buffer("start", start)
        self.register_buffer("zero", torch.from_numpy(np.asarray(zero, np.float32)))
        levels = _folded(codes, self.group_size) - self.zero[:, :, None]
        if weight is not None:
            scale = torch.where(start == 0, torch.ones_like(start), start)
            wanted = _folded(torch.from_numpy(weight), self.group_size) / scale[:, :, None]
            levels += leaning(wanted - levels)
        self.latent = torch.nn.Parameter(_flat(levels, columns).contiguous())
        self.ratio = torch.nn.Parameter(torch.ones_like(start))

    def _limits(self, made: LinearWeight) -> tuple[int, int]:
        low, high = RANGES[self.format]
        if self.format == "int4":
            high = (1 << self.bits) - 1
        elif made.zero_points is None:
            low = -127  # as every symmetric int8 here: the range has a middle
        if made.values.size and not (low <= made.values.min() and made.values.max() <= high):
            raise ConfigError(
                f"codes {made.values.min()} to {made.values.max()} do not fit into {self.bits} bits"
            )
        return low, high

    @property
    def symmetric(self) -> bool:
        """All zero points are the middle of the codes."""
        middle = 0 if self.format == "int8" else 1 << (self.bits - 1)
        return bool((self.zero == middle).all())

    def forward(self) -> torch.Tensor:
        """The matrix that the codes stand for."""
        return _Rounding.apply(
            self.latent, self.ratio, self.start, self.zero, self.limits, self.group_size
        )

    def linear_weight(self) -> LinearWeight:
        """The codes as they are now; ``float32()`` of it equals the forward pass bit for bit.

        Raises:
            ModelError: What was learned is not finite, or a scale is beyond float16.
        """
        with torch.no_grad():
            scale = _scales(self.ratio, self.start)[0].float().cpu()
            levels = _levels(
                self.latent, self.ratio, self.start, self.zero, self.limits, self.group_size
            )
            codes = _flat(levels + self.zero[:, :, None], self.latent.shape[1]).cpu()
        if not bool(torch.isfinite(self.latent).all()) or not bool(
            (scale.abs() <= F16_MAX).all()
        ):
            raise ModelError(
                "a trained matrix holds NaN, infinity, or scales that do not fit into float16; "
                "train with a smaller learning rate"
            )
        zero = None if self.plain else self.zero.cpu().numpy().astype(np.int16)
        integers = np.int8 if self.format == "int8" else np.uint8
        return LinearWeight(
            self.format,
            np.ascontiguousarray(codes.numpy()).astype(integers),
            scale.numpy().astype(np.float16),
            None,
            self.stored_group,
            zero_points=zero,
        )


class FakeQuantLinear(torch.nn.Module):
    """In the place of ``torch.nn.Linear`` or transformers' ``Conv1D``: ``x @ quant().T + bias``."""

    def __init__(self, quant: FakeQuant, bias: torch.nn.Parameter | None) -> None:
        super().__init__()
        self.quant, self.bias = quant, bias

    @property
    def weight(self) -> torch.Tensor:
        """float ``[out, in]``, rounded."""
        return self.quant()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        weight = self.quant().to(inputs.dtype)
        return torch.nn.functional.linear(inputs, weight, self.bias)
