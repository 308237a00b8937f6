"""One model on disk, whatever its format: its spec, its tensors, its tokenizer."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllmlite.core.errors import ModelError
from pyllmlite.core.spec import ModelSpec
from pyllmlite.core.weights import LinearWeight
from pyllmlite.model.architectures import Architecture, Config, Take, find_architecture
from pyllmlite.model.checkpoint import Checkpoint, RawTensor
from pyllmlite.model.dequantize import BLOCKS, PLAIN
from pyllmlite.model.gguf import GGUFCheckpoint
from pyllmlite.model.gguf_names import GGUF_TENSORS, gguf_config
from pyllmlite.model.quantized import Reader, reader_for
from pyllmlite.model.quantized.tensor import QuantizedTensor
from pyllmlite.model.safetensors import MAX_HEADER, SafetensorsCheckpoint, parse_json

if TYPE_CHECKING:
    from pyllmlite.model.tokenizer import Tokenizer


class MappedTensor:
    """A canonical tensor: a stored one, seen through its architecture's :class:`Take`.

    It has the face of :class:`~pyllmlite.model.checkpoint.RawTensor`; ``codes()`` is None where the
    stored values stand for no packed format, or not for it (transposed, or with something added).
    """

    def __init__(self, base: RawTensor | QuantizedTensor, take: Take, spec: ModelSpec) -> None:
        self.base = base
        self.name = base.name
        self.dtype = base.dtype
        self._add = take.add
        # Other tools store a quantized matrix [out, in], whatever the architecture's floats are.
        quantized = isinstance(base, QuantizedTensor)
        self._transpose = take.transpose and len(base.shape) == 2 and not quantized
        if self._transpose and base.dtype not in PLAIN:
            raise ModelError(f"{base.name} is {base.dtype}, which cannot be transposed")
        shape = base.shape[::-1] if self._transpose else base.shape
        self._rows = None if take.rows is None else take.rows(spec)
        if self._rows is not None and shape:
            rows = shape[0]
            needed = self._rows.stop if isinstance(self._rows, slice) else int(self._rows.max()) + 1
            if needed > rows:
                raise ModelError(f"{base.name} has {rows} rows, the config needs {needed}")
            count = (
                self._rows.stop - self._rows.start
                if isinstance(self._rows, slice)
                else len(self._rows)
            )
            shape = (count, *shape[1:])
        self.shape: tuple[int, ...] = shape
        total = int(np.prod(base.shape)) or 1
        self.nbytes = base.nbytes * int(np.prod(shape)) // total

    def _select(self, rows: slice | np.ndarray | None) -> slice | np.ndarray | None:
        """Rows of this tensor as rows of the stored one."""
        if self._rows is None:
            return rows
        if rows is None:
            return self._rows
        if isinstance(self._rows, slice) and isinstance(rows, slice):
            first, last, step = rows.indices(self.shape[0])
            start = self._rows.start
            return slice(start + first, start + max(first, last), step)
        mine = self._rows
        indices = np.arange(mine.start, mine.stop) if isinstance(mine, slice) else mine
        return indices[rows]

    def float32(self, rows: slice | np.ndarray | None = None) -> np.ndarray:
        """A float32 copy, whole or of some rows (a slice or indices)."""
        selected = self._select(rows)
        if self._transpose and isinstance(self.base, RawTensor):
            data = self.base.transposed_float32(selected)
        else:
            data = self.base.float32(selected)
        if self._add:
            data += np.float32(self._add)
        return data

    def codes(
        self, rows: slice | np.ndarray | None = None, exact: bool = False
    ) -> LinearWeight | None:
        """Rows in the codes that they are stored in; None where no packed format holds them
        (``exact``: to the last bit)."""
        if self._transpose or self._add or len(self.shape) != 2:
            return None
        selected = self._select(rows)
        if isinstance(self.base, QuantizedTensor):
            return self.base.codes(selected)
        return self.base.codes(selected, exact)

    @property
    def is_codes(self) -> bool:
        """Stored in codes of some kind, not in floats."""
        return isinstance(self.base, QuantizedTensor) or self.dtype in BLOCKS

    def release(self) -> None:
        self.base.release()

    def __repr__(self) -> str:
        return f"MappedTensor({self.name!r}, {list(self.shape)}, {self.dtype})"


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Every canonical name that the spec knows: its shape, and whether it must be there."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    shapes: dict[str, tuple[tuple[int, ...], bool]] = {}

    def linear(name: str, out_features: int, in_features: int, there: bool = True) -> None:
        shapes[f"{name}.weight"] = ((out_features, in_features), there)
        shapes[f"{name}.bias"] = ((out_features,), False)

    def norm(name: str, there: bool = True) -> None:
        if there:
            shapes[f"{name}.weight"] = ((hidden,), True)
            shapes[f"{name}.bias"] = ((hidden,), False)

    shapes["embed"] = ((spec.vocab_size, hidden), True)
    if spec.learned_positions:
        rows = spec.max_position_embeddings + spec.position_offset
        shapes["position_embed"] = ((rows, hidden), True)
    norm("embed_norm", spec.embed_norm)
    for i in range(spec.num_layers):
        layer = f"layers.{i}."
        norm(layer + "attn_norm")
        linear(layer + "q", spec.q_size, hidden)
        linear(layer + "k", spec.kv_size, hidden)
        linear(layer + "v", spec.kv_size, hidden)
        if spec.qk_norm:
            shapes[layer + "q_norm"] = ((spec.head_dim,), True)
            shapes[layer + "k_norm"] = ((spec.head_dim,), True)
        linear(layer + "attn_out", hidden, spec.q_size)
        norm(layer + "post_attn_norm", spec.post_norms)
        norm(layer + "mlp_norm")
        if spec.gated:
            linear(layer + "gate", inner, hidden)
        linear(layer + "up", inner, hidden)
        linear(layer + "down", hidden, inner)
        norm(layer + "post_mlp_norm", spec.post_norms)
    norm("final_norm")
    if not spec.tie_embeddings:
        shapes["head.weight"] = ((spec.vocab_size, hidden), True)
    shapes["head.bias"] = ((spec.vocab_size,), False)
    return shapes


class ModelSource:
    """A model on disk, checked: every tensor that the spec needs is there in its shape.

    Attributes:
        path: The directory or the ``.gguf`` file.
        spec: Everything the builder needs to know.
        config: The config in transformers' words (from a GGUF's metadata, too).
        generation_config: ``generation_config.json``, or empty.
        stored_dtype: Type that most bytes of the matrices have: f32, bf16, f16, q4_1, ...
        quantized: Some matrices are codes that can be kept as they are.
        weight_bytes: Stored bytes of all tensors.
        unused: Names in the checkpoint that no canonical tensor reads.
    """

    def __init__(
        self,
        path: Path,
        checkpoint: Checkpoint,
        config: dict[str, Any],
        generation_config: dict[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.checkpoint = checkpoint
        self.config = config
        self.generation_config = generation_config or {}
        architecture = find_architecture(str(config.get("model_type")))
        is_gguf = isinstance(checkpoint, GGUFCheckpoint)
        if isinstance(checkpoint, GGUFCheckpoint) and architecture.gguf_config is not None:
            architecture.gguf_config(config, checkpoint.metadata)
            architecture = find_architecture(str(config.get("model_type")))
        try:
            spec = architecture.spec(Config(config))
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from None
        except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
            raise ModelError(f"{path}: the config cannot be understood ({error})") from error
        names = GGUF_TENSORS | architecture.gguf_tensors if is_gguf else architecture.tensors
        prefix = "" if is_gguf else self._prefix(architecture)
        if not self._find(names.get("head.weight", ()), "", ""):
            spec = dataclasses.replace(spec, tie_embeddings=True)
        ends = self.generation_config.get("eos_token_id")
        if ends is not None:
            ends = ends if isinstance(ends, list) else [ends]
            spec = dataclasses.replace(
                spec, eos_token_ids=tuple(e for e in ends if isinstance(e, int))
            )
        self.spec = spec
        self._mapped: dict[str, MappedTensor] = {}
        used = set()
        for name, (shape, needed) in tensor_shapes(spec).items():
            pattern, layer = _pattern(name)
            found = self._find(names.get(pattern, ()), prefix, layer)
            if found is None:
                if needed:
                    wanted = names[pattern][0].name if pattern in names else name
                    wanted = wanted.replace("{i}", layer).replace("{p}", prefix)
                    raise ModelError(f"{path}: lacks the tensor {wanted}")
                continue
            try:
                mapped = MappedTensor(*found, spec)
            except ModelError as error:
                raise ModelError(f"{path}: {error}") from None
            if mapped.shape != shape:
                raise ModelError(
                    f"{path}: {mapped.name} has shape {list(mapped.shape)}, "
                    f"the config needs {list(shape)}"
                )
            self._mapped[name] = mapped
            used.add(mapped.name)
        self.unused = [n for n in checkpoint.names() if n not in used]
        sizes: Counter[str] = Counter()
        for mapped in self._mapped.values():
            sizes[mapped.dtype] += mapped.nbytes if len(mapped.shape) > 1 else 0
        self.stored_dtype = sizes.most_common(1)[0][0]
        self.quantized = any(mapped.is_codes for mapped in self._mapped.values())
        self.weight_bytes = checkpoint.total_bytes

    def _prefix(self, architecture: Architecture) -> str:
        embed = architecture.tensors["embed"][0].name
        for prefix in architecture.prefixes:
            if embed.replace("{p}", prefix) in self.checkpoint:
                return prefix
        return architecture.prefixes[0]

    def _find(
        self, takes: tuple[Take, ...], prefix: str, layer: str
    ) -> tuple[RawTensor | QuantizedTensor, Take] | None:
        for take in takes:
            name = take.name.replace("{i}", layer).replace("{p}", prefix)
            if name in self.checkpoint:
                return self.checkpoint.tensor(name), take
        return None

    def names(self) -> list[str]:
        """Canonical names that are there."""
        return list(self._mapped)

    def has(self, name: str) -> bool:
        return name in self._mapped

    def get(self, name: str) -> np.ndarray | None:
        """A float32 copy of a canonical tensor; None if the checkpoint has none."""
        mapped = self._mapped.get(name)
        return None if mapped is None else mapped.float32()

    def raw(self, name: str) -> MappedTensor | None:
        """A canonical tensor as it is stored: ``float32(rows)`` gives floats, ``codes(rows)`` codes
        where it is quantized."""
        return self._mapped.get(name)

    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer; made anew at each call."""
        from pyllmlite.model.tokenizer import load_tokenizer

        return load_tokenizer(self)


