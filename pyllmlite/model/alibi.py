"""ALiBi slopes (Press et al. 2022, "Train Short, Test Long").

For a power of two of heads n both families use ``2 ** (-8 i / n)``, i = 1..n.  For other numbers
they differ: BLOOM (as the paper's code) takes the slopes of the power of two below and fills up
with every other slope of twice as many heads; MPT takes the slopes of the power of two above,
its second, fourth, ... first.
"""

from __future__ import annotations

import numpy as np

from pyllmlite.core.spec import ModelSpec


def _geometric(n: int, bias_max: float) -> np.ndarray:
    return np.exp2(-np.arange(1, n + 1, dtype=np.float64) * (bias_max / n))


def alibi_slopes(num_heads: int, bias_max: float = 8.0, kind: str = "bloom") -> np.ndarray:
    """float32 ``[num_heads]``, positive; attention adds ``slope * (key - query position)``.

    Args:
        bias_max: 8 in the paper; MPT's ``alibi_bias_max``.
        kind: ``bloom`` or ``mpt``, which differ where num_heads is no power of two.
    """
    if kind not in ("bloom", "mpt"):
        raise ValueError(f"ALiBi kind is bloom or mpt, got {kind!r}")
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    below = 1 << (num_heads.bit_length() - 1)
    if below == num_heads:
        slopes = _geometric(num_heads, bias_max)
    elif kind == "bloom":
        extra = _geometric(2 * below, bias_max)[0::2][: num_heads - below]
        slopes = np.concatenate([_geometric(below, bias_max), extra])
    else:
        above = _geometric(2 * below, bias_max)
        slopes = np.concatenate([above[1::2], above[0::2]])[:num_heads]
    return slopes.astype(np.float32)


def model_slopes(spec: ModelSpec) -> np.ndarray | None:
    """A model's slopes; None where it has no ALiBi."""
    if not spec.alibi:
        return None
    kind = "mpt" if spec.architecture == "mpt" else "bloom"
    return alibi_slopes(spec.num_heads, spec.alibi_bias_max, kind)
