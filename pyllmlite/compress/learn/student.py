"""A student: a model that is there, or one cut out of the teacher, with the teacher's vocabulary.

``layers=10`` keeps 10 layers, the first, the last and those evenly between them (Sanh et al. 2019,
DistilBERT); ``hidden=``, ``mlp=``, ``heads=`` and ``kv_heads=`` make it narrower, by what the
activations say is used least (:mod:`pyllmlite.compress.learn.narrow`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyllmlite.compress.layered_model import LayeredModel
from pyllmlite.core.errors import ConfigError, ModelError
from pyllmlite.model.source import ModelSource, tensor_shapes

if TYPE_CHECKING:
    from pyllmlite.core.spec import ModelSpec


@dataclass(frozen=True)
class Cut:
    """What is kept of the teacher; None: all."""

    layers: int | None = None
    hidden: int | None = None
    mlp: int | None = None
    heads: int | None = None
    kv_heads: int | None = None

    @property
    def narrower(self) -> bool:
        return any(v is not None for v in (self.hidden, self.mlp, self.heads, self.kv_heads))

    def __str__(self) -> str:
        return ",".join(f"{n}={v}" for n, v in vars(self).items() if v is not None)

    def completed(self, spec: ModelSpec) -> Cut:
        """With ``heads`` and ``kv_heads`` both given, where one of them is.

        Raises:
            ConfigError: More than the teacher has, or heads that do not go together.
        """
        most = {
            "layers": spec.num_layers, "hidden": spec.hidden_size, "mlp": spec.intermediate_size,
            "heads": spec.num_heads, "kv_heads": spec.num_kv_heads,
        }  # fmt: skip
        for name, value in vars(self).items():
            if value is not None and not 1 <= value <= most[name]:
                raise ConfigError(
                    f"a student with {name}={value} cannot be cut out of a teacher with "
                    f"{most[name]}"
                )
        if self.heads is None and self.kv_heads is None:
            return self
        group = spec.num_heads // spec.num_kv_heads
        kv_heads = self.kv_heads or (
            spec.num_kv_heads if group > 1 else (self.heads or spec.num_kv_heads)
        )
        heads = self.heads or kv_heads * group
        if heads % kv_heads or heads // kv_heads > group:
            raise ConfigError(
                f"a student with heads={heads} and kv_heads={kv_heads} cannot be cut out of a "
                f"teacher with {spec.num_heads} and {spec.num_kv_heads}: each KV head keeps the "
                f"same number of its {group} query heads"
            )
        return Cut(self.layers, self.hidden, self.mlp, heads, kv_heads)


def parse_cut(text: str) -> Cut | None:
    """``layers=10,mlp=1024``; None: it is no cut but the name of a model.

    Raises:
        ConfigError: A word that is not known, or no number.
    """
    if "=" not in text or "/" in text:
        return None
    words: dict[str, int] = {}
    known = Cut.__dataclass_fields__
    for part in text.split(","):
        name, _, value = part.partition("=")
        name = name.strip().replace("-", "_")
        if name not in known:
            raise ConfigError(f"--student: no {name!r} to cut; there are {', '.join(known)}")
        try:
            words[name] = int(value)
        except ValueError:
            raise ConfigError(f"--student: {name} must be a number, got {value!r}") from None
    return Cut(**words)


def kept_layers(total: int, count: int) -> list[int]:
    """Indices of ``count`` layers of ``total``: first, last, and evenly between them."""
    if count == 1:
        return [0]
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def num_weights(spec: ModelSpec) -> int:
    """Numbers in a model's tensors."""
    total = 0
    for shape, needed in tensor_shapes(spec).values():
        size = 1
        for length in shape:
            size *= length
        total += size if needed else 0
    return total


def load_module(source: ModelSource) -> Any:
    """transformers' model of whatever this package opens, with float32 weights, frozen."""
    return LayeredModel(source).fill().requires_grad_(False)


