"""OpSink: a Program being built, as attention and cache strategies see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np


class OpSink(Protocol):
    """What a strategy adds ops to: a Program being built."""

    def op(self, op: Any, buffers: list[Any], name: str, cost: Any = None) -> None:
        """``op``: a native ``Op`` or capsule, or a Python callable ``f(batch, *arrays)``;
        ``buffers``: as handed over, or made by :meth:`buffer`."""

    def buffer(self, name: str, width: int, dtype: str = "f32", rows: str | int = "tokens") -> Any:
        """Memory for ``rows`` (``"tokens"``, ``"logits"`` or a count) rows of ``width``."""

    def tensor(self, name: str, array: np.ndarray, dtype: str | None = None) -> Any:
        """An array of yours as a buffer; the Program keeps it alive."""
