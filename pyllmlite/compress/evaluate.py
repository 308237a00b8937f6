"""What quantizing cost: loss, size and speed of models beside their reference."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pyllmlite.compress.compare import CHUNK, Score, compare
from pyllmlite.compress.texts import Text, windows_of
from pyllmlite.core.config import EngineConfig
from pyllmlite.core.errors import CapacityError, ConfigError
from pyllmlite.hooks.quantizer import QuantizerNeeds
from pyllmlite.hooks.registry import Registry
from pyllmlite.model.build import Built, build
from pyllmlite.model.hub import DEFAULT_MODEL, cached
from pyllmlite.model.options import Options
from pyllmlite.model.source import ModelSource, open_model

PROVENANCE = "quantize.json"  # what a directory written here says about its making
SPEED_PROMPT, SPEED_NEW = 512, 64
MEMORY_SHARE = 0.5  # of what is free: models that are loaded side by side
FLOAT_INPUTS = "int8_activations"


@dataclass(frozen=True)
class Choice:
    """A model and how it is loaded.

    Attributes:
        model: Path, alias or hub id; None: the default model.
        options: Fields of :class:`~pyllmlite.core.config.EngineConfig`.
    """

    model: str | None
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Choice:
        """``path?quantizer=rtn&bits=4``: a model, and options behind a question mark.  Values are
        JSON where they can be read as such; ``extra.name=value`` is a strategy's own option."""
        model, _, query = text.partition("?")
        return cls(model or None, parse_options(query))

    @property
    def label(self) -> str:
        name = DEFAULT_MODEL if self.model is None else Path(self.model).name or self.model
        words = [str(self.options["quantizer"])] if "quantizer" in self.options else []
        for key, value in self.options.items():
            if key == "extra":
                words += [f"{k}={v}" for k, v in value.items()]
            elif key != "quantizer":
                words.append(f"{key}={value}")
        return f"{name} {' '.join(words)}".strip()


def parse_options(query: str) -> dict[str, Any]:
    """``quantizer=rtn&bits=4&extra.kind=fp4`` as a dict."""
    options: dict[str, Any] = {}
    for pair in filter(None, query.split("&")):
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"model options are NAME=VALUE, joined by '&', got {pair!r}")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        if name.startswith("extra."):
            options.setdefault("extra", {})[name.removeprefix("extra.")] = parsed
        else:
            options[name] = parsed
    return options


@dataclass
class Row:
    """One line of the table.

    Attributes:
        label: As the user named it.
        bits_per_weight: Of the decoder layers' matrices, scales included: as the checkpoint has
            them, or where a quantizer made them while they were loaded, as they are packed.
        weight_bytes: All matrices as they are loaded; ``file_bytes``: tensors on disk.
        kl: Mean ``D(reference || model)``, nats per token; ``kl_error``: its standard error.
        warning: Why the figures flatter; empty: they do not.
    """

    label: str
    bits_per_weight: float
    weight_bytes: int
    file_bytes: int
    kl: float
    kl_error: float
    kl_largest: float
    top1_agreement: float
    perplexity: float
    prefill_tokens_per_second: float | None = None
    decode_tokens_per_second: float | None = None
    warning: str = ""


@dataclass
class Report:
    """What :func:`evaluate` found; ``reference`` is the first row's model beside itself."""

    reference: Row
    reference_dtype: str
    rows: list[Row]
    text: str
    text_sha256: str
    windows: int
    length: int
    weights_only: bool


