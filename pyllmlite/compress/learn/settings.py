"""What decides a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pyllmlite.core.errors import ConfigError

SCHEDULES = ("cosine", "linear", "constant")
DTYPES = ("float32", "bfloat16")
# Where a run writes, how often, and on what: these change no weight.
_FREE = ("out", "save_every", "eval_every", "device", "restart")


@dataclass(frozen=True)
class TrainSettings:
    """Words are transformers' and accelerate's wherever they have them.

    Attributes:
        steps: Optimizer steps.
        out: Directory of the run: ``checkpoint.pt``, ``log.jsonl``, ``loss.png``.
        batch_size: Sequences of one micro-batch of one process.
        seq_len: Tokens of a sequence at most; it is what memory is reckoned with.
        grad_accumulation: Micro-batches of a step, in each process.
        learning_rate: At the top of the schedule.
        warmup: Steps in which it rises from 0; below 1: that share of all steps.
        schedule: ``cosine``, ``linear`` (both fall to ``final_ratio``) or ``constant``.
        final_ratio: Learning rate at the last step as a part of ``learning_rate``.
        weight_decay: Decoupled (Loshchilov & Hutter 2019), of matrices only.
        beta1, beta2, epsilon: Of AdamW.
        clip_norm: Largest norm of the whole gradient; 0: it is not clipped.
        seed: Of everything random; with the same number of processes and micro-batches a seed is
            one result.
        dtype: ``bfloat16``: matrices are multiplied in bf16 (autocast); weights, gradients and
            optimizer state stay float32.
        save_every: Steps between checkpoints; 0: one at the end.
        eval_every: Steps between calls of ``evaluate``; 0: at the end only.
        device: ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.
        restart: Throw away what an earlier run left in ``out`` instead of going on with it.
    """

    steps: int
    out: str | Path
    batch_size: int = 8
    seq_len: int = 512
    grad_accumulation: int = 1
    learning_rate: float = 1e-4
    warmup: float = 0.05
    schedule: str = "cosine"
    final_ratio: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    save_every: int = 0
    eval_every: int = 0
    device: str = "auto"
    restart: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1), ("batch_size", 1), ("seq_len", 1), ("grad_accumulation", 1),
            ("save_every", 0), ("eval_every", 0),
        ):  # fmt: skip
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name, low, high in (
            ("learning_rate", 0.0, math.inf), ("warmup", 0.0, math.inf),
            ("final_ratio", 0.0, 1.0), ("weight_decay", 0.0, math.inf), ("beta1", 0.0, 1.0),
            ("beta2", 0.0, 1.0), ("epsilon", 0.0, math.inf), ("clip_norm", 0.0, math.inf),
        ):  # fmt: skip
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or not low <= value <= high:
                raise ConfigError(f"{name} must be in [{low}, {high}], got {value!r}")
        if type(self.seed) is not int or not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be an integer in [0, 2**32), got {self.seed!r}")
        for name, known in (("schedule", SCHEDULES), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup * self.steps) if self.warmup < 1 else round(self.warmup)

    def learning_rate_at(self, step: int) -> float:
        """Of step ``step``, counted from 0."""
        warmup = self.warmup_steps
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        if self.schedule == "constant":
            return self.learning_rate
        done = min((step - warmup) / max(self.steps - warmup, 1), 1.0)
        fall = 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.learning_rate * (self.final_ratio + (1 - self.final_ratio) * fall)

    def deciding(self) -> dict[str, Any]:
        """What a run that goes on must have in common with the one that began."""
        return {k: v for k, v in asdict(self).items() if k not in _FREE}


NAMES = tuple(f.name for f in fields(TrainSettings))


def training_plan(settings: Any, out: Path) -> TrainSettings:
    """The trainer's words for the settings of a command that trains (``qat``, ``share-kv``)."""
    return TrainSettings(
        steps=settings.steps,
        out=out,
        batch_size=settings.batch_size,
        seq_len=settings.seq_len,
        grad_accumulation=settings.grad_accumulation,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        dtype=settings.precision,
        save_every=settings.save_every,
        device=settings.device,
    )
