"""transformers' float model of whatever pyllmlite opens, its decoder layers loaded one at a time.

The modules are transformers' own, made without weights; the weights come from the
:class:`~pyllmlite.model.source.ModelSource`, so a GGUF file or another tool's quantized directory
is read by the same code that serves it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllmlite.compress.hf_config import gguf_to_hf_config
from pyllmlite.core.errors import ConfigError, ModelError
from pyllmlite.model.architectures import Take, find_architecture
from pyllmlite.model.gguf import GGUFCheckpoint

if TYPE_CHECKING:
    import torch

    from pyllmlite.model.source import ModelSource


@dataclass(frozen=True)
class Stage:
    """Linear modules of a layer that share their input: a fused matrix of a plan.

    Attributes:
        kind: As in :class:`~pyllmlite.core.weights.LinearShape`.
        modules: Their names inside the layer, in the order of the fused rows.
        norm: The norm that makes their input, or None.
    """

    kind: str
    modules: tuple[str, ...]
    norm: str | None = None


@dataclass(frozen=True)
class LayerLayout:
    """Where a family's decoder layer keeps what.

    Attributes:
        attention, mlp: The two blocks, whose last linear modules are the second and last stage.
        stages: In the order in which they run.
        adds_residual: Attention, MLP: the block itself adds the residual, its second argument.
        norm_offset: What is added to a stored norm weight before it multiplies (Gemma: 1).
    """

    attention: str
    mlp: str
    stages: tuple[Stage, ...]
    adds_residual: tuple[bool, bool] = (False, False)


def _layout(
    attention: str,
    mlp: str,
    qkv: tuple[str, ...],
    out: str,
    up: tuple[str, ...],
    down: str,
    norms: tuple[str, str],
    adds_residual: tuple[bool, bool] = (False, False),
    gated: bool = False,
) -> LayerLayout:
    stages = (
        Stage("qkv", tuple(f"{attention}.{name}" for name in qkv), norms[0]),
        Stage("attn_out", (f"{attention}.{out}",)),
        Stage("gate_up" if gated else "mlp_up", tuple(f"{mlp}.{name}" for name in up), norms[1]),
        Stage("mlp_down", (f"{mlp}.{down}",)),
    )
    return LayerLayout(attention, mlp, stages, adds_residual)


_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_LLAMA_NORMS = ("input_layernorm", "post_attention_layernorm")
# The first whose modules are all there counts; Gemma's, which has all of Llama's, stands before.
LAYOUTS = (
    _layout("self_attn", "mlp", _QKV, "o_proj", _GATE_UP, "down_proj",
            ("input_layernorm", "pre_feedforward_layernorm"), gated=True),
    _layout("self_attn", "mlp", _QKV, "o_proj", _GATE_UP, "down_proj", _LLAMA_NORMS, gated=True),
    _layout("self_attn", "mlp", ("qkv_proj",), "o_proj", ("gate_up_proj",), "down_proj",
            _LLAMA_NORMS, gated=True),
    _layout("attn", "mlp", ("c_attn",), "c_proj", ("c_fc",), "c_proj", ("ln_1", "ln_2")),
    _layout("self_attention", "mlp", ("query_key_value",), "dense", ("dense_h_to_4h",),
            "dense_4h_to_h", _LLAMA_NORMS, adds_residual=(True, True)),
    _layout("attn", "ffn", ("Wqkv",), "out_proj", ("up_proj",), "down_proj",
            ("norm_1", "norm_2"), adds_residual=(False, True)),
)  # fmt: skip


@dataclass(frozen=True)
class _Writer:
    """A canonical tensor that fills a parameter, or some rows of it."""

    canonical: str
    take: Take


class LayeredModel:
    """transformers' causal language model of a source, its parameters on ``meta``.

    Attributes:
        source: Where weights come from.
        model: The ``...ForCausalLM`` module; outside the decoder layers it has its weights.
        layers: Its decoder layers, without weights.
        layout: Where a layer keeps its linear modules.
    Raises:
        ConfigError: torch is not installed.
        ModelError: transformers does not know the architecture, or a weight is missing.
    """

    def __init__(self, source: ModelSource) -> None:
        try:
            import torch
        except ImportError:
            raise ConfigError(
                "calibration runs transformers' model and needs torch: pip install torch"
            ) from None
        self.source = source
        with torch.no_grad(), _parameters_on_meta():
            self.model = _from_config(source)
        self.model.eval()
        self._shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        self._writers = self._find_writers()
        self.layers_name, self.layers = self._find_layers()
        self.layout = _find_layout(self.layers[0], source.spec.architecture)
        for name in self._shapes:
            head = self.model.get_output_embeddings()
            is_head = head is not None and self.model.get_parameter(name) is head.weight
            if name.startswith(self.layers_name + ".") or (is_head and name not in self._writers):
                continue
            _set_parameter(self.model, name, self._value(name))
        self.model.tie_weights()

    # -- names ---------------------------------------------------------------------------------
    def layer_name(self, index: int) -> str:
        """``model.layers.3``, as transformers names it."""
        return f"{self.layers_name}.{index}"

    def module_of(self, canonical: str) -> tuple[str, np.ndarray | slice]:
        """The module (full name) that holds a canonical matrix, and the rows in it."""
        for name, writers in self._writers.items():
            for writer in writers:
                if writer.canonical == canonical:
                    rows = writer.take.rows
                    found = slice(None) if rows is None else rows(self.source.spec)
                    return name.rpartition(".")[0], found
        raise ModelError(f"{self.source.path}: no module holds {canonical!r}")

    def norm_offset(self, canonical: str) -> float:
        """What the norm adds to its stored weight before it multiplies (Gemma: 1)."""
        for writers in self._writers.values():
            for writer in writers:
                if writer.canonical == canonical:
                    return writer.take.add
        raise ModelError(f"{self.source.path}: no norm holds {canonical!r}")

    def shape_of(self, parameter: str) -> tuple[int, ...] | None:
        """Shape of a parameter by its full name; None if there is none."""
        return self._shapes.get(parameter)

    # -- weights -------------------------------------------------------------------------------
    def layer(self, index: int) -> Any:
        """A decoder layer of its own with float32 weights; nothing else keeps them."""
        module = copy.deepcopy(self.layers[index])
        for name, _ in list(module.named_parameters()):
            _set_parameter(module, name, self._value(f"{self.layer_name(index)}.{name}"))
        return module.eval()

    def fill(self) -> Any:
        """The whole model with its weights, for forward passes from end to end."""
        for index, layer in enumerate(self.layers):
            for name, _ in list(layer.named_parameters()):
                _set_parameter(layer, name, self._value(f"{self.layer_name(index)}.{name}"))
        return self.model

    def _value(self, name: str) -> np.ndarray:
        shape = self._shapes[name]
        writers = self._writers.get(name)
        if not writers:
            raise ModelError(f"{self.source.path}: has no weights for transformers' {name}")
        transposed = len(shape) == 2 and writers[0].take.transpose
        full: np.ndarray | None = None
        for writer in writers:
            value = self.source.get(writer.canonical)
            assert value is not None  # named by the source
            if writer.take.add:
                value = value - np.float32(writer.take.add)
            if writer.take.rows is None:
                full = value
                continue
            if full is None:
                full = np.empty(shape[::-1] if transposed else shape, np.float32)
            full[writer.take.rows(self.source.spec)] = value
        assert full is not None
        full = np.ascontiguousarray(full.T if transposed else full, np.float32)
        if full.shape != shape:
            raise ModelError(
                f"{self.source.path}: {name} has shape {list(full.shape)}, "
                f"transformers' model needs {list(shape)}"
            )
        return full

    def _find_writers(self) -> dict[str, list[_Writer]]:
        spec = self.source.spec
        architecture = find_architecture(str(self.source.config.get("model_type")))
        prefix = next(
            (
                prefix
                for prefix in architecture.prefixes
                if architecture.tensors["embed"][0].name.replace("{p}", prefix) in self._shapes
            ),
            None,
        )
        if prefix is None:
            raise ModelError(
                f"{self.source.path}: transformers' {spec.architecture} names its weights in a way "
                "that is not known"
            )
        writers: dict[str, list[_Writer]] = {}
        for canonical in self.source.names():
            pattern, layer = canonical, ""
            if canonical.startswith("layers."):
                _, layer, rest = canonical.split(".", 2)
                pattern = f"layers.{{i}}.{rest}"
            for take in architecture.tensors.get(pattern, ()):
                name = take.name.replace("{i}", layer).replace("{p}", prefix)
                if name in self._shapes:
                    writers.setdefault(name, []).append(_Writer(canonical, take))
                    break
        return writers

    def _find_layers(self) -> tuple[str, Any]:
        count = self.source.spec.num_layers
        for name, module in self.model.named_modules():
            if type(module).__name__ == "ModuleList" and len(module) == count:
                return name, module
        raise ModelError(f"{self.source.path}: transformers' model has no list of {count} layers")

    # -- running -------------------------------------------------------------------------------
    def enter(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states ``[batch, length, hidden]`` before the first layer of token ids
        ``[batch, length]``."""
        return self._record(tokens, first=True)[0][0][0]

    def layer_arguments(self, batch: int, length: int) -> list[LayerCall]:
        """What the model hands to each layer besides the hidden states, for ``batch`` sequences of
        ``length`` tokens without padding: masks, positions, rotary tables."""
        import torch

        tokens = torch.zeros((batch, length), dtype=torch.long)
        return [
            LayerCall(args[1:], kwargs)
            for args, kwargs in self._record(tokens, first=False, as_tuple=self.returns_tuple)
        ]

    @cached_property
    def returns_tuple(self) -> bool:
        """Layers return a tuple that begins with the hidden states, not these alone: BLOOM's, and
        all of older versions of transformers."""
        import torch

        ((hidden, *args), kwargs), *_ = self._record(torch.zeros((1, 2), dtype=torch.long), True)
        with torch.no_grad():
            return isinstance(self.layer(0)(hidden, *args, **kwargs), tuple)

    def _record(self, tokens: torch.Tensor, first: bool, as_tuple: bool = False) -> list[Any]:
        """Run the model with layers that write down what they are given, (args, kwargs), and hand
        it on; ``first``: the first one only."""
        seen: list[Any] = []

        def record(*args: Any, **kwargs: Any) -> Any:
            if not args:
                args = (kwargs.pop("hidden_states"),)
            seen.append((args, kwargs))
            if first:
                raise _Enough
            return (args[0], None) if as_tuple else args[0]

        import torch

        body = self.model.get_submodule(self.layers_name.rpartition(".")[0])
        for layer in self.layers:
            layer.forward = record
        try:
            with torch.no_grad():
                body(input_ids=tokens, use_cache=False)
        except _Enough:
            pass
        finally:
            for layer in self.layers:
                del layer.forward
        return seen


