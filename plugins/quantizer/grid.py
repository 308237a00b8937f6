"""Evenly spaced grids: a scale and a zero point for every row and group of columns.

``w = scale * (code - zero)``, code ``0 .. 2^bits - 1``.  Scales are float16 values from the start,
so that what is searched is what is stored.  Everything here is torch, on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pyllmlite.core.errors import ModelError
from pyllmlite.core.weights import LinearShape, LinearWeight

if TYPE_CHECKING:
    import torch

F16_MAX = 65504.0
F16_LEAST = 2.0**-24  # the smallest float16 above zero
F16_NORMAL = 2.0**-14  # below it float16 is evenly spaced
ROWS = 512  # rows that are searched at once: what is needed of them stays near the cache


@dataclass
class Grid:
    """Grids of a matrix ``[rows, columns]``.

    Attributes:
        bits: 2 to 8.
        group_size: Columns per group (the last may be short).
        symmetric: The zero point is the middle, ``2^(bits - 1)``.
        scale: float32 ``[rows, groups]``, each a float16 value.
        zero: float32 ``[rows, groups]``, integers.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale: torch.Tensor
    zero: torch.Tensor

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    def codes(self, weight: torch.Tensor, group: int | torch.Tensor) -> torch.Tensor:
        """Nearest codes of columns ``[rows, n]`` that lie in ``group`` (a number, or one each)."""
        scale, zero = self.scale[:, group], self.zero[:, group]
        if scale.ndim == 1:
            scale, zero = scale[:, None], zero[:, None]
        return nearest(weight, scale, zero, self.top)

    def values(self, codes: torch.Tensor) -> torch.Tensor:
        """What codes ``[rows, columns]`` stand for."""
        groups = self.groups_of(codes.shape[1])
        return (codes - self.zero[:, groups]) * self.scale[:, groups]

    def groups_of(self, columns: int) -> torch.Tensor:
        import torch

        return torch.arange(columns) // self.group_size

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """Nearest codes of a whole matrix."""
        return self.codes(weight, self.groups_of(weight.shape[1]))


def nearest(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int
) -> torch.Tensor:
    """Codes as float32; a scale of zero belongs to a group of zeros."""
    import torch

    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    return (weight / safe).round_().add_(zero).clamp_(0, top)


def rounding_error(
    groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int
) -> torch.Tensor:
    """Rounded less given values ``[a, b, size]``, with a scale and a zero point ``[a, b]`` each."""
    import torch

    wide, point = scale[:, :, None], zero[:, :, None]
    safe = torch.where(wide == 0, torch.ones_like(wide), wide)
    codes = torch.div(groups, safe).round_().add_(point).clamp_(0, top)
    return codes.sub_(point).mul_(wide).sub_(groups)


