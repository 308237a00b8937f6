"""One command's work: open a model, quantize it layer by layer, write it, measure it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyllmlite._version import __version__
from pyllmlite.compress import rowwise
from pyllmlite.compress.card import model_card, provenance
from pyllmlite.compress.evaluate import PROVENANCE, Choice, evaluate
from pyllmlite.compress.hf_view import HFView
from pyllmlite.compress.layer_result import LayerResult
from pyllmlite.compress.layouts import ALIASES, Layout, layout_named
from pyllmlite.compress.shard import write_text
from pyllmlite.compress.texts import Text, read_text
from pyllmlite.compress.writer import DirectoryWriter
from pyllmlite.core.errors import ConfigError
from pyllmlite.core.weights import LinearShape
from pyllmlite.hooks.quantizer import Quantizer, QuantizerNeeds
from pyllmlite.hooks.registry import Registry
from pyllmlite.model.hub import DEFAULT_MODEL
from pyllmlite.model.options import Options
from pyllmlite.model.source import ModelSource, open_model

CASTS = {"f32": "f32", "float32": "f32", "bf16": "bf16", "bfloat16": "bf16", "f16": "f16",
         "fp16": "f16", "float16": "f16"}  # fmt: skip
DTYPES = ("f32", "bf16", "f16")
SELF = "self"


@dataclass
class Settings:
    """What decides the result.

    Attributes:
        method: A quantizer by name, or a cast: f32, bf16, f16.
        bits, group_size, symmetric: None: the method's own.
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
    bits_budget: float | None = None
    layout: str | None = None
    int8_activations: bool = False
    dtype: str | None = None
    calibration: str = SELF
    num_sequences: int | None = None
    seq_len: int | None = None
    seed: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


class Watcher:
    """Is told how far the work is; this one says nothing."""

    def start(self, num_layers: int, resumed: int) -> None:
        """Layers in all, and those that an earlier run has made."""

    def layer(self, index: int, seconds: float, resumed: bool) -> None:
        """A layer is written."""

    def note(self, text: str) -> None:
        """What is going on now."""


@dataclass
class Result:
    """Where it lies and what ``quantize.json`` says."""

    path: Path
    facts: dict[str, Any]
    seconds: float


def quantize_model(
    model: str | None,
    out: str | Path,
    settings: Settings,
    force: bool = False,
    restart: bool = False,
    eval_windows: int = 8,
    eval_length: int = 512,
    eval_text: str | Path | None = None,
    watcher: Watcher | None = None,
    threads: int | None = None,
) -> Result:
    """Quantize a model into a directory of its own.

    Args:
        eval_windows: Windows of text to measure the loss on; 0: it is not measured.
    Raises:
        ConfigError, ModelError, PluginError: One line; what was at ``out`` is untouched.
    """
    started = time.perf_counter()
    watcher = watcher or Watcher()
    source = open_model(model)
    view = HFView(source)
    settings = completed(settings, view)
    prose = read_text(eval_text) if eval_windows else None
    method = method_of(settings, view)
    layout = None
    if settings.layout is not None:
        layout = layout_named(settings.layout, settings.int8_activations)
    identity = {
        **asdict(settings),
        "model": str(source.path),
        "model_bytes": source.weight_bytes,
        "version": __version__,
        **({"calibration_sha256": method.text_sha256} if method.text_sha256 else {}),
    }
    with DirectoryWriter(
        Path(out), view, layout, settings.dtype or view.dtype, identity, force, restart
    ) as writer:
        watcher.start(writer.num_layers, len(writer.resumed))
        before = time.perf_counter()
        for result in method.layers(writer.done, watcher.note):
            resumed = result.index in writer.resumed
            if not resumed:
                writer.add(result)
            now = time.perf_counter()
            watcher.layer(result.index, now - before, resumed)
            before = now
        partial = writer.finish(watcher.note)
        measured = None
        if prose is not None:
            measured = _measure(model, partial, prose, eval_windows, eval_length, threads, watcher)
        shown = asdict(settings) if method.calibrated else _without_calibration(settings)
        local = model is not None and Path(model).expanduser().exists()
        facts = provenance(
            source.path.name if local else model or DEFAULT_MODEL,
            os.path.relpath(source.path, writer.out) if local else None,
            shown,
            method.calibration(settings),
            writer.weight_bits(),
            writer.loss(),
            measured,
        )
        text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
        write_text(partial / PROVENANCE, text)
        write_text(partial / "README.md", model_card(writer.out.name, facts))
        path = writer.publish()
    return Result(path, facts, time.perf_counter() - started)


