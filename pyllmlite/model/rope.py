"""Rotary position tables (Su et al. 2021) with every scaling that checkpoints use.

The arithmetic follows transformers' ``modeling_rope_utils``, float32 roundings of the inverse
frequencies and of the angles included: at position 100,000 the rounding of a frequency moves its
angle by more than 1e-3, and models were trained with the rounded ones.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pyllmlite.core.errors import ModelError
from pyllmlite.core.spec import RopeSpec

SCALINGS = ("linear", "dynamic", "yarn", "llama3", "longrope")


def inverse_frequencies(rope: RopeSpec, num_positions: int) -> tuple[np.ndarray, float]:
    """float32 ``[rotary_dim / 2]`` radians per position, and the factor on cos and sin.

    For ``dynamic`` these are the frequencies of the last of ``num_positions`` positions.
    """
    scaling = rope.scaling or {}
    kind = scaling.get("rope_type", "default")
    dim = rope.rotary_dim
    base = _powers(rope.theta, dim)
    if kind == "default":
        return _inverse(base), 1.0
    if kind == "linear":
        return _inverse(base) / np.float32(_positive(scaling, "factor")), 1.0
    if kind == "dynamic":
        return _dynamic(rope, np.array([num_positions]))[0], 1.0
    if kind == "llama3":
        return _llama3(rope, _inverse(base)), 1.0
    if kind == "yarn":
        return _yarn(rope, base)
    if kind == "longrope":
        return _longrope(rope, base, num_positions)
    raise ModelError(f"rope_type {kind!r} is not known; known are {', '.join(SCALINGS)}")


def rope_tables(rope: RopeSpec, num_positions: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin, float32 ``[num_positions, rotary_dim / 2]``; the attention factor of yarn and
    longrope is multiplied in.

    ``dynamic`` (NTK-aware, Reddit /u/bloc97 and /u/emozilla 2023): position p has the frequencies
    of a sequence of p + 1 tokens, as a step that decodes position p has in transformers; a prefill
    there rotates all its positions with the frequencies of its last one.  The two agree up to the
    original length.  ``longrope`` (Ding et al. 2024): the long factors apply to all positions if
    ``num_positions`` exceeds the original length, else the short ones, so that a model served
    within its original length is the original model.
    """
    scaling = rope.scaling or {}
    positions = np.arange(num_positions, dtype=np.float32)[:, None]
    if scaling.get("rope_type") == "dynamic":
        inverse = _dynamic(rope, np.arange(1, num_positions + 1))
        factor = 1.0
    else:
        with np.errstate(all="ignore"):
            frequencies, factor = inverse_frequencies(rope, num_positions)
        inverse = frequencies[None, :]
    with np.errstate(all="ignore"):
        angles = (positions * inverse).astype(np.float64)
    if not np.isfinite(angles).all() or not np.isfinite(factor):
        raise ModelError(
            f"config: rope theta {rope.theta} with scaling {scaling or None} gives no finite angles"
        )
    cos = (np.cos(angles) * factor).astype(np.float32)
    sin = (np.sin(angles) * factor).astype(np.float32)
    return cos, sin


