"""What decides a distilled student."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pyllmlite.compress.learn.settings import NAMES, TrainSettings
from pyllmlite.compress.learn.teacher_text import TextSettings
from pyllmlite.core.errors import ConfigError

MODES = ("logits", "sequence", "on-policy", "text")


@dataclass(frozen=True)
class DistillSettings:
    """What decides the student.

    Attributes:
        mode: ``logits`` (the teacher's stored distributions), ``sequence`` (its words),
            ``on-policy`` (it scores what the student writes); ``text``: only its words are written.
        direction: ``forward``, ``reverse``, or the share of reverse in a mix; None: forward, and
            reverse on-policy.
        temperature: Of both distributions.
        top_k: Tokens of a stored distribution.
        task_weight: Share of the cross entropy with the teacher's words.
        share: On-policy: part of the micro-batches that the student writes.
        freeze_embeddings: Embedding and output matrix stay the teacher's.
        held_out: Answers of the teacher to measure on, which are not trained on.
        text: How the teacher writes.
        data: A file that was written before; None: it is written now.
        epochs: Passes over the text, if ``train`` gives no ``steps``.
        train: Words of :class:`~pyllmlite.compress.learn.settings.TrainSettings`.
        teacher_options: ``LLM``'s words for the teacher while it writes (``quantizer``, ``bits``).
        scorer_dtype: Weights of the teacher while it scores: f32 or bf16.
        dtype: Of the student that comes out: f32, bf16, f16; None: the teacher's.
    """

    mode: str = "logits"
    direction: str | float | None = None
    temperature: float = 1.0
    top_k: int = 64
    task_weight: float = 0.0
    share: float = 1.0
    freeze_embeddings: bool = False
    held_out: int = 32
    text: TextSettings = field(default_factory=TextSettings)
    data: str | None = None
    epochs: float = 1.0
    train: dict[str, Any] = field(default_factory=dict)
    teacher_options: dict[str, Any] = field(default_factory=dict)
    scorer_dtype: str = "f32"
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        known = self.direction in (None, "forward", "reverse")
        if not known and not (isinstance(self.direction, float) and 0 <= self.direction <= 1):
            raise ConfigError(
                "direction must be forward, reverse or the share of reverse in [0, 1], got "
                f"{self.direction!r}"
            )
        for name, low, high in (
            ("temperature", 1e-3, 1e3), ("task_weight", 0, 1), ("share", 0, 1),
            ("epochs", 1e-9, 1e9),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not low <= value <= high:
                raise ConfigError(f"{name} must be in [{low}, {high}], got {value!r}")
        for name, least in (("top_k", 1), ("held_out", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.scorer_dtype not in ("f32", "bf16"):
            raise ConfigError(f"scorer_dtype must be f32 or bf16, got {self.scorer_dtype!r}")
        if self.mode == "text" and self.data is not None:
            raise ConfigError("mode text writes the text, and data names one that is there")
        if self.dtype not in (None, "f32", "bf16", "f16"):
            raise ConfigError(f"dtype must be f32, bf16 or f16, got {self.dtype!r}")
        for name in self.train:
            if name not in NAMES or name == "out":
                raise ConfigError(f"unknown option of training: {name!r}")
        self.train_settings("", 1)  # its own checks

    def train_settings(self, out: str | Path, steps: int) -> TrainSettings:
        words = {k: v for k, v in self.train.items() if v is not None}
        return TrainSettings(**{"steps": steps, "seq_len": 512, **words, "out": out})

    @property
    def chosen_direction(self) -> str | float:
        if self.direction is not None:
            return self.direction
        return "reverse" if self.mode == "on-policy" else "forward"

    def deciding(self) -> dict[str, Any]:
        free = ("save_every", "eval_every", "device", "restart")
        train = {k: v for k, v in self.train.items() if k not in free}
        return {**asdict(self), "train": train}