def grouped(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """``[rows, groups, group_size]``; a short last group repeats its last column."""
    import torch

    short = -weight.shape[1] % group_size
    if short:
        weight = torch.cat([weight, weight[:, -1:].expand(-1, short)], dim=1)
    return weight.reshape(weight.shape[0], -1, group_size)


def group_blocks(gram: torch.Tensor, group_size: int) -> torch.Tensor:
    """The blocks of a Gram matrix that lie inside groups, ``[groups, size, size]``; where the last
    group is short, zeros."""
    import torch

    n = gram.shape[0]
    count = -(-n // group_size)
    blocks = torch.zeros((count, group_size, group_size), dtype=torch.float32)
    for i in range(count):
        first, last = i * group_size, min((i + 1) * group_size, n)
        blocks[i, : last - first, : last - first] = gram[first:last, first:last]
    return blocks


def extreme_grid(
    weight: torch.Tensor, bits: int, group_size: int, symmetric: bool, shrink: float = 1.0
) -> Grid:
    """Scales from the largest values: ``max |w|`` to the last code (symmetric), or least and
    largest value (and zero) to the first and last code."""
    made = extreme_range(grouped(weight, group_size), bits, symmetric, shrink)
    return Grid(bits, group_size, symmetric, *made)


def extreme_range(
    groups: torch.Tensor, bits: int, symmetric: bool, shrink: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zero points ``[rows, groups]`` of :func:`extreme_grid` for ``[rows, groups,
    size]``."""
    low = groups.amin(dim=2).clamp_(max=0) * shrink
    high = groups.amax(dim=2).clamp_(min=0) * shrink
    return _from_range(low, high, (1 << bits) - 1, symmetric)


def _from_range(
    low: torch.Tensor, high: torch.Tensor, top: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    if symmetric:
        middle = (top + 1) // 2
        scale = half(torch.maximum(high, -low) / (top - middle))
        return scale, torch.full_like(scale, middle)
    scale = half((high - low) / top)
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, (-low / safe).round_().clamp_(0, top)


def half(scale: torch.Tensor) -> torch.Tensor:
    """The nearest float16, as float32.  Below 2^-14, where its steps are coarse, the next one up:
    a range that is cut off costs more than one that is too wide."""
    import torch

    rounded = scale.half().float()
    coarse = (rounded < scale) & (scale < F16_NORMAL)
    return torch.where(coarse, rounded + F16_LEAST, rounded)


def searched_grid(
    weight: torch.Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    blocks: torch.Tensor | None = None,
    steps: int = 20,
    least: float = 0.5,
    refine: bool = True,
) -> Grid:
    """The grid of each row and group that costs least: AWQ's clipping search (Lin et al. 2023,
    section 3.2: the range is shrunk step by step), then steps around what it found.

    Args:
        blocks: ``[groups, size, size]`` of the inputs' Gram matrix: the error of the outputs is
            measured; None: that of the weights.
        steps: How many shrunk ranges are tried, from 1 down to ``least``.
        refine: Try finer scales and neighbouring zero points around the best range.
    """
    import torch

    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    top = (1 << bits) - 1
    for part in torch.split(weight, ROWS):
        groups = grouped(part, group_size).transpose(0, 1).contiguous()  # [groups, rows, size]
        low, high = groups.amin(dim=2).clamp_(max=0), groups.amax(dim=2).clamp_(min=0)
        best = _Best(groups, top, blocks, weight.shape[1])
        for step in range(steps):
            shrink = 1 - step * (1 - least) / steps
            best.offer(*_from_range(low * shrink, high * shrink, top, symmetric))
        if refine:
            scale, zero = best.scale.clone(), best.zero.clone()
            for shift in (0,) if symmetric else (-1, 0, 1):
                for factor in (0.955, 0.97, 0.985, 1.0, 1.015, 1.03, 1.045):
                    if shift or factor != 1.0:
                        best.offer(half(scale * factor), (zero + shift).clamp_(0, top))
        found.append((best.scale.T, best.zero.T))
    scales, zeros = (torch.cat(parts).contiguous() for parts in zip(*found, strict=True))
    return Grid(bits, group_size, symmetric, scales, zeros)


class _Best:
    """The cheapest grid so far, for every group and row: of ``groups [groups, rows, size]``."""

    def __init__(
        self, groups: torch.Tensor, top: int, blocks: torch.Tensor | None, columns: int
    ) -> None:
        self.groups, self.top, self.blocks = groups, top, blocks
        self.last = columns - (groups.shape[0] - 1) * groups.shape[2]  # columns of the last group
        self.cost: torch.Tensor | None = None
        self.scale = self.zero = groups[:, :, 0]

    def offer(self, scale: torch.Tensor, zero: torch.Tensor) -> None:
        import torch

        error = rounding_error(self.groups, scale, zero, self.top)
        if self.blocks is None:
            error[-1, :, self.last :] = 0
            cost = error.square_().sum(dim=2)
        else:
            cost = torch.bmm(error, self.blocks).mul_(error).sum(dim=2)
        if self.cost is None:
            self.cost, self.scale, self.zero = cost, scale, zero
            return
        better = cost < self.cost
        self.cost = torch.where(better, cost, self.cost)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)


def packed(
    shape: LinearShape, grid: Grid, codes: torch.Tensor, int8_activations: bool
) -> LinearWeight:
    """Codes in the packed format that holds them: int4 up to 4 bits, int8 above.

    Raises:
        ModelError: A scale that float16 cannot hold.
    """
    scale = grid.scale.numpy()
    if scale.size and not np.abs(scale).max() <= F16_MAX:
        raise ModelError(
            f"{shape.name} holds weights so large that their scales do not fit into f16; "
            "use quantizer='none'"
        )
    wide = grid.bits > 4
    offset = 128 if wide else 0
    values = codes.numpy() - (offset if grid.bits == 8 else 0)
    zero = grid.zero.numpy() - (offset if grid.bits == 8 else 0)
    middle = 0 if wide else 8
    plain = bool((zero == middle).all()) and grid.symmetric
    columns = codes.shape[1]
    return LinearWeight(
        "int8" if wide else "int4",
        np.ascontiguousarray(values.astype(np.int8 if wide else np.uint8)),
        scale.astype(np.float16),
        None,
        0 if grid.group_size >= columns else grid.group_size,
        int8_activations=int8_activations,
        zero_points=None if plain else zero.astype(np.int16),
    )
