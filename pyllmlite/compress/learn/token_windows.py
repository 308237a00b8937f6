"""Training on windows of tokens, beside a teacher that is asked as the student learns."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pyllmlite.compress.learn import losses
from pyllmlite.compress.learn.head import Head, chunked_sum
from pyllmlite.compress.learn.memory import WEIGHT_BYTES, check_memory
from pyllmlite.core.errors import ConfigError

if TYPE_CHECKING:
    from pyllmlite.compress.learn.settings import TrainSettings
    from pyllmlite.core.spec import ModelSpec


class TokenWindows:
    """Windows of equal length, in an order drawn anew for every epoch.

    A batch is a dict: ``input_ids`` int64 ``[batch, length]``, ``targets`` the token behind each,
    :data:`~pyllmlite.compress.learn.losses.IGNORE` behind the last.

    Args:
        tokens: ``[windows, length]``.
        batch_size: Windows of a micro-batch; at most all of them.
    """

    def __init__(self, tokens: np.ndarray, batch_size: int, seed: int) -> None:
        if tokens.ndim != 2 or not tokens.size or tokens.shape[1] < 2:
            raise ConfigError("training needs at least one window of two tokens")
        self.tokens = tokens.astype(np.int64)
        self.batch_size = min(batch_size, len(tokens))
        self.seed = seed

    def batch(self, index: int) -> dict[str, Any]:
        per_epoch = len(self.tokens) // self.batch_size  # what is left over waits for an epoch
        epoch, at = divmod(index, per_epoch)
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.tokens))
        chosen = self.tokens[order[at * self.batch_size : (at + 1) * self.batch_size]]
        targets = np.full_like(chosen, losses.IGNORE)
        targets[:, :-1] = chosen[:, 1:]
        return {"input_ids": torch.from_numpy(chosen), "targets": torch.from_numpy(targets)}


class BesideTeacher:
    """``(1 - task_weight) * KL(teacher || student) + task_weight * cross entropy``, the first over
    every position, the second over those that have a next token; both over the whole vocabulary.

    Args:
        teacher: transformers' causal language model, frozen, on the student's device; None: the
            task alone.
        task_weight: In [0, 1].
    """

    def __init__(self, teacher: Any, task_weight: float = 0.0) -> None:
        if not 0 <= task_weight <= 1:
            raise ConfigError(f"task_weight must be in [0, 1], got {task_weight}")
        self.teacher = teacher
        self.task_weight = 1.0 if teacher is None else task_weight

    def __call__(self, module: Any, batch: dict[str, Any]) -> tuple[Any, dict[str, float]]:
        head, ids = Head(module), batch["input_ids"]
        hidden = head.body(ids).flatten(0, 1)
        targets = batch["targets"].flatten()
        judge = judged = None
        if self.task_weight < 1:
            judge = Head(self.teacher.to(ids.device))
            with torch.no_grad():
                judged = judge.body(ids).flatten(0, 1)
        tokens = len(targets)
        predicted = max(int((targets != losses.IGNORE).sum()), 1)

        def loss(part: Any, first: int, last: int) -> tuple[Any, dict[str, float]]:
            logits = head(part)
            total = torch.zeros((), dtype=logits.dtype, device=logits.device)
            metrics = {}
            if judge is not None and judged is not None:
                with torch.no_grad():
                    theirs = judge(judged[first:last])
                kl = losses.full_divergence(logits, theirs).sum() / tokens
                metrics["kl"] = float(kl.detach())
                total = total + (1 - self.task_weight) * kl
            if self.task_weight:
                entropy = losses.cross_entropy(logits, targets[first:last]).sum() / predicted
                metrics["cross_entropy"] = float(entropy.detach())
                total = total + self.task_weight * entropy
            return total, metrics

        total, sums = chunked_sum(hidden, loss, head.trained)
        return total, {**sums, "tokens": float(tokens)}


def check_room(spec: ModelSpec, trained_share: float, plan: TrainSettings) -> None:
    """``CapacityError`` before a student and its teacher are loaded, where they will not fit.

    Args:
        trained_share: Of the weights, those that learn.
    """
    from pyllmlite.model.build import available_memory
    from pyllmlite.model.source import tensor_shapes

    count = sum(math.prod(shape) for shape, _ in tensor_shapes(spec).values())
    sizes = SimpleNamespace(
        hidden_size=spec.hidden_size, num_hidden_layers=spec.num_layers,
        intermediate_size=spec.intermediate_size, vocab_size=spec.vocab_size,
    )  # fmt: skip
    check_memory(
        count, round(trained_share * count), sizes, plan, available_memory(), loaded=False,
        others=WEIGHT_BYTES * count,
    )  # fmt: skip


def without_dropout(module: Any) -> Any:
    """The module, for a training in which nothing is dropped at random: it learns one function."""
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)
    return module


def mean_losses(
    module: Any, teacher: Any, windows: list[list[int]] | np.ndarray
) -> dict[str, float]:
    """``kl`` (where there is a teacher) and ``cross_entropy`` over windows, nats a token."""
    was_training, device = module.training, next(module.parameters()).device
    module.eval()
    sums: dict[str, float] = {}
    try:
        with torch.no_grad():
            for window in windows:
                batch = TokenWindows(np.asarray(window)[None], 1, 0).batch(0)
                one = {name: tensor.to(device) for name, tensor in batch.items()}
                _, found = BesideTeacher(teacher, 0.5)(module, one)
                for name in ("kl", "cross_entropy"):
                    if name in found:
                        sums[name] = sums.get(name, 0.0) + found[name]
    finally:
        module.train(was_training)
    return {name: total / len(windows) for name, total in sums.items()}
