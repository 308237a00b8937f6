"""What is asked of a quantizing run: plain data, written beside the result."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass, field
from typing import Any

from pyllmlite.compress.hf_view import HFView
from pyllmlite.compress.layouts import ALIASES
from pyllmlite.core.errors import ConfigError
from pyllmlite.core.weights import LinearShape

CASTS = {"f32": "f32", "float32": "f32", "bf16": "bf16", "bfloat16": "bf16", "f16": "f16",
         "fp16": "f16", "float16": "f16"}  # fmt: skip
DTYPES = ("f32", "bf16", "f16")
SELF = "self"
CALIBRATION = ("calibration", "num_sequences", "seq_len", "seed")


@dataclass
class Settings:
    """What decides the result.

    Attributes:
        method: A quantizer by name, or a cast: f32, bf16, f16.
        bits, group_size, symmetric: None: the method's own.
        plan: Bits of single fused matrices (``layers.3.qkv``) in the place of ``bits``.
        bits_budget: Bits per weight at most, given to the matrices where they buy the most.
        layout: pack-quantized (compressed-tensors), int-quantized, gptq or gptq_v2; None: chosen.
        int8_activations: Whoever runs the model rounds inputs to int8 (W8A8).
        dtype: Of the tensors that stay floats; None: as in the source, bf16 for a GGUF.
        calibration: ``self``, a text file or a data set, for methods that need it.
        num_sequences, seq_len, seed: Of the calibration; None: the method's own.
        extra: The method's own options.
    """

    method: str
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    plan: dict[str, int] = field(default_factory=dict)
    bits_budget: float | None = None
    layout: str | None = None
    int8_activations: bool = False
    dtype: str | None = None
    calibration: str = SELF
    num_sequences: int | None = None
    seq_len: int | None = None
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def is_cast(self) -> bool:
        return self.method in CASTS

    def shown(self, calibrated: bool) -> dict[str, Any]:
        """As JSON; without the calibration's where there is none."""
        return {
            name: value
            for name, value in asdict(self).items()
            if calibrated or name not in CALIBRATION
        }


def completed(settings: Settings, view: HFView) -> Settings:
    """Settings with what was left open decided; ``ConfigError`` for what does not go together."""
    made = Settings(**asdict(settings))
    if made.dtype is not None and made.dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {made.dtype!r}")
    if made.is_cast:
        return _cast(made)
    made.dtype = made.dtype or view.dtype
    if made.layout is None:
        made.layout = "int-quantized" if made.int8_activations else "pack-quantized"
    made.layout = ALIASES.get(made.layout, made.layout)
    if made.bits_budget is not None:
        _check_budget(made)
    if made.layout == "int-quantized":
        if made.bits not in (None, 8):
            raise ConfigError(f"int-quantized holds 8 bits, not {made.bits}; use pack-quantized")
        made.bits = 8
    if made.layout == "gptq" and made.symmetric is not True and made.bits != 8:
        made.layout = "gptq_v2"  # which holds a zero point of 0
    return made


def _check_budget(made: Settings) -> None:
    """A budget decides the bits of every matrix: who asks for some too would not get them."""
    if made.bits is not None or made.plan:
        word = "bits" if made.bits is not None else "plan"
        raise ConfigError(f"a bits budget decides the bits of every matrix: leave out {word}")
    if made.layout == "int-quantized":
        raise ConfigError(
            "int-quantized holds 8 bits, a bits budget mixes them; use pack-quantized"
        )


def _cast(made: Settings) -> Settings:
    given = [
        name
        for name in ("bits", "group_size", "symmetric", "bits_budget", "layout")
        if getattr(made, name) is not None
    ]
    if given or made.int8_activations:
        word = given[0] if given else "int8 inputs"
        raise ConfigError(f"method {made.method!r} is a cast: it has no {word}")
    if made.dtype not in (None, CASTS[made.method]):
        raise ConfigError(f"method {made.method!r} is a cast and cannot write {made.dtype}")
    made.dtype = CASTS[made.method]
    return made


def check_shapes(settings: Settings, shapes: tuple[LinearShape, ...], names: list[str]) -> None:
    """``ConfigError`` for a group that is wider than every matrix, or a plan's name that is none.

    Args:
        names: The fused matrices.
    """
    widest = max((shape.in_features for shape in shapes), default=0)
    if settings.group_size is not None and settings.group_size > widest:
        raise ConfigError(
            f"group size {settings.group_size} fits no layer: the widest matrix has {widest} "
            "columns; use 64 or 128, or 0 for one scale a row"
        )
    for name in settings.plan:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"the plan names {name!r}, which the model does not have{hint}")