def make_student(teacher: ModelSource, cut: Cut, texts: Sequence[list[int]] = ()) -> Any:
    """A module cut out of the teacher, with float32 weights that can be trained, in eval mode.

    Args:
        texts: Token ids to see activations on; needed if the student is narrower.
    Raises:
        ConfigError: It cannot be cut so.
    """
    import torch
    import transformers

    cut = cut.completed(teacher.spec)
    layered = LayeredModel(teacher)
    full = layered.fill()
    state = dict(full.state_dict())
    layers = kept_layers(teacher.spec.num_layers, cut.layers or teacher.spec.num_layers)
    config = copy.deepcopy(full.config)
    _set_layers(config, layers)
    if cut.narrower:
        from pyllmlite.compress.learn.narrow import narrowed

        state = narrowed(layered, full, cut, layers, texts, config)
    prefix = layered.layers_name + "."
    kept = {name: value for name, value in state.items() if not name.startswith(prefix)}
    for new, old in enumerate(layers):
        start = f"{prefix}{old}."
        kept |= {
            f"{prefix}{new}.{name.removeprefix(start)}": value
            for name, value in state.items()
            if name.startswith(start)
        }
    student = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    missing, unexpected = student.load_state_dict(
        {name: value.clone() for name, value in kept.items()}, strict=False
    )
    student.tie_weights()
    tied = set(getattr(student, "_tied_weights_keys", None) or ())
    missing = [name for name in missing if name not in tied]
    if missing or unexpected:
        raise ModelError(
            f"{teacher.path}: its layers do not fit a smaller model of its kind "
            f"({', '.join([*missing, *unexpected][:3])})"
        )
    return student.requires_grad_(True).eval()


def check_student(teacher: ModelSource, given: ModelSource | Cut) -> None:
    """Before any work: whether the family can be cut so and what is behind its last norm is known.

    The second is asked of one layer with random weights; what :func:`make_student` or
    :func:`load_module` give may be asked again.

    Raises:
        ConfigError, ModelError: Neither the cut nor the family will do.
    """
    import torch
    import transformers

    from pyllmlite.compress.learn.narrow import check_narrower
    from pyllmlite.compress.learn.objectives import check_head

    layered = LayeredModel(teacher if isinstance(given, Cut) else given)
    if isinstance(given, Cut) and given.narrower:
        check_narrower(layered, given)
    config = copy.deepcopy(layered.model.config)
    _set_layers(config, [0])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        module.get_output_embeddings().weight.mul_(20)  # a soft cap shows on large logits only
    check_head(module)


def freeze_embeddings(module: Any) -> None:
    """Embedding and output matrix stay as they are: a third less work for a small model, and no
    optimizer state for them."""
    for part in (module.get_input_embeddings(), module.get_output_embeddings()):
        if part is not None:
            part.requires_grad_(False)


def check_vocabularies(teacher: ModelSource, student: ModelSource) -> None:
    """``ConfigError`` in one line where token ids do not mean the same."""
    ours, theirs = teacher.spec.vocab_size, student.spec.vocab_size
    if ours != theirs:
        raise ConfigError(
            f"the student {student.path} has {theirs} tokens, the teacher {ours}: distillation "
            "compares them token by token; take a student with the teacher's vocabulary, or cut "
            "one out of it (--student layers=N)"
        )
    first, second = (_vocabulary(source) for source in (teacher, student))
    if first and second and first != second:
        differing = next(t for t in {**first, **second} if first.get(t) != second.get(t))
        raise ConfigError(
            f"the student {student.path} has another vocabulary than the teacher: {differing!r} "
            f"is token {second.get(differing)} there and {first.get(differing)} here; take a "
            "student with the teacher's, or cut one out of it (--student layers=N)"
        )


def _vocabulary(source: ModelSource) -> dict[str, int]:
    backend = getattr(source.tokenizer(), "backend", None)
    return backend.get_vocab(with_added_tokens=True) if backend is not None else {}


def _set_layers(config: Any, layers: list[int]) -> None:
    """What a config says layer by layer, for the layers that are kept."""
    total = config.num_hidden_layers
    for name, value in list(vars(config).items()):
        listed = isinstance(value, (list, tuple)) and len(value) == total
        if listed and name.endswith("layer_types"):
            setattr(config, name, [value[i] for i in layers])
    window = getattr(config, "max_window_layers", None)
    if isinstance(window, int):
        config.max_window_layers = sum(i < window for i in layers)
    config.num_hidden_layers = len(layers)
