"""One command's work: open a model, quantize it layer by layer, write it, measure it."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pyllmlite._version import __version__
from pyllmlite.compress import rowwise
from pyllmlite.compress.calibrated import CalibratedMethod
from pyllmlite.compress.card import model_card, provenance
from pyllmlite.compress.evaluate import PROVENANCE, Choice, evaluate
from pyllmlite.compress.hf_view import HFView
from pyllmlite.compress.layer_result import LayerResult
from pyllmlite.compress.layouts import layout_named
from pyllmlite.compress.settings import SELF, Settings, check_shapes, completed
from pyllmlite.compress.shard import write_text
from pyllmlite.compress.texts import Text, read_text
from pyllmlite.compress.writer import DirectoryWriter
from pyllmlite.core.weights import LinearShape
from pyllmlite.hooks.quantizer import Quantizer, QuantizerNeeds
from pyllmlite.hooks.registry import Registry
from pyllmlite.model.hub import DEFAULT_MODEL
from pyllmlite.model.options import Options
from pyllmlite.model.source import ModelSource, open_model

log = logging.getLogger(__name__)


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
    if source.quantized and not settings.is_cast:
        log.warning(
            "%s: its weights are quantized already (%s) and are rounded once more: the losses add "
            "up; quantize the float model if there is one",
            source.path,
            source.stored_dtype,
        )
    prose = read_text(eval_text) if eval_windows else None
    method = method_of(settings, view)
    _say_what_is_not_used(settings, method.calibrated)
    layout = None
    if settings.layout is not None:
        layout = layout_named(settings.layout, settings.int8_activations)
    identity = {
        **settings.shown(method.calibrated),
        "model": str(source.path),
        "model_bytes": source.weight_bytes,
        "version": __version__,
        **({"calibration_sha256": method.text_sha256} if method.text_sha256 else {}),
    }
    with DirectoryWriter(
        Path(out), view, layout, settings.dtype or view.dtype, identity, force, restart,
        [settings.calibration, *([eval_text] if eval_text else [])],
    ) as writer:  # fmt: skip
        watcher.start(writer.num_layers, len(writer.resumed))
        before = time.perf_counter()
        for result in method.layers(writer.done, watcher.note, writer.scratch):
            resumed = result.index in writer.resumed
            if not resumed:
                writer.add(result)
            now = time.perf_counter()
            watcher.layer(result.index, now - before, resumed)
            before = now
        partial = writer.finish(watcher.note)
        measured = None
        if prose is not None:
            measured = measure(
                model, partial, prose, eval_windows, eval_length, threads, watcher.note
            )
        local = model is not None and Path(model).expanduser().exists()
        facts = provenance(
            source.path.name if local else model or DEFAULT_MODEL,
            os.path.relpath(source.path, writer.out) if local else None,
            {**settings.shown(method.calibrated), **method.planned},
            method.facts(),
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
class PlainMethod:
    """A method that looks at the weights alone; without quantizers a cast.

    Args:
        quantizers: One for every number of bits; None as a key: what is not in the plan.
    """

    calibrated = False
    text_sha256: str | None = None
    planned: Mapping[str, Any] = MappingProxyType({})

    def __init__(
        self, view: HFView, settings: Settings, quantizers: dict[int | None, Quantizer]
    ) -> None:
        self.view = view
        self.settings = settings
        self.quantizers = quantizers

    def layers(
        self,
        done: Callable[[int], LayerResult | None],
        note: Callable[[str], None],
        scratch: Path,
    ) -> Iterator[LayerResult]:
        return rowwise.quantize_layers(self.view, self._of if self.quantizers else None, done, note)

    def _of(self, matrix: str) -> Quantizer:
        return self.quantizers[self.settings.plan.get(matrix)]

    def facts(self) -> dict[str, Any] | None:
        return None


def method_of(settings: Settings, view: HFView) -> PlainMethod | CalibratedMethod:
    """The method by name; what it cannot do is refused here.

    Raises:
        PluginError: The name is unknown, or the method says why it cannot do what is asked.
        ConfigError: Options that fit no layer, or that the method does not read.
    """
    if settings.is_cast:
        return PlainMethod(view, settings, {})
    layers = range(view.source.spec.num_layers)
    modules = [(i, module) for i in layers for module in view.modules(i)]
    shapes = tuple(LinearShape(m.name, m.kind, *m.shape) for _, m in modules)
    check_shapes(settings, shapes, [f"layers.{i}.{m.kind}" for i, m in modules])
    registry = Registry.load()
    quantizers: dict[int | None, Quantizer] = {}
    for planned in dict.fromkeys([None, *settings.plan.values()]):
        options = Options(dict(settings.extra))
        options.hint("integer_zeros", True)
        needs = QuantizerNeeds(
            "cpu", "f32", shapes, planned or settings.bits, settings.group_size,
            settings.symmetric, options,
        )  # fmt: skip
        chosen = registry.select("quantizer", settings.method, needs).cls
        if chosen.needs_calibration or settings.bits_budget is not None:
            return CalibratedMethod(view, settings)
        quantizers[planned] = chosen(needs)
        options.check()
    return PlainMethod(view, settings, quantizers)


def _say_what_is_not_used(settings: Settings, calibrated: bool) -> None:
    given = [name for name in ("num_sequences", "seq_len") if getattr(settings, name) is not None]
    given += ["calibration"] if settings.calibration != SELF else []
    if given and not calibrated:
        log.warning(
            "method %s looks at the weights alone: %s is not used",
            settings.method,
            ", ".join(given),
        )
    few = sorted({bits for bits in (settings.bits, *settings.plan.values()) if bits in (2, 3)})
    if few:
        log.warning(
            "%s bits are stored in 4, which is what the kernels and layouts hold: the directory is "
            "no smaller than with 4",
            " and ".join(map(str, few)),
        )


# -- the end -----------------------------------------------------------------------------------
def measure(
    model: str | None,
    partial: Path,
    text: Text,
    windows: int,
    length: int,
    threads: int | None,
    note: Callable[[str], None],
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
        progress=lambda what, done, total: note(f"measuring the loss: {what}"),
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