def _pattern(name: str) -> tuple[str, str]:
    """``layers.3.q.bias`` to ``layers.{i}.q.bias`` and ``3``."""
    if not name.startswith("layers."):
        return name, ""
    _, layer, rest = name.split(".", 2)
    return f"layers.{{i}}.{rest}", layer


def open_checkpoint(path: str | Path) -> ModelSource:
    """Open a directory (config.json and safetensors, or one GGUF) or a ``.gguf`` file."""
    path = Path(path)
    if path.is_file():
        checkpoint = GGUFCheckpoint(path)
        return ModelSource(path, checkpoint, gguf_config(checkpoint))
    if not path.is_dir():
        raise ModelError(f"{path}: no such file or directory")
    if not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return open_checkpoint(files[0])
        if files:
            listed = ", ".join(f.name for f in files[:8])
            raise ModelError(f"{path}: holds several GGUF files, name one of them: {listed}")
        raise ModelError(f"{path}: no model (neither config.json nor a .gguf file in it)")
    config = _object(path / "config.json")
    settings = _quantization(path, config)
    reader = None if settings is None else reader_for(path, settings)
    if not any(path.glob("*.safetensors")) and any(path.glob("*.bin")):
        raise ModelError(
            f"{path}: has PyTorch .bin weights only; save it once with "
            "model.save_pretrained(path), which writes safetensors"
        )
    generation = path / "generation_config.json"
    stored = SafetensorsCheckpoint(path)
    return ModelSource(
        path,
        stored if reader is None else _read_quantized(reader, stored),
        config,
        _object(generation) if generation.is_file() else None,
    )