def evaluate(
    choices: list[Choice],
    text: Text,
    reference: Choice | None = None,
    windows: int = 16,
    length: int = 512,
    weights_only: bool = False,
    speed: bool = True,
    threads: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Report:
    """Models beside a reference.

    Args:
        reference: None: the float32 weights of what the first model was made from, if its directory
            says so and that is on this machine; else of the first model.
        weights_only: Inputs and KV stay floats, so that nothing but the weights is compared;
            without, models run as they do by default.
        speed: Measure prefill of 512 tokens and decode of one sequence, as models run by default.
        progress: Called with what is done, how much of it, and of how much.
    """
    if not choices:
        raise ConfigError("name at least one model")
    tell = progress or (lambda what, done, total: None)
    sources = [open_model(choice.model) for choice in choices]
    reference = reference or _reference_of(choices[0], sources[0])
    base = open_model(reference.model)
    cut = windows_of(text, base.tokenizer(), windows, length)
    tell("loading the reference", 0, 1)
    built, dtype = _load_reference(base, reference, length, threads)
    total = windows * length * len(choices)
    done = 0
    own = Score()
    rows: list[Row] = []
    queue = list(zip(choices, sources, strict=True))
    while queue:
        loaded: list[tuple[Choice, ModelSource, Built]] = []
        room = MEMORY_SHARE * _free_memory()
        while queue and (not loaded or queue[0][1].weight_bytes < room):
            choice, source = queue.pop(0)
            tell(f"loading {choice.label}", done, total)
            loaded.append((choice, source, _load(source, choice, length, threads, weights_only)))
            room -= loaded[-1][2].weight_bytes
        share = len(loaded)

        def count(tokens: int, share: int = share) -> None:
            nonlocal done
            done += tokens * share
            tell("reading windows", done, total)

        own, scores = compare(built, [one for _, _, one in loaded], cut, count)
        for (choice, source, one), score in zip(loaded, scores, strict=True):
            row = _row(choice.label, one, source, score)
            if choice.options.get("quantizer", "none") in ("none", "auto") and source.quantized:
                row.bits_per_weight = stored_bits_per_weight(source)
            row.warning = calibrated_on(source, text)
            rows.append(row)
        del loaded
        gc.collect()
    reference_row = _row(reference.label, built, base, own)
    del built
    gc.collect()
    if speed:
        for i, (choice, source, row) in enumerate(zip(choices, sources, rows, strict=True)):
            tell(f"timing {choice.label}", i, len(rows))
            timed = measure_speed(source, choice, threads)
            row.prefill_tokens_per_second = timed["prefill_tokens_per_second"]
            row.decode_tokens_per_second = timed["decode_tokens_per_second"]
    return Report(
        reference_row, dtype, rows, text.name, text.sha256, windows, length, weights_only
    )


def bits_per_weight(built: Built) -> float:
    """Of the decoder layers' matrices, scales and zero points included."""
    costs = [e.cost for e in built.program.entries if e.name.startswith("layers.")]
    counted = [cost for cost in costs if cost.weight_bytes]
    return 8 * sum(c.weight_bytes for c in counted) / max(sum(c.token_macs for c in counted), 1)


def stored_bits_per_weight(source: ModelSource) -> float:
    """The same as the checkpoint has them; tables of the columns' groups (``g_idx``) and of shapes
    are not counted."""
    stored, count = 0.0, 0
    for name in source.names():
        raw = source.raw(name) if name.startswith("layers.") and name.endswith(".weight") else None
        if raw is None or len(raw.shape) != 2:
            continue
        weights = raw.shape[0] * raw.shape[1]
        whole = max(int(np.prod(raw.base.shape)), 1)  # of which these may be some rows
        tables = getattr(raw.base, "parts", {})
        extra = sum(t.nbytes for word, t in tables.items() if word.endswith(("g_idx", "shape")))
        stored += (raw.base.nbytes - extra) * weights / whole
        count += weights
    return 8 * stored / max(count, 1)


def measure_speed(source: ModelSource, choice: Choice, threads: int | None) -> dict[str, Any]:
    """Prefill and decode of one sequence, as the model runs by default."""
    from pyllmlite.engine.llm import LLM
    from pyllmlite.engine.speed import measure

    prompt = max(2, min(SPEED_PROMPT, source.spec.max_position_embeddings // 2))
    new = max(2, min(SPEED_NEW, source.spec.max_position_embeddings - prompt))
    config = _config(choice, threads, max_model_len=prompt + new, max_num_seqs=1)
    llm = LLM.from_built(build(source, config))
    measure(llm, 1, min(prompt, 64), 2)  # first touch of the weights
    return measure(llm, 1, prompt, new)


def provenance(source: ModelSource) -> dict[str, Any]:
    """What a directory that was written here says about its making; empty for any other."""
    path = source.path / PROVENANCE
    if not source.path.is_dir() or not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def calibrated_on(source: ModelSource, text: Text) -> str:
    """One line if the model was calibrated on the text it is measured on."""
    calibration = provenance(source).get("calibration")
    if not isinstance(calibration, dict):
        return ""
    if calibration.get("sha256") == text.sha256 or calibration.get("text") == text.name:
        return f"it was calibrated on {text.name}, which it is measured on: its loss is flattered"
    return ""


# -- loading -----------------------------------------------------------------------------------
def _reference_of(choice: Choice, source: ModelSource) -> Choice:
    facts = provenance(source)
    beside = facts.get("base_path")
    if isinstance(beside, str) and (source.path / beside).exists():
        return Choice(os.path.normpath(source.path / beside))
    base = facts.get("base_model")
    if isinstance(base, str) and cached(base) is not None:
        return Choice(base)
    return Choice(choice.model)


def _load_reference(
    source: ModelSource, choice: Choice, length: int, threads: int | None
) -> tuple[Built, str]:
    """Float32 weights and KV; bf16 where those do not fit."""
    options = {"quantizer": "none", **choice.options}
    floats = {"kv_cache_dtype": "f32", "dtype": "f32", **options}
    try:
        return build(source, _window_config(Choice(choice.model, floats), length, threads)), "f32"
    except CapacityError:
        if "dtype" in choice.options:
            raise
    halves = {**floats, "dtype": "bf16"}
    return build(source, _window_config(Choice(choice.model, halves), length, threads)), "bf16"


def _load(
    source: ModelSource, choice: Choice, length: int, threads: int | None, weights_only: bool
) -> Built:
    options = dict(choice.options)
    if weights_only:
        options = {"dtype": "f32", "kv_cache_dtype": "f32", **options}
        if _reads_float_inputs(options):
            options["extra"] = {FLOAT_INPUTS: False, **options.get("extra", {})}
    return build(source, _window_config(replace(choice, options=options), length, threads))


def _reads_float_inputs(options: dict[str, Any]) -> bool:
    """Whether the quantizer has an option for float inputs (and takes int8 ones without it)."""
    name = options.get("quantizer", "auto")
    if name == "auto":
        return False  # the floats or codes as they are; with dtype f32 their inputs stay floats
    seen = Options({**options.get("extra", {}), FLOAT_INPUTS: False})
    wanted = {word: options.get(word) for word in ("bits", "group_size", "symmetric")}
    needs = QuantizerNeeds("cpu", "f32", (), **wanted, extra=seen)
    Registry.load().select("quantizer", name, needs).cls(needs)
    return FLOAT_INPUTS in seen.read


def _window_config(choice: Choice, length: int, threads: int | None) -> EngineConfig:
    return _config(
        choice,
        threads,
        max_num_seqs=1,
        max_model_len=length,
        max_num_batched_tokens=CHUNK,
        enable_prefix_caching=False,
    )


def _config(choice: Choice, threads: int | None, **sizes: Any) -> EngineConfig:
    settings = {"skip_tokenizer_init": True, "threads": threads, **choice.options, **sizes}
    return EngineConfig.from_kwargs(**settings)


def _free_memory() -> int:
    from pyllmlite.model.build import available_memory

    return available_memory()


def _row(label: str, built: Built, source: ModelSource, score: Score) -> Row:
    return Row(
        label=label,
        bits_per_weight=bits_per_weight(built),
        weight_bytes=built.weight_bytes,
        file_bytes=source.weight_bytes,
        kl=score.mean_kl,
        kl_error=score.kl_error,
        kl_largest=score.kl_largest,
        top1_agreement=score.agreement,
        perplexity=score.perplexity,
    )
