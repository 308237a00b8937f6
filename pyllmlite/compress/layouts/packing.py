"""What the layouts share: codes packed into words, groups that other tools take, integer zeros."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pyllmlite.core.errors import ModelError
from pyllmlite.core.weights import LinearWeight

BITS = {"int4": 4, "int8": 8}
GROUP_MULTIPLE = 8  # the kernels begin a group on a multiple of 8 columns


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes ``[rows, n]`` from 0 as int32 ``[rows, ceil(n * bits / 32)]``, one behind the other
    along a row, lowest bits first; the rest of the last word is zeros.  ``bits`` is 4 or 8."""
    rows, count = codes.shape
    per_word = 32 // bits
    padded = np.pad(codes.astype(np.uint8), ((0, 0), (0, -count % per_word)))
    if bits == 4:
        padded = padded[:, 0::2] | (padded[:, 1::2] << np.uint8(4))
    return np.ascontiguousarray(padded).view("<i4")


@dataclass(frozen=True)
class Codes:
    """A matrix as every layout takes it apart.

    Attributes:
        bits: 4 or 8.
        codes: uint8 ``[out, in]``, ``0 .. 2^bits - 1``, columns in the order of the input.
        scales: ``[out, groups]``, float16 or float32.
        zeros: uint8 ``[out, groups]``: ``w = scale * (code - zero)``.
        symmetric: All zeros are ``2^(bits - 1)``.
        group_size: Columns of a group (the last may be short); 0: the whole row.
        group_of: int32 ``[in]``: the group of every column, where groups do not lie one behind the
            other (``act_order``); else None.
    """

    bits: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    symmetric: bool
    group_size: int
    group_of: np.ndarray | None


def take_apart(name: str, weight: LinearWeight, short_group: bool = False) -> Codes:
    """A quantized matrix in the words of the layouts, each value exact.

    A group size that does not divide the columns is written as the greatest common divisor of both:
    its scales stand several times, and the short last group is one of whole ones.

    Args:
        short_group: The layout can hold a last group that is short, which is left where there is
            no such divisor.
    Raises:
        ModelError: What no layout can hold: floats' minima, codebooks, scales of the input.
    """
    if weight.format not in BITS or weight.scales is None:
        raise ModelError(
            f"{name} is in format {weight.format!r}, which no layout holds; written are int4 and "
            "int8 (methods rtn, gptq, awq, ...)"
        )
    if weight.input_scale is not None:
        raise ModelError(
            f"{name} multiplies its input by scales, which no layout holds; they must be folded "
            "into the op before"
        )
    bits = BITS[weight.format]
    codes = weight.values
    if weight.format == "int8":
        codes = codes.view(np.uint8) ^ np.uint8(0x80)
    elif codes.size and codes.max() > 15:
        raise ModelError(f"{name} has codes above 15 in format int4")
    zeros = _zeros(name, weight, bits)
    columns = weight.shape[1]
    scales, group = weight.scales, weight.group_size
    if group >= columns or scales.shape[1] == 1:
        group = 0
    group_of = None
    if group and weight.input_permutation is not None:
        group_of = np.empty(columns, np.int32)
        group_of[weight.input_permutation] = np.arange(columns, dtype=np.int32) // group
        if (group_of == np.arange(columns) // group).all():
            group_of = None
    if weight.input_permutation is not None:
        plain = np.empty_like(codes)
        plain[:, weight.input_permutation] = codes
        codes = plain
    if group and columns % group:
        if group_of is not None:
            raise ModelError(
                f"{name}: {columns} columns ordered by their activations do not part into groups "
                f"of {group}; use a group size that divides them, or static groups"
            )
        common = math.gcd(group, columns)
        if common % GROUP_MULTIPLE == 0:
            repeat = np.arange(columns // common) * common // group
            scales, zeros, group = scales[:, repeat], zeros[:, repeat], common
        elif not short_group:
            raise ModelError(
                f"{name}: {columns} columns do not part into groups of {group}, nor into smaller "
                f"ones that are a multiple of {GROUP_MULTIPLE}; use group size 0 (a row), or the "
                "layout gptq"
            )
    symmetric = bool((zeros == 1 << (bits - 1)).all())
    return Codes(bits, codes, scales, zeros, symmetric, group, group_of)


def _zeros(name: str, weight: LinearWeight, bits: int) -> np.ndarray:
    """Zero points of codes from 0, uint8 ``[out, groups]``."""
    assert weight.scales is not None
    offset = 128 if weight.format == "int8" else 0
    if weight.zero_points is not None:
        zeros = weight.zero_points.astype(np.int64) + offset
    elif weight.mins is None:
        zeros = np.full(weight.scales.shape, 1 << (bits - 1), np.int64)
    else:
        scales, mins = weight.scales.astype(np.float32), weight.mins.astype(np.float32)
        near = np.rint(-mins / np.where(scales == 0, 1, scales))
        if not (scales * -near == mins).all():
            raise ModelError(
                f"{name} has minima that are no multiples of its scales; the layouts of other "
                "tools have integer zero points: quantize with integer_zeros=true, or symmetric"
            )
        zeros = near.astype(np.int64) + offset
    if zeros.size and (zeros.min() < 0 or zeros.max() >= 1 << bits):
        worst = zeros.min() if zeros.min() < 0 else zeros.max()
        raise ModelError(
            f"{name} has a zero point of {worst}, outside its codes 0..{(1 << bits) - 1}, which "
            "the layouts cannot hold"
        )
    return zeros.astype(np.uint8)