def _powers(theta: float, dim: int) -> np.ndarray:
    """float32 ``theta ** (2 i / dim)``, the exponent rounded to float32 first, as torch does."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    return np.power(np.float64(np.float32(theta)), exponents.astype(np.float64)).astype(np.float32)


def _inverse(powers: np.ndarray) -> np.ndarray:
    return np.float32(1.0) / powers


def _number(scaling: dict[str, Any], key: str, default: float | None = None) -> float:
    value = scaling.get(key)
    if value is None:
        value = default
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ModelError(f"rope scaling {scaling.get('rope_type')!r} needs {key}, got {value!r}")
    return float(value)


def _positive(scaling: dict[str, Any], key: str, default: float | None = None) -> float:
    value = _number(scaling, key, default)
    if value <= 0:
        raise ModelError(f"rope scaling {scaling.get('rope_type')!r}: {key} must be positive")
    return value


def _original(rope: RopeSpec) -> int:
    if rope.original_max_position < 1:
        raise ModelError("rope scaling needs original_max_position_embeddings")
    return rope.original_max_position


def _dynamic(rope: RopeSpec, lengths: np.ndarray) -> np.ndarray:
    """float32 ``[len(lengths), rotary_dim / 2]``: the frequencies for sequences of ``lengths``."""
    assert rope.scaling is not None
    factor, original, dim = _positive(rope.scaling, "factor"), _original(rope), rope.rotary_dim
    lengths = np.maximum(lengths, original).astype(np.float64)
    stretch = factor * lengths / original - (factor - 1)
    exponent = dim / (dim - 2) if dim > 2 else 1.0
    bases = (rope.theta * stretch**exponent).astype(np.float32).astype(np.float64)
    exponents = (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)).astype(np.float64)
    return _inverse((bases[:, None] ** exponents[None, :]).astype(np.float32))


def _llama3(rope: RopeSpec, inverse: np.ndarray) -> np.ndarray:
    """Llama 3.1: long waves are slowed by ``factor``, short ones kept, those between blended."""
    assert rope.scaling is not None
    factor = np.float32(_positive(rope.scaling, "factor"))
    low = np.float32(_positive(rope.scaling, "low_freq_factor"))
    high = np.float32(_positive(rope.scaling, "high_freq_factor"))
    original = np.float32(_original(rope))
    if high <= low:
        raise ModelError("rope scaling 'llama3': high_freq_factor must exceed low_freq_factor")
    wavelength = np.float32(2 * math.pi) / inverse
    smooth = (original / wavelength - low) / (high - low)
    slow = np.where(wavelength > original / low, inverse / factor, inverse)
    blend = (1 - smooth) * slow / factor + smooth * slow
    between = (wavelength >= original / high) & (wavelength <= original / low)
    return np.where(between, blend, slow).astype(np.float32)


def _yarn(rope: RopeSpec, powers: np.ndarray) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023, section 3.2): frequencies that turn often are kept, those that turn
    less than once over the original length are interpolated, with a ramp between."""
    assert rope.scaling is not None
    scaling, dim, original = rope.scaling, rope.rotary_dim, _original(rope)
    factor = _positive(scaling, "factor")
    if rope.theta <= 1:
        raise ModelError(f"rope scaling 'yarn' needs rope_theta above 1, got {rope.theta}")

    def mscale(by: float = 1.0) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        numerator, denominator = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if numerator and denominator:
            attention = mscale(numerator) / mscale(denominator)
        else:
            attention = mscale()

    def dimension_of(rotations: float) -> float:
        turns = original / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    low = dimension_of(_positive(scaling, "beta_fast", None) if scaling.get("beta_fast") else 32)
    high = dimension_of(_positive(scaling, "beta_slow", None) if scaling.get("beta_slow") else 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    keep = np.float32(1) - np.clip(ramp, 0, 1).astype(np.float32)
    interpolated = np.float32(1) / (np.float32(factor) * powers)
    inverse = interpolated * (1 - keep) + _inverse(powers) * keep
    return inverse.astype(np.float32), float(attention)


def _longrope(rope: RopeSpec, powers: np.ndarray, num_positions: int) -> tuple[np.ndarray, float]:
    assert rope.scaling is not None
    scaling, original = rope.scaling, _original(rope)
    factor = _positive(scaling, "factor", 1.0)
    attention = scaling.get("attention_factor")
    if attention is None:
        attention = 1.0
        if factor > 1:
            attention = math.sqrt(1 + math.log(factor) / math.log(original))
    key = "long_factor" if num_positions > original else "short_factor"
    factors = np.asarray(scaling.get(key), dtype=np.float32)
    if factors.shape != powers.shape or not np.all(np.isfinite(factors) & (factors > 0)):
        raise ModelError(f"rope scaling 'longrope': {key} must be {len(powers)} positive numbers")
    return _inverse(factors * powers), float(attention)
