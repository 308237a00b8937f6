"""A transformers model whose layers' matrices are in codes that learn, and the way back to codes.

The start is a directory that was quantized here, or by another tool: its codes, and its norms, into
which AWQ may have folded scales.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils import parametrize

from pyllmlite.compress.hf_view import HFView
from pyllmlite.compress.layer_result import LayerResult
from pyllmlite.compress.layered_model import LayeredModel
from pyllmlite.compress.learn.fake_quant import FakeQuant, FakeQuantLinear
from pyllmlite.compress.learn.token_windows import without_dropout
from pyllmlite.core.errors import ConfigError, ModelError
from pyllmlite.model.quantized.tensor import QuantizedTensor

if TYPE_CHECKING:
    from pyllmlite.core.weights import LinearWeight

SAME_BASIS = 1.0  # steps: the mean distance of codes from the weights they were made of


class StoredAs(torch.nn.Module):
    """A vector as a file of 16-bit floats will hold it, its rounding taken as the identity."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values + (values.to(self.dtype).to(values.dtype) - values).detach()


class FakeQuantModel:
    """The student.

    Args:
        view: The float model.
        start: The quantized model from which the training starts.
        bits: Of the codes.
        dtype: What floats will be stored as: f32, bf16 or f16.

    Attributes:
        module: transformers' causal language model; only what is asked for learns.
    Raises:
        ConfigError: The start is of another model, or its codes cannot be trained.
    """

    def __init__(self, view: HFView, start: HFView, bits: int | None, dtype: str) -> None:
        self.view, self.start = view, start
        check_start(view, start)
        layered = LayeredModel(start.source)
        self._rescaled: set[str] = set()
        self.module = without_dropout(layered.fill())
        self.layers = layered.layers
        self.dtype = {"f32": None, "bf16": torch.bfloat16, "f16": torch.float16}[dtype]
        for index in range(view.source.spec.num_layers):
            self._replace(index, bits)

    def _replace(self, index: int, bits: int | None) -> None:
        layer = self.layers[index]
        floats = {within(m.name, index): m for m in self.view.modules(index)}
        for module in self.start.modules(index):
            name = within(module.name, index)
            made = self._codes(module.name)
            if name not in floats:
                raise ConfigError(
                    f"{self.start.source.path}: its {module.name} is no matrix of the float model"
                )
            weight = self.view.weight(floats[name])
            lean = weight if same_basis(made, weight) else None
            if lean is None or rescaled(made, weight):
                self._rescaled.add(module.name)
            try:
                quant = FakeQuant(made, lean, _bits_of(made, bits))
            except ConfigError as error:
                raise ConfigError(f"{module.name}: {error}") from None
            plain = layer.get_submodule(name)
            owner, _, last = name.rpartition(".")
            setattr(
                layer.get_submodule(owner), last, FakeQuantLinear(quant, plain.bias)
            )

    def _codes(self, module: str) -> LinearWeight:
        tensor: Any = self.start.tensor(module + ".weight")
        base = getattr(tensor, "base", None)
        made = base.codes() if isinstance(base, QuantizedTensor) else None
        if made is None:
            raise ConfigError(
                f"{self.start.source.path}: {module} is not in codes; the training starts from a "
                "directory that pyllmlite quantize made"
            )
        return made

    # -- what learns -----------------------------------------------------------------------
    def learn(
        self, weights: bool = True, scales: bool = True, norms: bool = True
    ) -> dict[str, list[torch.nn.Parameter]]:
        """Say what learns, and give it: ``latent``, ``ratio``, ``norms`` (the layers' vectors)."""
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)
        found: dict[str, list[torch.nn.Parameter]] = {"latent": [], "ratio": [], "norms": []}
        for layer in self.layers:
            for part in list(layer.modules()):
                if isinstance(part, parametrize.ParametrizationList):
                    continue
                if isinstance(part, FakeQuant):
                    found["latent"] += [part.latent] if weights else []
                    found["ratio"] += [part.ratio] if scales else []
                elif norms:
                    found["norms"] += self._vectors_of(part)
        for parameter in (p for group in found.values() for p in group):
            parameter.requires_grad_(True)
        return {name: group for name, group in found.items() if group}

    def _vectors_of(self, part: torch.nn.Module) -> list[torch.nn.Parameter]:
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter.ndim == 1 and self.dtype is not None:
                parametrize.register_parametrization(part, name, StoredAs(self.dtype))
        own = [p for p in part.parameters(recurse=False) if p.ndim == 1]
        if parametrize.is_parametrized(part):
            own += [one.original for one in part.parametrizations.values()]
        return own

    def format(self) -> dict[str, Any]:
        """Group size and symmetry of most matrices, as the start has them."""
        quants = [m for m in self.module.modules() if isinstance(m, FakeQuant)]
        kinds = Counter((quant.stored_group, quant.symmetric) for quant in quants)
        (group_size, symmetric), _ = kinds.most_common(1)[0]
        return {"group_size": group_size, "symmetric": symmetric}

    # -- the way back ----------------------------------------------------------------------
    def results(self) -> Iterator[LayerResult]:
        """What the writer takes, layer by layer, under the checkpoint's names; ``loss`` is the
        squared distance from the float weights over their square, of matrices in their basis.

        Raises:
            ModelError: A matrix has diverged, named.
        """
        names = set(self.view.names())
        for index, layer in enumerate(self.layers):
            prefix = self.view.layer_prefix(index)
            linears, loss = {}, {}
            for name, part in layer.named_modules():
                if isinstance(part, FakeQuantLinear):
                    try:
                        linears[prefix + name] = part.quant.linear_weight()
                    except ModelError as error:
                        raise ModelError(f"{prefix}{name}: {error}") from None
            for module in self.view.modules(index):
                if module.name in self._rescaled:
                    continue
                weight = self.view.weight(module)
                off = linears[module.name].float32() - weight
                size = float(np.square(weight, dtype=np.float64).sum())
                loss[within(module.name, index)] = float(
                    np.square(off, dtype=np.float64).sum()
                ) / max(size, 1e-300)
            changed = {
                prefix + name: value
                for name, value in self._vectors(layer).items()
                if prefix + name in names
            }
            yield LayerResult(index, linears, changed, loss)

    @staticmethod
    def _vectors(layer: torch.nn.Module) -> dict[str, np.ndarray]:
        """Norms and biases as they will be stored."""
        found = {}
        for owner, part in layer.named_modules():
            if ".parametrizations" in f".{owner}":
                continue
            names = [n for n, p in part.named_parameters(recurse=False) if p.ndim == 1]
            if parametrize.is_parametrized(part):
                names += list(part.parametrizations)
            for name in names:
                value = getattr(part, name).detach().float().cpu().numpy()
                found[f"{owner}.{name}" if owner else name] = value
        return found


