"""What a student is trained for: the teacher's words, its distributions, or its judgement.

Each is a callable (module, batch) to (mean loss over the targets, metrics), as
:class:`~pyllmlite.compress.learn.trainer.Trainer` wants it.
"""

from __future__ import annotations

from typing import Any

import torch

from pyllmlite.compress.learn import losses
from pyllmlite.compress.learn.head import Head, chunked_sum
from pyllmlite.compress.learn.losses import IGNORE
from pyllmlite.compress.learn.sampling import sample
from pyllmlite.core.errors import ModelError


class SequenceLevel:
    """The next token of what the teacher wrote (Kim & Rush 2016): cross entropy."""

    def __call__(self, module: Any, batch: dict[str, Any]) -> tuple[Any, dict[str, float]]:
        head = Head(module)
        hidden, targets = _at_targets(head, batch)

        def loss(part: Any, first: int, last: int) -> tuple[Any, dict[str, float]]:
            value = losses.cross_entropy(head(part), targets[first:last]).sum()
            return value, {}

        total, _ = chunked_sum(hidden, loss, head.trained)
        return _mean(total, {}, len(targets))


class LogitDistillation:
    """The teacher's stored distributions over what it wrote (Hinton et al. 2015).

    Args:
        temperature: That of the stored distributions.
        direction: ``forward``, ``reverse``, or a number in [0, 1]: the share of reverse.
        task_weight: Share of the cross entropy with the teacher's words.
    """

    def __init__(
        self, temperature: float = 1.0, direction: str | float = "forward", task_weight: float = 0.0
    ) -> None:
        self.temperature, self.task_weight = temperature, task_weight
        self.parts = directions(direction)

    def __call__(self, module: Any, batch: dict[str, Any]) -> tuple[Any, dict[str, float]]:
        head = Head(module)
        hidden, targets = _at_targets(head, batch)
        ids, log_probs, tail = batch["topk_ids"], batch["topk_log_probs"], batch["tail"]

        def loss(part: Any, first: int, last: int) -> tuple[Any, dict[str, float]]:
            logits = head(part)
            rows = slice(first, last)
            kl = sum(
                share * losses.topk_divergence(
                    logits, ids[rows], log_probs[rows], self.temperature, direction, tail[rows]
                ).sum()
                for direction, share in self.parts
            )  # fmt: skip
            return _mixed(logits, targets[rows], kl, self.task_weight)

        total, sums = chunked_sum(hidden, loss, head.trained)
        return _mean(total, sums, len(targets))


class OnPolicy:
    """The student writes, the teacher scores: the divergence over the student's own words, without
    a gradient through the writing (Agarwal et al. 2024, GKD; its lambda is ``share``).

    Args:
        teacher: transformers' model, frozen, on the student's device.
        direction: As in :class:`LogitDistillation`; GKD's case is ``reverse``.
        share: Part of the micro-batches that the student writes; the others are the teacher's.
        max_tokens: The student writes at most; fewer where prompt and answer would come to more
            than ``seq_len``, if that is given.
        sampling_temperature: It writes at this temperature.
        eos: Tokens that end an answer.
        seed: With the batch's index it decides who writes.
    """

    def __init__(
        self,
        teacher: Any,
        temperature: float = 1.0,
        direction: str | float = "reverse",
        task_weight: float = 0.0,
        share: float = 1.0,
        max_tokens: int = 64,
        seq_len: int | None = None,
        sampling_temperature: float = 1.0,
        eos: tuple[int, ...] = (),
        seed: int = 0,
    ) -> None:
        self.teacher = teacher
        self.temperature, self.task_weight = temperature, task_weight
        self.parts = directions(direction)
        self.share, self.max_tokens, self.eos, self.seed = share, max_tokens, eos, seed
        self.sampling_temperature = sampling_temperature
        self.seq_len = seq_len

    def __call__(self, module: Any, batch: dict[str, Any]) -> tuple[Any, dict[str, float]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + batch["index"])
        own = float(torch.rand((), generator=generator)) < self.share
        more: dict[str, Any] = {}
        if own:
            room = self.max_tokens
            if self.seq_len is not None:
                longest = max(len(ids) for ids in batch["prompts"])
                room = max(1, min(room, self.seq_len + 1 - longest))
            written = sample(module, batch["prompts"], room, self.sampling_temperature, self.eos)
            # Some releases of torch keep autocast's copies of weights that were made without a
            # graph and take them again below, where they would leave the weights no gradient.
            torch.clear_autocast_cache()
            batch, more = written.batch, written.arguments
        head, judge = Head(module), Head(self.teacher)
        hidden, targets = _at_targets(head, batch, **more)
        with torch.no_grad():
            judged, _ = _at_targets(judge, batch, **more)

        def loss(part: Any, first: int, last: int) -> tuple[Any, dict[str, float]]:
            logits = head(part)
            with torch.no_grad():
                theirs = judge(judged[first:last])
            kl = sum(
                share * losses.full_divergence(logits, theirs, self.temperature, direction).sum()
                for direction, share in self.parts
            )
            task = 0.0 if own else self.task_weight  # the student's own words are no task
            return _mixed(logits, targets[first:last], kl, task)

        total, sums = chunked_sum(hidden, loss, head.trained)
        loss_mean, metrics = _mean(total, {**sums, "own": float(own) * len(targets)}, len(targets))
        if self.task_weight:  # the same names whoever wrote: ranks add them up
            metrics.setdefault("cross_entropy", 0.0)
            metrics["cross_entropy_tokens"] = 0.0 if own else float(len(targets))
        return loss_mean, metrics


def directions(direction: str | float) -> list[tuple[str, float]]:
    """Directions and their shares."""
    if isinstance(direction, str):
        return [(direction, 1.0)]
    mixed = [("forward", 1 - direction), ("reverse", direction)]
    return [(name, share) for name, share in mixed if share > 0]


def check_head(module: Any) -> None:
    """``ModelError`` if hidden states and output matrix alone do not give the model's logits."""
    device = next(module.parameters()).device
    ids = torch.tensor([[1, 2, 3]], device=device)
    was_training = module.training
    module.eval()  # without dropout
    try:
        with torch.no_grad():
            head = Head(module)
            expected = module(input_ids=ids, use_cache=False).logits.float()
            found = head(head.body(ids)).float()
    finally:
        module.train(was_training)
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise ModelError(
            f"{type(module).__name__} computes more than its output matrix behind the last norm; "
            "distillation does not know what"
        )


def _at_targets(head: Head, batch: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    """Hidden states ``[targets, hidden]`` and targets ``[targets]``, where they count."""
    counted = batch["targets"] != IGNORE
    return head.body(batch["input_ids"], **more)[counted], batch["targets"][counted]


def _mixed(logits: Any, targets: Any, kl: Any, task_weight: float) -> tuple[Any, dict[str, float]]:
    """Sums, not means: of the loss, of the divergence and (where it counts) the cross entropy."""
    metrics = {"kl": float(kl.detach())}
    if not task_weight:
        return kl, metrics
    entropy = losses.cross_entropy(logits, targets).sum()
    metrics["cross_entropy"] = float(entropy.detach())
    return (1 - task_weight) * kl + task_weight * entropy, metrics


def _mean(total: Any, sums: dict[str, float], count: int) -> tuple[Any, dict[str, float]]:
    least = max(count, 1)
    metrics = {name: value / least for name, value in sums.items()}
    return total / least, {**metrics, "tokens": float(count)}
