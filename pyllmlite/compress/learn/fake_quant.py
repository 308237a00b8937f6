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
RANGES = {"int4": (0, 15), "int8": (-128, 127)}
NEAR = 0.49  # steps: a latent weight that starts on a code stays this close to it


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
        scale, _ = _scales(ratio, start)
        weight = _codes(latent, ratio, start, zero, limits, group_size)
        weight -= _wide(zero, latent.shape[1], group_size)
        return weight.mul_(_wide(scale, latent.shape[1], group_size))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        (slope,) = gradients
        latent, ratio, start, zero = ctx.saved_tensors
        columns, size, (low, high) = latent.shape[1], ctx.group_size, ctx.limits
        wide = _wide(zero, columns, size)
        scale, factor = _scales(ratio, start)
        x = latent * _wide(factor, columns, size)
        level = x.round().add_(wide)
        code = level.clamp(low, high)
        inside = level == code
        code -= wide
        by_scale = code.sub_(x.mul_(inside)).mul_(slope)
        by_ratio = _group_sums(by_scale, size).mul_(start)
        by_ratio *= ratio >= LEAST_RATIO
        by_latent = (slope * inside).mul_(_wide(start, columns, size))
        return by_latent, by_ratio, None, None, None, None


def _scales(ratio: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales, and what turns steps of the starting ones into steps of theirs; a scale of zero
    belongs to a group of zeros."""
    scale = float16_scale(start * ratio.clamp_min(LEAST_RATIO))
    return scale, torch.where(scale == 0, torch.zeros_like(scale), start / scale)


def _codes(
    latent: torch.Tensor,
    ratio: torch.Tensor,
    start: torch.Tensor,
    zero: torch.Tensor,
    limits: tuple[int, int],
    group_size: int,
) -> torch.Tensor:
    columns = latent.shape[1]
    x = latent * _wide(_scales(ratio, start)[1], columns, group_size)
    return x.round_().add_(_wide(zero, columns, group_size)).clamp_(*limits)


def _wide(groups: torch.Tensor, columns: int, group_size: int) -> torch.Tensor:
    """``[rows, groups]`` as ``[rows, columns]``, or ``[rows, 1]`` where there is one group."""
    if groups.shape[1] == 1:
        return groups
    return groups.repeat_interleave(group_size, dim=1)[:, :columns]


def _group_sums(values: torch.Tensor, group_size: int) -> torch.Tensor:
    """``[rows, columns]`` to the sums of groups; the last may be short."""
    rows, columns = values.shape
    if columns <= group_size:
        return values.sum(dim=1, keepdim=True)
    values = torch.nn.functional.pad(values, (0, -columns % group_size))
    return values.view(rows, -1, group_size).sum(dim=2)


class FakeQuant(torch.nn.Module):
    """A matrix ``[out, in]`` in codes that can be trained.

    What is learned has no unit: ``latent`` is the weight in steps of the scale it started from,
    ``ratio`` the scale over that.  So one learning rate means the same for every matrix.

    Args:
        made: A quantizer's answer, from which the training starts: int4 or int8 with integer zero
            points.
        weight: float32 ``[out, in]``, what was quantized.  Latent weights start in the direction
            of theirs within the cells of their codes, so that the first forward pass gives the
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
        rows, columns = made.shape
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
        levels = codes - _wide(self.zero, columns, self.group_size)
        if weight is not None:
            scale = torch.where(start == 0, torch.ones_like(start), start)
            wanted = torch.from_numpy(weight) / _wide(scale, columns, self.group_size)
            levels += (wanted - levels).clamp_(-NEAR, NEAR)
        self.latent = torch.nn.Parameter(levels)
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
            codes = _codes(
                self.latent, self.ratio, self.start, self.zero, self.limits, self.group_size
            ).cpu()
        if not bool(torch.isfinite(self.latent).all()) or not bool(
            (scale.abs() <= F16_MAX).all()
        ):
            raise ModelError(
                "a trained matrix holds NaN, infinity, or scales that do not fit into float16; "
                "train with a smaller learning rate"
            )
        zero = None if self.plain else self.zero.cpu().numpy().astype(np.int16)
        return LinearWeight(
            self.format,
            codes.numpy().astype(np.int8 if self.format == "int8" else np.uint8),
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


def freeze_all_but(module: torch.nn.Module, weights: bool, scales: bool, norms: bool) -> None:
    """Say what learns: latent weights, scales, and the vectors (norms, biases) beside them."""
    quants = {name for name, m in module.named_modules() if isinstance(m, FakeQuant)}
    for name, parameter in module.named_parameters():
        owner, _, last = name.rpartition(".")
        if owner in quants:
            parameter.requires_grad_(weights if last == "latent" else scales)
        else:
            parameter.requires_grad_(norms and parameter.ndim == 1)


def layer_quants(layer: torch.nn.Module) -> dict[str, FakeQuantLinear]:
    """The matrices in codes, by their names in the module."""
    return {n: m for n, m in layer.named_modules() if isinstance(m, FakeQuantLinear)}
