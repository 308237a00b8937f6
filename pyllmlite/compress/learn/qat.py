"""Quantization-aware training: codes and scales learn to give the float model's distributions.

The student is the quantized model itself, rounded in every forward pass (:mod:`fake_quant`), the
teacher the float model it was made of (LLM-QAT, Liu et al. 2023, section 3), the text what the
teacher writes or a file.  What comes out is the directory that ``pyllmlite quantize`` would write.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllmlite._version import __version__
from pyllmlite.compress.calibration import SELF, calibration_tokens
from pyllmlite.compress.card import model_card, provenance
from pyllmlite.compress.evaluate import PROVENANCE
from pyllmlite.compress.hf_view import HFView
from pyllmlite.compress.layouts import layout_named
from pyllmlite.compress.learn import one_process, require_torch
from pyllmlite.compress.learn.settings import training_plan
from pyllmlite.compress.quantize import Result, measure, quantize_model
from pyllmlite.compress.settings import Settings, completed
from pyllmlite.compress.shard import write_text
from pyllmlite.compress.texts import read_text
from pyllmlite.compress.writer import DirectoryWriter
from pyllmlite.core.errors import ConfigError
from pyllmlite.model.hub import DEFAULT_MODEL
from pyllmlite.model.source import open_model

if TYPE_CHECKING:
    from pyllmlite.compress.learn.fake_quant_model import FakeQuantModel

log = logging.getLogger(__name__)

TOKENS = "tokens.npy"
KEPT = {"log.jsonl": "training.jsonl", "loss.png": "loss.png"}  # of the run, beside the model
BITS = (2, 3, 4, 8)


@dataclass
class QatSettings:
    """What decides the result.

    Attributes:
        bits, group_size, symmetric: The format; see docs/formats.md.  2 and 3 bits are stored in 4.
        start: A quantizer (rtn, gptq, awq-gptq), or a directory that is quantized already.
        layout, dtype: As :class:`~pyllmlite.compress.settings.Settings` has them.
        text: ``self`` (the model writes it), a text file or a data set.
        num_sequences, seq_len: Windows of it to train on.
        steps, batch_size, grad_accumulation: As the trainer has them.
        learning_rate: Of the scales, as shares of what they start from.
        weight_rate: Of the weights, in steps of the quantization's grid, times ``learning_rate``.
        norm_rate: Of norms and biases, times ``learning_rate``; 0: they stay.
        task_weight: Share of the next token's cross entropy in the loss; the rest is the KL
            divergence to the float model.
        precision: float32, or bfloat16 matrix products.
        device: auto (CUDA where there is one), cpu or cuda.
        save_every: Steps between checkpoints of the training.
        extra: Options of the quantizer that makes the start.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    start: str = "gptq"
    layout: str | None = None
    dtype: str | None = None
    text: str = SELF
    num_sequences: int = 256
    seq_len: int = 256
    seed: int = 0
    steps: int = 100
    batch_size: int = 8
    grad_accumulation: int = 1
    learning_rate: float = 1e-3
    weight_rate: float = 5.0
    norm_rate: float = 0.3
    task_weight: float = 0.0
    precision: str = "float32"
    save_every: int = 25
    device: str = "auto"
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"bits must be one of {', '.join(map(str, BITS))}, got {self.bits}")
        for name in ("weight_rate", "norm_rate"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.task_weight <= 1:
            raise ConfigError(f"task_weight must be in [0, 1], got {self.task_weight}")
        if self.seq_len < 2 or self.num_sequences < 1:
            raise ConfigError(
                f"training needs windows of 2 tokens at least, got {self.num_sequences} of "
                f"{self.seq_len}"
            )

    def as_quantizing(self, float_dtype: str) -> Settings:
        """The same format, as the quantizer of the start is asked for it."""
        return Settings(
            method=self.start,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric or None,
            layout=self.layout,
            dtype=self.dtype or float_dtype,
            calibration=self.text,
            seed=self.seed,
            extra=dict(self.extra),
        )

    def shown(self) -> dict[str, Any]:
        """As JSON, for the card."""
        return {"method": "qat", **asdict(self)}


Note = Callable[[str], None]


def qat_model(
    model: str | None,
    out: str | Path,
    settings: QatSettings,
    force: bool = False,
    restart: bool = False,
    eval_windows: int = 8,
    eval_length: int = 512,
    eval_text: str | Path | None = None,
    note: Note | None = None,
    threads: int | None = None,
    progress: bool = True,
) -> Result:
    """Train a quantized model beside its float original, into a directory of its own.

    Everything of the run stands in ``OUT.partial``; the same call goes on from there.

    Args:
        note: Is told what is going on.
    Raises:
        ConfigError, ModelError, PluginError, CapacityError, DivergedError: One line; what was at
            ``out`` is untouched, and checkpoints that were written are kept.
    """
    require_torch()
    one_process("qat")
    started = time.perf_counter()
    tell = note or (lambda text: None)
    source = open_model(model)
    if source.quantized:
        log.warning(
            "%s: its weights are quantized already (%s): the teacher is that model; train the "
            "float one if there is one",
            source.path,
            source.stored_dtype,
        )
    view = HFView(source)
    from pyllmlite.compress.learn.fake_quant_model import check_start
    from pyllmlite.compress.learn.token_windows import check_room

    prose = read_text(eval_text) if eval_windows else None
    quantizing = settings.as_quantizing(view.dtype)
    ready = Path(settings.start).is_dir()
    complete = completed(_castless(quantizing, ready), view)
    assert complete.layout is not None and complete.dtype is not None
    if ready:
        check_start(view, HFView(open_model(settings.start)))
    if settings.seq_len > source.spec.max_position_embeddings:
        raise ConfigError(
            f"seq_len {settings.seq_len} is beyond the model's "
            f"{source.spec.max_position_embeddings} positions"
        )
    check_room(source.spec, 1.0, training_plan(settings, Path(out)))
    identity = {
        **{k: v for k, v in settings.shown().items() if k not in ("save_every", "device")},
        "model": str(source.path),
        "model_bytes": source.weight_bytes,
        "version": __version__,
    }
    layout = layout_named(complete.layout)
    with DirectoryWriter(
        Path(out), view, layout, complete.dtype, identity, force, restart,
        [settings.start, settings.text, *([eval_text] if eval_text else [])],
    ) as writer:  # fmt: skip
        tokens = _tokens(writer.scratch, source, settings, tell)
        writer.keep()
        start = Path(settings.start)
        if not ready:
            start = writer.scratch / "start"
            if not start.is_dir():
                tell(f"the start: {settings.start}")
                quantize_model(model, start, quantizing, eval_windows=0)
        student, history = train(
            view, HFView(open_model(str(start))), settings, complete.dtype, tokens,
            writer.scratch / "train", tell, progress,
        )  # fmt: skip
        made = {"layout": complete.layout, "dtype": complete.dtype, **student.format()}
        if ready:
            made["start"] = start.resolve().name
        tell("writing")
        for result in student.results():
            if writer.done(result.index) is None:
                writer.add(result)
        del student
        partial = writer.finish(tell)
        for name, kept in KEPT.items():
            if (writer.scratch / "train" / name).is_file():
                shutil.copyfile(writer.scratch / "train" / name, partial / kept)
        measured = None
        if prose is not None:
            tell("measuring the loss")
            measured = measure(model, partial, prose, eval_windows, eval_length, threads, tell)
        local = model is not None and Path(model).expanduser().exists()
        facts = provenance(
            source.path.name if local else model or DEFAULT_MODEL,
            os.path.relpath(source.path, writer.out) if local else None,
            {**settings.shown(), **made},
            {"text": settings.text, "num_sequences": settings.num_sequences,
             "seq_len": settings.seq_len, "seed": settings.seed,
             "sha256": _sha256(settings.text)},
            writer.weight_bits(),
            writer.loss(),
            measured,
        )  # fmt: skip
        facts["training"] = history
        write_text(partial / PROVENANCE, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        write_text(partial / "README.md", model_card(writer.out.name, facts))
        path = writer.publish()
    return Result(path, facts, time.perf_counter() - started)


def train(
    view: HFView,
    start: HFView,
    settings: QatSettings,
    dtype: str,
    tokens: np.ndarray,
    out: Path,
    note: Note | None = None,
    progress: bool = True,
) -> tuple[FakeQuantModel, dict[str, Any]]:
    """The trained student, and what the training says of itself.

    Args:
        view: The float model, the teacher.
        start: The quantized one.
        dtype: What floats will be stored as.
        tokens: ``[windows, length]``.
        out: Directory of the training: checkpoint, log, plot.
    """
    from pyllmlite.compress.layered_model import LayeredModel
    from pyllmlite.compress.learn.fake_quant_model import FakeQuantModel
    from pyllmlite.compress.learn.token_windows import BesideTeacher, TokenWindows
    from pyllmlite.compress.learn.trainer import Trainer

    tell = note or (lambda text: None)
    tell("loading the float model and the start")
    student = FakeQuantModel(view, start, settings.bits, dtype)
    teacher = LayeredModel(view.source).fill()
    rates = {"latent": settings.weight_rate, "ratio": 1.0, "norms": settings.norm_rate}
    learning = student.learn(
        weights=settings.weight_rate > 0, scales=True, norms=settings.norm_rate > 0
    )
    trainer = Trainer(
        student.module,
        BesideTeacher(teacher, settings.task_weight),
        TokenWindows(tokens, settings.batch_size, settings.seed),
        training_plan(settings, out),
        parameter_groups=lambda module: [
            {"params": group, "lr_ratio": rates[name], "weight_decay": 0.0}
            for name, group in learning.items()
        ],
        progress=progress,
    )
    history = trainer.run()
    student.module.eval()
    records = [record for record in history if "loss" in record]
    learned = {name: sum(p.numel() for p in group) for name, group in learning.items()}
    return student, {
        "steps": settings.steps,
        "tokens": int(sum(record.get("tokens", 0) for record in records)),
        "first_loss": records[0]["loss"],
        "last_loss": records[-1]["loss"],
        "learned": learned,
    }


def _castless(quantizing: Settings, ready: bool) -> Settings:
    """With a method that stands for any, where the start is a directory."""
    if ready:
        quantizing.method = "rtn"
    elif quantizing.is_cast:
        raise ConfigError(
            f"{quantizing.method!r} is a cast; the start is a quantizer: rtn, gptq, awq-gptq"
        )
    return quantizing


def _sha256(text: str) -> str | None:
    """Of a text file, so that it is known when a model is measured on what it learned."""
    path = Path(text)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def _tokens(scratch: Path, source: Any, settings: QatSettings, note: Note) -> np.ndarray:
    """The text, kept for a run that goes on."""
    path = scratch / TOKENS
    wanted = (settings.num_sequences, settings.seq_len)
    if path.is_file():
        try:
            tokens = np.load(path, allow_pickle=False)
        except (OSError, ValueError):
            tokens = np.empty((0, 0), np.int32)
        if tokens.shape == wanted:
            return tokens
    note("text to train on")
    # Another seed than the calibration's of the start: other text.
    tokens = calibration_tokens(
        source, settings.text, *wanted, settings.seed + 1,
        lambda done, total: note(f"text to train on: {done} of {total} sequences"),
    )  # fmt: skip
    partial_file = path.with_suffix(".part.npy")
    np.save(partial_file, tokens, allow_pickle=False)
    os.replace(partial_file, path)
    return tokens
