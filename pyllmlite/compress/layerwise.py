"""Quantizing a model decoder layer by decoder layer, each on the activations that the quantized
layers before it make.

The order of GPTQ (Frantar et al. 2022, section 4): a fused matrix is quantized on the inputs that
the already quantized matrices before it make, inside the layer too.  In memory: one layer's
weights and statistics, and the hidden states of the calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllmlite.compress.folding import Folder
from pyllmlite.compress.gram import Gram
from pyllmlite.compress.layer_result import LayerResult
from pyllmlite.compress.layer_run import LayerRun
from pyllmlite.compress.layered_model import LayeredModel, Stage
from pyllmlite.core.errors import ConfigError, PluginError
from pyllmlite.core.weights import LinearShape, LinearWeight
from pyllmlite.hooks.quantizer import InputStatistics, QuantizerNeeds
from pyllmlite.hooks.registry import Registry
from pyllmlite.model.options import Options

if TYPE_CHECKING:
    import torch

    from pyllmlite.hooks.quantizer import Quantizer
    from pyllmlite.model.source import ModelSource

CHUNK_TOKENS = 2048  # tokens that run through a layer at once


@dataclass(frozen=True)
class MethodSettings:
    """How matrices are quantized: plain data, written beside the result.

    Attributes:
        quantizer: A strategy's name.
        bits, group_size, symmetric: None: the strategy's own.
        plan: Bits of single fused matrices (``layers.3.qkv``), in the place of ``bits``.
        extra: Options of the strategy.
        integer_zeros: The result is going to be written: a strategy that has the choice makes zero
            points that are integers, as other tools' layouts hold them.
    """

    quantizer: str = "awq-gptq"
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    plan: Mapping[str, int] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    integer_zeros: bool = False


Done = Callable[[int], LayerResult | None]


def quantize_layers(
    source: ModelSource,
    settings: MethodSettings,
    tokens: np.ndarray | None,
    done: Done | None = None,
    registry: Registry | None = None,
) -> Iterator[LayerResult]:
    """Quantize every decoder layer, in order; embedding, head and norms stay.

    Args:
        tokens: Calibration tokens ``[sequences, length]``, all of one length; None for strategies
            that need none.
        done: Gives a layer's result of an earlier run with the same arguments, or None.  Such
            layers are not quantized again; the rest comes out as it would have, to the bit (on the
            same machine with as many threads).
    Raises:
        ConfigError, PluginError: Before the first layer: settings that cannot work.
        ModelError: NaN or infinite weights or activations, named.
    """
    quantizers = Quantizers(source, settings, registry or Registry.load())
    model = LayeredModel(source)
    if quantizers.needs_calibration and (tokens is None or tokens.size == 0):
        raise ConfigError(f"quantizer {settings.quantizer!r} needs calibration tokens")
    walk = _Walk(model, tokens if quantizers.needs_calibration else None, quantizers)
    for index in range(len(model.layers)):
        found = None if done is None else done(index)
        yield walk.quantize(index) if found is None else walk.skip(found)


class Quantizers:
    """The strategy, once for every number of bits that a plan asks for."""

    def __init__(self, source: ModelSource, settings: MethodSettings, registry: Registry) -> None:
        from pyllmlite.model.weights import plan_matrices

        self.settings = settings
        shapes = tuple(plan.shape for plan in plan_matrices(source.spec))
        names = {shape.name for shape in shapes}
        unknown = [name for name in settings.plan if name not in names]
        if unknown:
            raise ConfigError(
                f"the plan names {unknown[0]!r}, which the model does not have; "
                "names are such as 'layers.0.qkv'"
            )
        if settings.group_size is not None:
            widest = max(shape.in_features for shape in shapes)
            if settings.group_size > widest:
                raise ConfigError(
                    f"group_size {settings.group_size} fits no layer: the widest has {widest} "
                    "inputs; use 0 for one group a row"
                )
        self._made: dict[int | None, Quantizer] = {}
        options = Options(dict(settings.extra))
        if settings.integer_zeros:
            options.hint("integer_zeros", True)
        for bits in dict.fromkeys([settings.bits, *settings.plan.values()]):
            symmetric = settings.symmetric
            group_size = settings.group_size
            if bits == 8 and bits != settings.bits:  # the few that are kept better
                symmetric, group_size = None, None
            needs = QuantizerNeeds(
                "cpu", "bf16", shapes, bits, group_size, symmetric, options
            )
            cls = registry.select("quantizer", settings.quantizer, needs).cls
            self._made[bits] = cls(needs)
        options.check()

    @property
    def needs_calibration(self) -> bool:
        return any(quantizer.needs_calibration for quantizer in self._made.values())

    def of(self, name: str) -> Quantizer:
        return self._made[self.settings.plan.get(name, self.settings.bits)]


class _Walk:
    """Hidden states on their way through the layers."""

    def __init__(
        self, model: LayeredModel, tokens: np.ndarray | None, quantizers: Quantizers
    ) -> None:
        self.model, self.quantizers = model, quantizers
        self.spec = model.source.spec
        self.folder = Folder(model)
        self.hidden: list[torch.Tensor] | None = None
        self.buffers: dict[str, list[torch.Tensor]] = {}
        if tokens is not None:
            self._enter(tokens)

    def _enter(self, tokens: np.ndarray) -> None:
        import torch

        sequences, length = tokens.shape
        if tokens.min() < 0 or tokens.max() >= self.spec.vocab_size:
            raise ConfigError("calibration tokens lie outside the model's vocabulary")
        batch = min(max(1, CHUNK_TOKENS // length), sequences)
        self.sizes = [min(batch, sequences - i) for i in range(0, sequences, batch)]
        ids = torch.from_numpy(tokens.astype(np.int64))
        self.hidden = [self.model.enter(part) for part in torch.split(ids, batch)]
        self.calls = {
            size: self.model.layer_arguments(size, length) for size in dict.fromkeys(self.sizes)
        }

    def _run_of(self, index: int, layer: Any, hidden: list[torch.Tensor]) -> LayerRun:
        calls = [self.calls[size][index] for size in self.sizes]
        return LayerRun(layer, self.model.layout, calls, hidden, self.buffers)

    # -- a layer ---------------------------------------------------------------------------
    def skip(self, result: LayerResult) -> LayerResult:
        """A layer that is there already: only the hidden states behind it are missing."""
        index = result.index
        if self.hidden is None or index + 1 == len(self.model.layers):
            return result
        layer = self.model.layer(index)
        install(self.model, layer, result)
        self._run_of(index, layer, self.hidden).advance()
        return result

    def quantize(self, index: int) -> LayerResult:
        layer = self.model.layer(index)
        result = LayerResult(index, {})
        run = None if self.hidden is None else self._run_of(index, layer, self.hidden)
        scaled = False
        for number, stage in enumerate(self.model.layout.stages):
            scaled |= self._stage(number, stage, layer, run, result)
        if run is None or index + 1 == len(self.model.layers):
            return result
        if scaled or result.changed:
            # Ops took over scales of the inputs behind them, and rounded them: the layer runs once
            # more as it will be, and as a run that finds it done sees it.
            install(self.model, layer, result)
            run = self._run_of(index, layer, run.hidden)
        run.advance()
        return result

    def _stage(
        self,
        number: int,
        stage: Stage,
        layer: Any,
        run: LayerRun | None,
        result: LayerResult,
    ) -> bool:
        """One fused matrix; True: rows of a matrix before it were scaled."""
        name = f"layers.{result.index}.{stage.kind}"
        rows = [get_weight(layer, module) for module in stage.modules]
        weight = np.concatenate(rows) if len(rows) > 1 else rows[0]
        shape = LinearShape(
            name, stage.kind, weight.shape[0], weight.shape[1], stage.kind == "gate_up"
        )
        quantizer = self.quantizers.of(name)
        statistics = None
        if run is not None:
            gram = Gram(shape.in_features)
            for inputs in run.inputs(number):
                gram.add(inputs)
            statistics = gram.statistics(name, self.folder.shared(stage.kind))
        made = quantizer.quantize(shape, weight, statistics)
        if made.shape != weight.shape:
            raise PluginError(
                f"quantizer {quantizer.name!r} returned codes of shape {list(made.shape)} for "
                f"{name}, which is {list(weight.shape)}"
            )
        result.loss[name] = relative_error(weight, made.float32(), statistics)
        effective = made.float32() if run is not None else None
        made, scaled = self.folder.fold(result, layer, stage, made)
        first = 0
        for module, part in zip(stage.modules, rows, strict=True):
            last = first + len(part)
            full = f"{self.model.layer_name(result.index)}.{module}"
            result.linears[full] = rows_of(made, first, last)
            if effective is not None:
                set_weight(layer, module, effective[first:last])
            first = last
        return scaled


# -- weights of modules ------------------------------------------------------------------------
def get_weight(layer: Any, module: str) -> np.ndarray:
    """float32 ``[out, in]`` of a linear module (GPT-2's keeps its transpose)."""
    found = layer.get_submodule(module)
    weight = found.weight.numpy()
    return np.ascontiguousarray(weight.T) if _transposed(found) else weight


def set_weight(layer: Any, module: str, weight: np.ndarray) -> None:
    import torch

    found = layer.get_submodule(module)
    value = np.ascontiguousarray(weight.T if _transposed(found) else weight, np.float32)
    found.weight = torch.nn.Parameter(torch.from_numpy(value), requires_grad=False)


def _transposed(module: Any) -> bool:
    return type(module).__name__ == "Conv1D"


def install(model: LayeredModel, layer: Any, result: LayerResult) -> None:
    """Put a result's weights into a layer's modules."""
    import torch

    at = model.layer_name(result.index) + "."
    for name, made in result.linears.items():
        set_weight(layer, name.removeprefix(at), made.float32())
    for name, value in result.changed.items():
        owner, _, last = name.removeprefix(at).rpartition(".")
        parameter = torch.nn.Parameter(torch.from_numpy(value), requires_grad=False)
        layer.get_submodule(owner)._parameters[last] = parameter


def rows_of(made: LinearWeight, first: int, last: int) -> LinearWeight:
    """Some rows of a quantized matrix."""

    def cut(array: np.ndarray | None) -> np.ndarray | None:
        return None if array is None else np.ascontiguousarray(array[first:last])

    values = np.ascontiguousarray(made.values[first:last])
    return replace(
        made,
        values=values,
        scales=cut(made.scales),
        mins=cut(made.mins),
        zero_points=cut(made.zero_points),
    )


def relative_error(
    weight: np.ndarray, made: np.ndarray, statistics: InputStatistics | None
) -> float:
    """``tr(E G E^T) / tr(W G W^T)``: mean square of the outputs' error, relative; without
    statistics ``|E|^2 / |W|^2``."""
    error = made - weight
    if statistics is None:
        size = float((weight.astype(np.float64) ** 2).sum())
        return float((error.astype(np.float64) ** 2).sum()) / max(size, 1e-300)
    gram = statistics.gram.astype(np.float32)
    size = float(((weight @ gram) * weight).sum(dtype=np.float64))
    return float(((error @ gram) * error).sum(dtype=np.float64)) / max(size, 1e-300)
