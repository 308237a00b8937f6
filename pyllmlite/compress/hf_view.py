"""A model's tensors under the names that Hugging Face's own checkpoints have, whatever it is in.

A safetensors directory has them already.  A GGUF file is turned around: the architecture's tensor
map says which rows of which checkpoint tensor a canonical one is, and read backwards it says what
the checkpoint tensor consists of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pyllmlite.model.architectures import Take, find_architecture
from pyllmlite.model.checkpoint import RawTensor
from pyllmlite.model.gguf import GGUFCheckpoint
from pyllmlite.model.quantized.tensor import QuantizedTensor
from pyllmlite.model.source import ModelSource, tensor_shapes

CHUNK = 4 << 20  # elements that are float32 at once
FLOATS = ("f32", "bf16", "f16", "f64")
KINDS = {
    "q": "qkv", "k": "qkv", "v": "qkv", "attn_out": "attn_out", "gate": "gate_up", "up": "gate_up",
    "down": "mlp_down",
}  # fmt: skip


@dataclass(frozen=True)
class LinearModule:
    """A matrix of a decoder layer.

    Attributes:
        name: Module name in the checkpoint, without ``.weight``.
        kind: As :class:`~pyllmlite.core.weights.LinearShape` has it.
        shape: ``[out, in]``, whatever way round it is stored.
        transposed: The architecture stores its floats ``[in, out]`` (GPT-2's Conv1D).
    """

    name: str
    kind: str
    shape: tuple[int, int]
    transposed: bool


class HFTensor:
    """One tensor of the checkpoint.

    Attributes:
        name: Its name there.
        shape: Its shape there.
        dtype: f32, bf16, f16, ...; what it is stored in, or for what was turned around or unpacked
            from codes the name of those.
    """

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str) -> None:
        self.name = name
        self.shape = shape
        self.dtype = dtype

    def float32(self) -> np.ndarray:
        """A copy of all of it."""
        pieces = [piece.reshape(-1) for piece in self.pieces()]
        return np.concatenate(pieces).reshape(self.shape) if pieces else np.empty(self.shape, "f4")

    def pieces(self) -> Iterator[np.ndarray]:
        """float32, in order, some rows at a time."""
        raise NotImplementedError

    def stored(self) -> np.ndarray | None:
        """The stored bytes, memory-mapped; None where they are not those of the tensor."""
        return None

    def release(self) -> None:
        """Give mapped pages back."""


class StoredTensor(HFTensor):
    """A tensor of a safetensors checkpoint, or a matrix that another tool quantized."""

    def __init__(self, base: RawTensor | QuantizedTensor) -> None:
        super().__init__(base.name, base.shape, base.dtype)
        self.base = base

    def pieces(self) -> Iterator[np.ndarray]:
        if len(self.shape) < 2:
            yield self.base.float32()
            return
        step = max(1, CHUNK // max(1, int(np.prod(self.shape[1:]))))
        for first in range(0, self.shape[0], step):
            yield self.base.float32(slice(first, min(first + step, self.shape[0])))

    def stored(self) -> np.ndarray | None:
        raw = self.base.raw()
        return None if raw is None else raw.reshape(-1)

    def release(self) -> None:
        self.base.release()


class AssembledTensor(HFTensor):
    """A checkpoint's tensor made of canonical ones.

    Args:
        parts: Canonical name and where in the checkpoint it comes from.
    """

    def __init__(self, source: ModelSource, name: str, parts: list[tuple[str, Take]]) -> None:
        self.source = source
        self.parts = parts
        shapes = tensor_shapes(source.spec)
        first, take = parts[0]
        shape = list(shapes[first][0])
        if take.rows is not None:
            shape[0] = sum(shapes[canonical][0][0] for canonical, _ in parts)
        if take.transpose and len(shape) == 2:
            shape.reverse()
        raw = source.raw(first)
        assert raw is not None
        super().__init__(name, tuple(shape), raw.dtype)

    def pieces(self) -> Iterator[np.ndarray]:
        canonical, take = self.parts[0]
        tensor = self.source.raw(canonical)
        assert tensor is not None
        if take.rows is None and not (take.transpose and len(self.shape) == 2):
            step = max(1, CHUNK // max(1, int(np.prod(self.shape[1:]))))
            for first in range(0, self.shape[0], step):
                piece = tensor.float32(slice(first, min(first + step, self.shape[0])))
                yield piece - np.float32(take.add) if take.add else piece
            return
        yield self._whole()

    def _whole(self) -> np.ndarray:
        turned = self.parts[0][1].transpose and len(self.shape) == 2
        out = np.zeros(self.shape[::-1] if turned else self.shape, np.float32)
        for canonical, take in self.parts:
            tensor = self.source.raw(canonical)
            assert tensor is not None
            values = tensor.float32()
            if take.add:
                values -= np.float32(take.add)
            if take.rows is None:
                out[...] = values
            else:
                out[take.rows(self.source.spec)] = values
            tensor.release()
        return np.ascontiguousarray(out.T) if turned else out


class HFView:
    """The tensors of a model as a Hugging Face checkpoint has them.

    Attributes:
        source: The model.
        dtype: f32, bf16 or f16: what most floats of the checkpoint are; bf16 for codes.
    """

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self.architecture = find_architecture(str(source.config.get("model_type")))
        self.from_gguf = isinstance(source.checkpoint, GGUFCheckpoint)
        self._all: dict[str, HFTensor] = {}
        self._modules: list[list[LinearModule]] = []
        if self.from_gguf:
            self._prefix = self.architecture.prefixes[0]
            self._assemble()
        else:
            self._prefix = self._found_prefix()
            for name in source.checkpoint.names():
                self._all[name] = StoredTensor(source.checkpoint.tensor(name))
        self._modules = [self._linears(i) for i in range(source.spec.num_layers)]
        self.dtype = self._dtype()

    def names(self) -> list[str]:
        return list(self._all)

    def tensor(self, name: str) -> HFTensor:
        """``KeyError``: the checkpoint has none of this name."""
        return self._all[name]

    def modules(self, layer: int) -> list[LinearModule]:
        """The matrices of a decoder layer, in the order in which they run."""
        return self._modules[layer]

    def weight(self, module: LinearModule) -> np.ndarray:
        """A module's matrix, float32 ``[out, in]``."""
        tensor = self._all[module.name + ".weight"]
        values = tensor.float32()
        tensor.release()
        turned = module.transposed and not self._other_tools(tensor)
        return np.ascontiguousarray(values.T) if turned else values

    @staticmethod
    def _other_tools(tensor: HFTensor) -> bool:
        """Other tools store quantized matrices [out, in], whatever floats are."""
        return isinstance(getattr(tensor, "base", None), QuantizedTensor)

    def layer_names(self, layer: int) -> list[str]:
        """Names of all tensors of a decoder layer."""
        start = self.layer_prefix(layer)
        return [name for name in self._all if name.startswith(start)]

    def other_names(self) -> list[str]:
        """Names of the tensors that stand in no layer."""
        starts = tuple(self.layer_prefix(i) for i in range(self.source.spec.num_layers))
        return [name for name in self._all if not name.startswith(starts)]

    def layer_prefix(self, layer: int) -> str:
        """What the names of a layer's tensors begin with (``model.layers.3.``)."""
        take = self._take("layers.{i}.attn_norm.weight")
        assert take is not None
        return take.name.split("{i}")[0].replace("{p}", self._prefix) + f"{layer}."

    def head_name(self) -> str:
        """Module name of the output matrix, whether it is stored or tied."""
        take = self.architecture.tensors["head.weight"][0]
        return take.name.replace("{p}", self._prefix).removesuffix(".weight")

    # -- inside --------------------------------------------------------------------------------
    def _take(self, pattern: str) -> Take | None:
        takes = self.architecture.tensors.get(pattern)
        return takes[0] if takes else None

    def _name(self, take: Take, layer: str = "") -> str:
        return take.name.replace("{p}", self._prefix).replace("{i}", layer)

    def _found_prefix(self) -> str:
        """What ``{p}`` stands for in this checkpoint, from the embedding's name."""
        mapped = self.source.raw("embed")
        assert mapped is not None
        take = self._take("embed")
        assert take is not None
        return mapped.name.removesuffix(take.name.replace("{p}", ""))

    def _assemble(self) -> None:
        parts: dict[str, list[tuple[str, Take]]] = {}
        for canonical in self.source.names():
            pattern, layer = canonical, ""
            if canonical.startswith("layers."):
                _, layer, rest = canonical.split(".", 2)
                pattern = f"layers.{{i}}.{rest}"
            take = self._take(pattern)
            if take is None:  # what only GGUF has
                continue
            parts.setdefault(self._name(take, layer), []).append((canonical, take))
        for name, made_of in parts.items():
            self._all[name] = AssembledTensor(self.source, name, made_of)

    def _linears(self, layer: int) -> list[LinearModule]:
        found: dict[str, LinearModule] = {}
        gated = self.source.spec.gated
        for part, kind in KINDS.items():
            canonical = f"layers.{layer}.{part}.weight"
            mapped = self.source.raw(canonical)
            if mapped is None:
                continue
            take = self._take(f"layers.{{i}}.{part}.weight")
            assert take is not None
            stored = self._name(take, str(layer)) if self.from_gguf else mapped.name
            tensor = self._all[stored]
            turned = take.transpose and not self._other_tools(tensor)
            rows, columns = tensor.shape[::-1] if turned else tensor.shape
            name = stored.removesuffix(".weight")
            kind = "mlp_up" if part == "up" and not gated else kind
            found.setdefault(name, LinearModule(name, kind, (rows, columns), take.transpose))
        return list(found.values())

    def _dtype(self) -> str:
        sizes: dict[str, int] = {}
        for tensor in self._all.values():
            if len(tensor.shape) > 1:
                word = tensor.dtype if tensor.dtype in FLOATS else "bf16"
                sizes[word] = sizes.get(word, 0) + int(np.prod(tensor.shape))
        most = max(sizes, key=lambda word: sizes[word], default="bf16")
        return "f32" if most == "f64" else most