def _read_quantized(reader: Reader, stored: Checkpoint) -> Checkpoint:
    try:
        return reader(stored)
    except ModelError as error:
        text, path = str(error), str(stored.path)
        raise ModelError(text if text.startswith(path) else f"{path}: {text}") from None


def _quantization(path: Path, config: dict[str, Any]) -> Any:
    """The config of the tool that quantized the checkpoint; None where none did.  Older tools wrote
    a file of their own instead of an entry in config.json."""
    if config.get("quantization_config"):
        return config["quantization_config"]
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (path / name).is_file():
            return {"quant_method": method, **_object(path / name)}
    return None


def _object(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_HEADER:
        raise ModelError(f"{path}: larger than {MAX_HEADER} bytes")
    parsed = parse_json(path.read_bytes(), str(path))
    if not isinstance(parsed, dict):
        raise ModelError(f"{path}: holds no JSON object")
    return parsed


def spec_of_config(path: str | Path) -> ModelSpec:
    """The spec that a ``config.json`` alone describes; embeddings are tied if it says so."""
    path = Path(path)
    config = _object(path)
    architecture = find_architecture(str(config.get("model_type")))
    try:
        return architecture.spec(Config(config))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
        raise ModelError(f"{path}: the config cannot be understood ({error})") from error


def open_model(
    name_or_path: str | os.PathLike[str] | None = None,
    progress: bool = True,
    revision: str | None = None,
) -> ModelSource:
    """Open a path, an alias (``smollm2-135m``; also None) or a hub name (``org/name``), which is
    fetched if it is not here yet (:func:`pyllmlite.model.hub.resolve`)."""
    from pyllmlite.model.hub import resolve

    return open_checkpoint(resolve(name_or_path, progress, revision))