def check_start(view: HFView, start: HFView) -> None:
    """``ConfigError`` unless ``start`` is a quantized form of ``view``, as far as sizes show."""
    mine, theirs = view.source.spec, start.source.spec
    for name in ("architecture", "num_layers", "hidden_size", "num_heads", "num_kv_heads",
                 "intermediate_size", "vocab_size"):  # fmt: skip
        if getattr(mine, name) != getattr(theirs, name):
            raise ConfigError(
                f"{start.source.path}: is of another model: its {name} is "
                f"{getattr(theirs, name)}, not {getattr(mine, name)}"
            )
    if not start.source.quantized:
        raise ConfigError(
            f"{start.source.path}: is not in codes; the training starts from a directory that "
            "pyllmlite quantize made"
        )


def within(name: str, index: int) -> str:
    """``model.layers.3.self_attn.q_proj`` to ``self_attn.q_proj``."""
    return f".{name}".split(f".{index}.", 1)[-1]


def same_basis(made: LinearWeight, weight: np.ndarray) -> bool:
    """Whether codes stand for this matrix, not for one whose rows or columns were scaled."""
    if made.scales is None or made.shape != weight.shape or not weight.size:
        return False
    scale = np.abs(made.scales.astype(np.float32))
    groups = np.arange(weight.shape[1]) // (made.group_size or weight.shape[1])
    steps = np.abs(made.float32() - weight) / np.maximum(scale, 1e-30)[:, groups]
    return float(np.minimum(steps, 100).mean()) < SAME_BASIS


def rescaled(made: LinearWeight, weight: np.ndarray) -> bool:
    """Whether scales of rows or of columns are most of what codes and matrix differ in: AWQ folds
    their inverse into the norm or the matrix before, and the model computes the same."""
    codes, floats = made.float32(), weight.astype(np.float32)
    off = float(np.square(codes - floats, dtype=np.float64).sum())
    for axis in (0, 1):
        sizes = np.square(floats).sum(axis, keepdims=True)
        scales = (codes * floats).sum(axis, keepdims=True) / np.maximum(sizes, 1e-30)
        if float(np.square(codes - scales * floats, dtype=np.float64).sum()) < 0.5 * off:
            return True
    return False


def _bits_of(made: LinearWeight, bits: int | None) -> int | None:
    """Matrices that a plan keeps in int8 have their own."""
    return bits if made.format == "int4" else None