# -- methods -----------------------------------------------------------------------------------
class Method:
    """A method that is ready to go through the layers.

    Attributes:
        calibrated: It looks at what flows through the model.
        text_sha256: Of a calibration file's content, so that a changed file is not gone on with.
    """

    calibrated = False
    text_sha256: str | None = None

    def __init__(self, view: HFView, quantizer: Quantizer | None) -> None:
        self.view = view
        self.quantizer = quantizer

    def layers(
        self, done: Callable[[int], LayerResult | None], note: Callable[[str], None]
    ) -> Iterator[LayerResult]:
        return rowwise.quantize_layers(self.view, self.quantizer, done, note)

    def calibration(self, settings: Settings) -> dict[str, Any] | None:
        """What the card says of it."""
        return None


def method_of(settings: Settings, view: HFView) -> Method:
    """The method by name; what it cannot do is refused here.

    Raises:
        PluginError: The name is unknown, or the method says why it cannot do what is asked.
        ConfigError: Options that fit no layer, or that the method does not read.
    """
    if settings.method in CASTS:
        return Method(view, None)
    shapes = tuple(
        LinearShape(module.name, module.kind, *module.shape)
        for i in range(view.source.spec.num_layers)
        for module in view.modules(i)
    )
    check_group_size(settings.group_size, shapes)
    options = Options(dict(settings.extra))
    if settings.symmetric is not True:
        # Layouts have integer zero points: a method that has the choice is told so.
        dict.setdefault(options, "zero_points", True)
        options.read.add("zero_points")
    needs = QuantizerNeeds(
        "cpu", "f32", shapes, settings.bits, settings.group_size, settings.symmetric, options
    )
    chosen = Registry.load().select("quantizer", settings.method, needs).cls
    quantizer = chosen(needs)
    if quantizer.needs_calibration or settings.bits_budget is not None:
        raise ConfigError(f"method {settings.method!r} needs calibration, which is not built in yet")
    options.check()
    return Method(view, quantizer)


def check_group_size(group_size: int | None, shapes: tuple[LinearShape, ...]) -> None:
    """``ConfigError`` for a group that is wider than every matrix."""
    widest = max((shape.in_features for shape in shapes), default=0)
    if group_size is not None and group_size > widest:
        raise ConfigError(
            f"group size {group_size} fits no layer: the widest matrix has {widest} columns; use 64 "
            "or 128, or 0 for one scale a row"
        )


def completed(settings: Settings, view: HFView) -> Settings:
    """Settings with what was left open decided; ``ConfigError`` for what does not go together."""
    made = Settings(**asdict(settings))
    if made.dtype is not None and made.dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {made.dtype!r}")
    if made.method in CASTS:
        given = [n for n in ("bits", "group_size", "symmetric", "bits_budget", "layout")
                 if getattr(made, n) is not None]  # fmt: skip
        if given or made.int8_activations:
            raise ConfigError(
                f"method {made.method!r} is a cast: it has no {given[0] if given else 'int8 inputs'}"
            )
        if made.dtype not in (None, CASTS[made.method]):
            raise ConfigError(f"method {made.method!r} is a cast and cannot write {made.dtype}")
        made.dtype = CASTS[made.method]
        return made
    made.dtype = made.dtype or view.dtype
    if made.layout is None:
        made.layout = "int-quantized" if made.int8_activations else "pack-quantized"
    made.layout = ALIASES.get(made.layout, made.layout)
    if made.layout == "gptq" and made.symmetric is not True and (made.bits or 4) != 8:
        made.layout = "gptq_v2"  # which holds a zero point of 0
    if made.layout == "int-quantized":
        if made.bits not in (None, 8):
            raise ConfigError(f"int-quantized holds 8 bits, not {made.bits}; use pack-quantized")
        made.bits = 8
    return made


def _without_calibration(settings: Settings) -> dict[str, Any]:
    named = ("calibration", "num_sequences", "seq_len", "seed")
    return {name: value for name, value in asdict(settings).items() if name not in named}


def file_sha256(path: str) -> str | None:
    """Of a file's bytes; None: it is no file."""
    if not Path(path).is_file():
        return None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# -- the end -----------------------------------------------------------------------------------
def _measure(
    model: str | None,
    partial: Path,
    text: Text,
    windows: int,
    length: int,
    threads: int | None,
    watcher: Watcher,
) -> dict[str, Any]:
    """Loss of the written directory, beside the model that it was made from."""
    source: ModelSource = open_model(partial)
    report = evaluate(
        [Choice(str(partial))],
        text,
        Choice(model),
        windows,
        min(length, source.spec.max_position_embeddings),
        weights_only=True,
        speed=False,
        threads=threads,
        progress=lambda what, done, total: watcher.note(f"measuring the loss: {what}"),
    )
    row = report.rows[0]
    return {
        "text": report.text,
        "text_sha256": report.text_sha256,
        "windows": report.windows,
        "length": report.length,
        "reference_dtype": report.reference_dtype,
        "kl": row.kl,
        "kl_error": row.kl_error,
        "top1_agreement": row.top1_agreement,
        "perplexity": row.perplexity,
        "reference_perplexity": report.reference.perplexity,
        "warning": row.warning,
    }

