"""Micro-batches of a teacher's text: functions of their index and the seed, and of nothing else."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from pyllmlite.compress.learn.losses import IGNORE
from pyllmlite.compress.learn.records import Record
from pyllmlite.compress.learn.teacher_logits import TopKLogits, predicted_tokens
from pyllmlite.core.errors import ConfigError

_SORTED = 16  # micro-batches whose sequences are sorted by length among each other


class TextBatches:
    """Records in an order drawn anew for every epoch; sequences of about one length stand
    together, so that little is padding.

    A batch is a dict: ``input_ids`` int64 ``[batch, length]``, padded on the right (a causal model
    needs no mask for that); ``targets`` int64 of the same shape, the next token where it is the
    teacher's, else ``IGNORE``; with stored distributions ``topk_ids`` and ``topk_log_probs``
    ``[targets, k]`` and ``tail`` ``[targets]``, a row for each target that counts, in order;
    ``prompts``, lists of ids; ``index``.

    Args:
        indices: Records to learn from.
        topk: Their distributions; None: there are none.
    Raises:
        ConfigError: No record has a token to learn from within ``seq_len``.
    """

    def __init__(
        self,
        records: list[Record],
        indices: list[int],
        batch_size: int,
        seq_len: int,
        seed: int,
        topk: TopKLogits | None = None,
        pad: int = 0,
    ) -> None:
        self.records, self.topk = records, topk
        self.batch_size, self.seq_len, self.seed, self.pad = batch_size, seq_len, seed, pad
        self.indices = [i for i in indices if predicted_tokens(records[i], seq_len)[1]]
        if not self.indices:
            raise ConfigError(
                f"there is no text to learn from: {len(indices)} answers, and none begins within "
                f"seq_len {seq_len}"
            )
        self._lengths = {i: len(predicted_tokens(records[i], seq_len)[0]) for i in self.indices}
        self._epoch: tuple[int, list[list[int]]] | None = None

    @property
    def per_epoch(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def batch(self, index: int) -> dict[str, Any]:
        epoch, at = divmod(index, self.per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._order(epoch))
        return {**self.collated(self._epoch[1][at]), "index": index}

    def collated(self, chosen: list[int]) -> dict[str, Any]:
        """Records of these numbers as one batch."""
        made = [predicted_tokens(self.records[i], self.seq_len) for i in chosen]
        longest = max(len(ids) for ids, _ in made) - 1
        inputs = np.full((len(made), longest), self.pad, np.int64)
        targets = np.full((len(made), longest), IGNORE, np.int64)
        for row, (ids, predicted) in enumerate(made):
            end = len(ids) - 1
            inputs[row, :end] = ids[:-1]
            targets[row, end - predicted : end] = ids[len(ids) - predicted :]
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(inputs),
            "targets": torch.from_numpy(targets),
            "prompts": [self.records[i].prompt_token_ids for i in chosen],
        }
        if self.topk is not None:
            rows = [self.topk.rows(i) for i in chosen]
            for name, parts in zip(
                ("topk_ids", "topk_log_probs", "tail"), zip(*rows, strict=True), strict=True
            ):
                batch[name] = torch.from_numpy(np.concatenate(parts))
        return batch

    def _order(self, epoch: int) -> list[list[int]]:
        rng = np.random.default_rng((self.seed, epoch))
        order = [self.indices[i] for i in rng.permutation(len(self.indices))]
        missing = self.per_epoch * self.batch_size - len(order)
        order += [order[i % len(order)] for i in range(missing)]  # the last batch is a whole one
        batches: list[list[int]] = []
        window = _SORTED * self.batch_size
        for first in range(0, len(order), window):
            part = sorted(order[first : first + window], key=lambda i: (self._lengths[i], i))
            cut = [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
            batches += [cut[i] for i in rng.permutation(len(cut))]
        return batches


def split_records(records: list[Record], held_out: int) -> tuple[list[int], list[int]]:
    """Numbers of the records to learn from, and of at least ``held_out`` that are not: the last of
    the file, and every other answer to their prompts.

    Raises:
        ConfigError: Nothing would be left to learn from.
    """
    kept = [r for r in records if not r.dropped]
    unseen: set[int] = set()
    sources: set[int] = set()
    for record in reversed(kept):
        if len(unseen) >= held_out:
            break
        unseen.add(record.index)
        if record.source >= 0 and record.source not in sources:
            sources.add(record.source)
            unseen |= {r.index for r in kept if r.source == record.source}
    train = [r.index for r in kept if r.index not in unseen]
    if not train:
        raise ConfigError(
            f"{len(kept)} answers were kept and {held_out} are held out to measure on, nothing is "
            "left to learn from; write more (--num-sequences), or hold out fewer"
        )
    return train, sorted(unseen)
