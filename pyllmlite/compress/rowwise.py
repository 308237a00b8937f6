"""The layers of a model by a method that looks at nothing but the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from pyllmlite.compress.hf_view import HFView
from pyllmlite.compress.layer_result import LayerResult
from pyllmlite.core.weights import LinearShape, LinearWeight

if TYPE_CHECKING:
    from pyllmlite.hooks.quantizer import Quantizer


def quantize_layers(
    view: HFView,
    quantizer_of: Callable[[str], Quantizer] | None,
    done: Callable[[int], LayerResult | None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Iterator[LayerResult]:
    """One result a decoder layer, in order; one matrix is in memory as floats at a time.

    Args:
        quantizer_of: The quantizer of a fused matrix (``layers.3.qkv``), which needs no
            calibration; None: floats stay floats.
        done: Gives a layer that was made before, which is not made again.
        progress: Told the name of the matrix that is next.
    Yields:
        ``loss`` is ``||W - W'||^2 / ||W||^2`` of every matrix, by its name within the layer.
    """
    for index in range(view.source.spec.num_layers):
        found = done(index) if done is not None else None
        if found is not None:
            yield found
            continue
        linears: dict[str, LinearWeight] = {}
        loss: dict[str, float] = {}
        for module in view.modules(index) if quantizer_of is not None else ():
            assert quantizer_of is not None
            if progress is not None:
                progress(module.name)
            weight = view.weight(module)
            shape = LinearShape(module.name, module.kind, *module.shape)
            made = quantizer_of(f"layers.{index}.{module.kind}").quantize(shape, weight)
            linears[module.name] = made
            loss[short_name(module.name, index)] = relative_error(weight, made)
        yield LayerResult(index, linears, {}, loss)


def short_name(module: str, index: int) -> str:
    """``model.layers.3.self_attn.q_proj`` to ``self_attn.q_proj``."""
    return module.split(f".{index}.", 1)[-1]


def relative_error(weight: np.ndarray, made: LinearWeight) -> float:
    """``||W - W'||^2 / ||W||^2``; 0 for a matrix of zeros that stayed so."""
    difference = float(np.square(weight - made.float32(), dtype=np.float64).sum())
    whole = float(np.square(weight, dtype=np.float64).sum())
    return difference / whole if whole else difference
