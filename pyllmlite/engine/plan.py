"""Before the run: draft tokens are proposed, the step is written down, masks are laid on it."""

from __future__ import annotations

import operator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllmlite.engine.failure import failure
from pyllmlite.hooks.decoder import Proposer

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from pyllmlite.core.request import Sequence
    from pyllmlite.engine.pool import SequencePool
    from pyllmlite.engine.schedule import Step
    from pyllmlite.engine.state import RequestState
    from pyllmlite.hooks.cache import KVCache
    from pyllmlite.hooks.decoder import Constraint


def propose(pool: SequencePool, step: Step, vocab_size: int) -> None:
    """Ask for draft tokens for every decoding sequence whose request has a proposer.  Together
    they leave a row of logits and a token of the step to everybody, and to one who starts."""
    asked: list[tuple[Sequence, int]] = []
    spare = min(step.max_logit_rows, step.max_tokens) - len(pool.running) - 1
    for seq in pool.running:
        state = seq.output.request
        seq.draft_ids = []
        if state.proposer is None or seq.num_uncomputed != 1:
            continue
        if state.unborn or state.scoring:
            continue  # the last token of a prompt, which has more to do than to choose one
        room = min(spare, state.limit - len(seq.token_ids) - 1)  # the last one is never a draft
        if room > 0:
            asked.append((seq, room))
    _prepare(asked, step)
    for seq, room in asked:
        state = seq.output.request
        room = min(room, spare)
        if room <= 0:
            break
        try:
            proposed = islice(state.proposer.propose(seq, room), room)
            drafts = [operator.index(token) for token in proposed]
        except Exception as error:
            step.failed.append((seq, failure(state.proposer, error)))
            continue
        bad = next((i for i, token in enumerate(drafts) if not 0 <= token < vocab_size), None)
        seq.draft_ids = drafts[:bad]
        spare -= len(seq.draft_ids)


def _prepare(asked: list[tuple[Sequence, int]], step: Step) -> None:
    """Tell each proposer at once all that it will be asked for."""
    proposers = {id(seq.output.request.proposer): seq.output.request.proposer for seq, _ in asked}
    for key, proposer in proposers.items():
        if type(proposer).prepare is Proposer.prepare:
            continue
        mine = [entry for entry in asked if id(entry[0].output.request.proposer) == key]
        try:
            proposer.prepare([seq for seq, _ in mine], [room for _, room in mine])
        except Exception as error:
            step.failed += [(seq, failure(proposer, error)) for seq, _ in mine]
            asked[:] = [entry for entry in asked if entry not in mine]


class Planner:
    """Writes the step into the native batch."""

    def __init__(self, batch: Any, cache: KVCache, vocab_size: int) -> None:
        self.batch = batch
        self.cache = cache
        self.table = batch.token_table
        self._groups = range(len(cache.block_tables))
        self._wishes = Wishes(batch, vocab_size)

    def plan(self, step: Step, special: bool) -> None:
        """``special``: a request is among them that needs more than its tokens to be run."""
        if special:
            for seq in step.seqs:
                if seq.draft_ids:
                    known = len(seq.token_ids)
                    self.table[seq.row, known : known + len(seq.draft_ids)] = seq.draft_ids
        self.batch.set_step(step.rows, step.starts, step.counts, step.logits)
        for group in self._groups:
            copies = self.cache.take_copies(group)
            if copies:
                self.batch.set_copies(group, copies)
        if special:
            self._plan_special(step)

    def _prepare(self, step: Step) -> None:
        """Tell each constraint at once all that it will be asked for."""
        states: dict[int, list[Any]] = {}
        constraints: dict[int, Constraint] = {}
        for seq, wanted in zip(step.seqs, step.logits, strict=True):
            parts = seq.output.request.constraints
            if wanted and parts:
                for part, at in zip(parts, seq.output.constraint_states, strict=True):
                    constraints[id(part)] = part
                    states.setdefault(id(part), []).append(at)
        for key, constraint in constraints.items():
            try:
                constraint.prepare(states[key])
            except Exception as error:
                message = failure(constraint, error)
                step.failed += [
                    (seq, message)
                    for seq in step.seqs
                    if constraint in seq.output.request.constraints
                ]

    def _plan_special(self, step: Step) -> None:
        self._prepare(step)
        first = 0
        wishes = self._wishes
        wishes.masks = {}
        for index, seq in enumerate(step.seqs):
            wanted = step.logits[index]
            state: RequestState = seq.output.request
            if wanted and state.special:
                if state.scoring:
                    self.batch.score_prompt(index)
                end = step.starts[index] + step.counts[index]
                if end == len(seq.token_ids) + len(seq.draft_ids):  # a token will be chosen
                    wishes.seq = seq
                    wishes.first = first + wanted - 1 - len(seq.draft_ids)
                    wishes.count = len(seq.draft_ids) + 1
                    part: Any = state.decoder
                    try:
                        if state.decoder.plans_steps:
                            state.decoder.plan(seq, wishes)
                        for part, at in zip(
                            state.constraints, seq.output.constraint_states, strict=True
                        ):
                            self._constrain(seq, part, at)
                    except Exception as error:
                        step.failed.append((seq, failure(part, error)))
            first += wanted
        for row, mask in wishes.masks.items():
            self.batch.set_mask(row, mask)

    def _constrain(self, seq: Sequence, constraint: Constraint, at: Any) -> None:
        """A mask for each of the sequence's rows; behind a draft the constraint stands as if it
        had been taken, and goes back afterwards."""
        accepted = 0
        try:
            for row in range(len(seq.draft_ids) + 1):
                mask = constraint.mask(at)
                if mask is not None:
                    self._wishes.mask(row, mask)
                    mask = self._wishes.masks[self._wishes.first + row]
                if row == len(seq.draft_ids):
                    break
                draft = seq.draft_ids[row]
                if mask is not None and not int(mask[draft >> 5]) >> (draft & 31) & 1:
                    break  # this draft cannot be drawn, so no row behind it counts
                constraint.accept(at, draft)
                accepted += 1
        finally:
            if accepted:
                constraint.rollback(at, accepted)


class Wishes:
    """The :class:`~pyllmlite.hooks.decoder.StepPlan` of one sequence after the other.

    What does not fit is refused here, where it is known whose wish it is: in the native batch it
    would end the step for all.

    Attributes:
        first, count: The rows of ``seq`` in the step.
    """

    __slots__ = ("_batch", "_num_words", "count", "first", "masks", "seq")

    def __init__(self, batch: Any, vocab_size: int) -> None:
        self._batch = batch
        self._num_words = (vocab_size + 31) // 32
        self.seq: Sequence
        self.first = self.count = 0
        self.masks: dict[int, np.ndarray] = {}

    def bias(self, ids: Seq[int], values: Seq[float]) -> None:
        self._batch.set_step_bias(self.seq.row, ids, values)

    def mask(self, row: int, bits: np.ndarray) -> None:
        at = self._row(row)
        words = np.asarray(bits)
        if words.shape != (self._num_words,) or words.dtype not in (np.uint32, np.int32):
            raise ValueError(
                f"a mask is uint32 [{self._num_words}], a bit for each token, got "
                f"{words.dtype} {list(words.shape)}"
            )
        words = words.view(np.uint32)
        other = self.masks.get(at)
        # A copy: a constraint may use its array again for the next row.
        self.masks[at] = words.copy() if other is None else other & words

    def want_logits(self, row: int) -> None:
        self._batch.want_logits(self._row(row))

    def _row(self, row: int) -> int:
        if not 0 <= row < self.count:
            raise ValueError(f"row {row} is not in [0, {self.count})")
        return self.first + row