class LayerCall:
    """The arguments of a layer besides its hidden states."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs

    def __call__(self, layer: Any, hidden: torch.Tensor) -> Any:
        return layer(hidden, *self.args, **self.kwargs)


class _Enough(Exception):
    """The first layer was reached."""


def _from_config(source: ModelSource) -> Any:
    import transformers

    if isinstance(source.checkpoint, GGUFCheckpoint):
        kept = gguf_to_hf_config(source)
    else:
        kept = {k: v for k, v in source.config.items() if k != "quantization_config"}
    kept["tie_word_embeddings"] = source.spec.tie_embeddings
    model_type = str(kept.pop("model_type"))
    try:
        config = transformers.AutoConfig.for_model(model_type, **kept)
        return transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of many kinds: transformers checks configs in many ways
        text = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{source.path}: transformers cannot make a {model_type} of this config ({text})"
        ) from error


def _find_layout(layer: Any, architecture: str) -> LayerLayout:
    modules = {name for name, _ in layer.named_modules()}
    for layout in LAYOUTS:
        names = [name for stage in layout.stages for name in stage.modules]
        norms = [stage.norm for stage in layout.stages if stage.norm is not None]
        if modules.issuperset([*names, *norms]):
            return layout
    raise ModelError(
        f"quantizing layer by layer does not know the layers of {architecture!r} "
        f"(modules: {', '.join(sorted(m for m in modules if m))[:200]})"
    )


def _set_parameter(module: Any, name: str, value: np.ndarray) -> None:
    import torch

    owner, _, last = name.rpartition(".")
    parameters = module.get_submodule(owner)._parameters
    parameters[last] = torch.nn.Parameter(torch.from_numpy(value), requires_grad=False)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """New modules' parameters take no memory; their buffers (rotary tables) are real."""
    import torch

    register = torch.nn.Module.register_parameter

    def on_meta(module: Any, name: str, parameter: Any) -> None:
        register(module, name, parameter)
        if parameter is not None:
            made = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
            module._parameters[name] = made

    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
