"""Quantizer: how a weight becomes a packed format, offline."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyllmlite.hooks.strategy import Strategy

if TYPE_CHECKING:
    import numpy as np

    from pyllmlite.core.weights import LinearShape, LinearWeight


@dataclass(frozen=True)
class QuantizerNeeds:
    """What is asked: ``bits`` and ``group_size`` None: the method's default.  ``shapes`` are all
    matrices it will be given."""

    device: str
    dtype: str
    shapes: tuple[LinearShape, ...]
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class InputStatistics:
    """What the inputs ``x`` of a fused matrix look like over the calibration tokens.

    Attributes:
        tokens: How many were seen.
        gram: float64 ``[in, in]``, the mean of ``x x^T``: the error of an output is
            ``tr(E gram E^T)`` a token for an error ``E`` of the weight.
        mean_magnitude: float32 ``[in]``, the mean of ``|x|``.
        shared: int ``[in]``: inputs of one number must get one ``input_scale``, so that the op
            before can take it over (query heads that share values); None: each its own.
    """

    tokens: int
    gram: np.ndarray
    mean_magnitude: np.ndarray
    shared: np.ndarray | None = None


class Quantizer(Strategy):
    """Turns float matrices into :class:`LinearWeight`.  Methods are many, formats are few.

    Attributes:
        needs_calibration: :meth:`quantize` needs statistics of the matrix's inputs.
        rowwise: Each output row is quantized by itself, without input scale or permutation:
            the loader may then hand over some rows at a time and never holds a big matrix twice.
    """

    contract = "quantizer"
    needs_calibration: bool = False
    rowwise: bool = False

    def __init__(self, needs: QuantizerNeeds) -> None:
        self.needs = needs

    def bits_per_weight(self, shape: LinearShape) -> float:
        """Bits that a weight of this matrix will take, scales included: for sizing."""
        return 32.0 if self.needs.dtype == "f32" else 16.0

    def keep(self, shape: LinearShape, stored: LinearWeight) -> LinearWeight | None:
        """A matrix that arrives quantized in a packed format: return it, as it is or with
        another activation mode, to run it without rounding it again; None: it is turned to
        float32 and given to :meth:`quantize`.  With ``values`` of some rows only, as above."""
        return None

    @abstractmethod
    def quantize(
        self,
        shape: LinearShape,
        weight: np.ndarray,
        calibration: InputStatistics | None = None,
    ) -> LinearWeight:
        """One fused matrix.

        Args:
            weight: float32 ``[out_features, in_features]`` (with ``rowwise`` any number of
                its rows), not kept and not written.
            calibration: With ``needs_calibration``: statistics of the matrix's inputs.
        Raises:
            ModelError: NaN or infinite weights, named.
        """
