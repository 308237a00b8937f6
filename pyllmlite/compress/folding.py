"""Input scales, taken over by the op that makes the input.

AWQ (Lin et al. 2023, section 3.2) divides the columns of a matrix by a scale and multiplies its
inputs by it.  Where the op before is linear in each of its outputs, it takes the scale over, and
nothing is left to do at run time: a norm's weight (and bias); the rows of v for attn_out, since
attention mixes tokens but not channels; the rows of up for mlp_down, which the gate multiplies.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllmlite.core.weights import LinearWeight

if TYPE_CHECKING:
    from pyllmlite.compress.layered_model import LayeredModel, Stage
    from pyllmlite.compress.layerwise import LayerResult

_NORMS = {"qkv": "attn_norm", "gate_up": "mlp_norm", "mlp_up": "mlp_norm"}
_SOURCES = {"attn_out": "v", "mlp_down": "up"}


class Folder:
    """Folds ``input_scale`` of a layer's matrices; what cannot be folded stays with the matrix."""

    def __init__(self, model: LayeredModel) -> None:
        self.model, self.spec = model, model.source.spec

    def shared(self, kind: str) -> np.ndarray | None:
        """Inputs of attn_out that one row of v makes: under grouped-query attention those of all
        query heads that share it; see ``InputStatistics.shared``."""
        spec = self.spec
        if kind != "attn_out" or spec.num_heads == spec.num_kv_heads:
            return None
        return self._value_rows()

    def _value_rows(self) -> np.ndarray:
        """The row of v that makes each input of attn_out."""
        spec = self.spec
        rows = np.arange(spec.kv_size).reshape(spec.num_kv_heads, spec.head_dim)
        return np.repeat(rows, spec.num_heads // spec.num_kv_heads, axis=0).reshape(-1)

    def fold(
        self, result: LayerResult, layer: Any, stage: Stage, made: LinearWeight
    ) -> tuple[LinearWeight, bool]:
        """Returns the matrix without the scale if it was taken over, and whether rows of a
        quantized matrix were scaled for it."""
        scale = made.input_scale
        if scale is None:
            return made, False
        if stage.kind in _NORMS:
            self._into_norm(result, layer, stage, scale)
            return replace(made, input_scale=None), False
        if stage.kind == "mlp_down" and not self.spec.gated:
            return made, False  # an activation stands between
        if stage.kind == "attn_out":
            rows = self._value_rows()
            by_row = np.empty(self.spec.kv_size, np.float32)
            by_row[rows] = scale
            if not np.array_equal(by_row[rows], scale):
                return made, False
            scale = by_row
        self._into_rows(result, layer, _SOURCES[stage.kind], scale)
        return replace(made, input_scale=None), True

    def _into_norm(
        self, result: LayerResult, layer: Any, stage: Stage, scale: np.ndarray
    ) -> None:
        assert stage.norm is not None
        norm = layer.get_submodule(stage.norm)
        canonical = f"layers.{result.index}.{_NORMS[stage.kind]}.weight"
        offset = np.float32(self.model.norm_offset(canonical))
        changed = {"weight": (norm.weight.numpy() + offset) * scale - offset}
        if getattr(norm, "bias", None) is not None:
            changed["bias"] = norm.bias.numpy() * scale
        # The layer keeps its own norm until it is done: its matrices stand there unscaled.
        for part, value in changed.items():
            name = f"{self.model.layer_name(result.index)}.{stage.norm}.{part}"
            result.changed[name] = value.astype(np.float32)

    def _into_rows(self, result: LayerResult, layer: Any, part: str, scale: np.ndarray) -> None:
        canonical = f"layers.{result.index}.{part}.weight"
        module, rows = self.model.module_of(canonical)
        made = result.linears[module]
        result.linears[module] = scaled_rows(made, rows, scale)
        at = self.model.layer_name(result.index) + "."
        found = layer.get_submodule(module.removeprefix(at))
        if found.bias is not None:
            bias = result.changed.get(module + ".bias", found.bias.numpy()).copy()
            bias[rows] *= scale
            result.changed[module + ".bias"] = bias


def scaled_rows(made: LinearWeight, rows: slice | np.ndarray, scale: np.ndarray) -> LinearWeight:
    """A matrix with some rows multiplied: of codes only scales and minima change."""
    if made.format == "f32":
        values = made.values.copy()
        values[rows] *= scale[:, None]
        return replace(made, values=values)

    def times(array: np.ndarray | None) -> np.ndarray | None:
        if array is None:
            return None
        wide = array.astype(np.float32)
        wide[rows] *= scale[:, None]
        return wide.astype(array.dtype)

    return replace(made, scales=times(made.scales), mins=times(made.mins))
