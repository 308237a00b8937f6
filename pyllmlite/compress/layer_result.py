"""What a method hands to the writer: one decoder layer at a time, under the checkpoint's names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    from pyllmlite.core.weights import LinearWeight


@dataclass
class LayerResult:
    """One decoder layer, quantized.

    Attributes:
        index: The layer's number, from 0.
        linears: Module name of the Hugging Face checkpoint (``model.layers.3.self_attn.q_proj``)
            to its codes, ``[out, in]``.  A module that is missing stays as it is.
        changed: Further tensors that the method rewrote (norms into which AWQ folds its scales), by
            their names in the checkpoint, float32, as the checkpoint stores them.
        loss: What the method measured, by a word of its own; numbers that are JSON.
    """

    index: int
    linears: dict[str, LinearWeight]
    changed: dict[str, np.ndarray] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
