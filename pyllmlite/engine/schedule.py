"""The step being put together: what a scheduler sees, and what it may do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyllmlite.core.request import Sequence, Status
from pyllmlite.engine.failure import failure

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyllmlite.engine.pool import SequencePool
    from pyllmlite.engine.state import SequenceState


class Step:
    """A :class:`~pyllmlite.hooks.scheduler.ScheduleStep`, used again for every step.

    What was put in stands in parallel lists, ready for ``Batch.set_step``: ``seqs``, ``rows``,
    ``starts`` (first position), ``counts`` (tokens) and ``logits`` (rows of logits wanted).

    Attributes:
        budget: Tokens left; ``logit_budget``: rows of logits left.
        number: Counts the steps.
        failed: Sequences that could not be started, and why.
    """

    __slots__ = (
        "_cache_full",
        "_on_start",
        "_pool",
        "_reserve",
        "_running",
        "_salts",
        "_seen",
        "_waiting",
        "budget",
        "counts",
        "failed",
        "logit_budget",
        "logits",
        "max_logit_rows",
        "max_tokens",
        "now",
        "number",
        "rows",
        "seqs",
        "starts",
    )

    def __init__(
        self,
        pool: SequencePool,
        max_tokens: int,
        max_logit_rows: int,
        on_start: Callable[[Sequence], None],
    ) -> None:
        self._pool = pool
        self._reserve = pool.cache.reserve
        self._on_start = on_start
        self._salts = 0
        self._seen = -1
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self.max_tokens = max_tokens
        self.max_logit_rows = max_logit_rows
        self.number = 0
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """An empty step."""
        self.now = now
        self.number += 1
        self.budget = self.max_tokens
        self.logit_budget = self.max_logit_rows
        self.seqs: list[Sequence] = []
        self.rows: list[int] = []
        self.starts: list[int] = []
        self.counts: list[int] = []
        self.logits: list[int] = []
        self.failed: list[tuple[Sequence, str]] = []
        self._cache_full: Sequence | None = None

    # -- what a scheduler sees: lists of its own, which no call of run or preempt changes -------
    @property
    def running(self) -> list[Sequence]:
        self._look()
        return self._running

    @property
    def waiting(self) -> list[Sequence]:
        self._look()
        return self._waiting

    @property
    def free_rows(self) -> int:
        return len(self._pool.free_rows)

    def _look(self) -> None:
        if self._seen != self._pool.version:
            self._running = self._pool.running[:]
            self._waiting = self._pool.waiting[:]
            self._seen = self._pool.version

    def blocked_by_cache(self, seq: Sequence) -> bool:
        return self._cache_full is seq

    # -- what it may do --------------------------------------------------------------------------
    def run(self, seq: Sequence, max_tokens: int | None = None) -> int:
        if seq.row < 0:
            return self._start(seq, max_tokens)
        start = seq.num_computed
        state = seq.output
        if len(seq.token_ids) - start != 1 or seq.draft_ids or max_tokens is not None:
            return self._run_many(seq, state, max_tokens)
        # One token: decoding.
        if state.stamp == self.number or self.budget <= 0 or self.logit_budget <= 0:
            return 0
        if not self._reserve(seq.id, start + 1):
            self._cache_full = seq
            return 0
        state.stamp = self.number
        self.budget -= 1
        self.logit_budget -= 1
        self.seqs.append(seq)
        self.rows.append(seq.row)
        self.starts.append(start)
        self.counts.append(1)
        self.logits.append(1)
        return 1

    def preempt(self, seq: Sequence) -> None:
        if seq.row < 0:
            return
        if seq.output.stamp == self.number:
            seq.output.stamp = -1
            at = self.seqs.index(seq)
            self.budget += self.counts[at]
            self.logit_budget += self.logits[at]
            for column in (self.seqs, self.rows, self.starts, self.counts, self.logits):
                del column[at]
        self._pool.preempt(seq)

    def _run_many(self, seq: Sequence, state: SequenceState, max_tokens: int | None) -> int:
        """Prefill, a chunk of it, or verification."""
        if state.stamp == self.number:
            return 0
        limit = self.budget if max_tokens is None else min(self.budget, max_tokens)
        start = seq.num_computed
        known = len(seq.token_ids) - start
        drafts = len(seq.draft_ids) if known == 1 else 0
        drafts = max(0, min(drafts, limit - 1, self.logit_budget - 1))
        count, logits = self._clip(state, known, limit)
        if count <= 0:
            return 0
        if drafts and self._reserve(seq.id, start + 1 + drafts):
            count = logits = 1 + drafts
        elif not self._reserve(seq.id, start + count):
            self._cache_full = seq
            return 0
        else:
            drafts = 0
        del seq.draft_ids[drafts:]
        self._put(seq, state, start, count, logits)
        return count

    def _clip(self, state: SequenceState, known: int, limit: int) -> tuple[int, int]:
        """How many of ``known`` tokens fit, and how many rows of logits they need."""
        count = min(known, limit)
        if state.request.scoring:
            count = min(count, self.logit_budget)
            return count, count
        if count < known:
            return count, 0  # a chunk in the middle: nobody looks at its logits
        return (count, 1) if self.logit_budget > 0 else (count - 1, 0)

    def _put(
        self, seq: Sequence, state: SequenceState, start: int, count: int, logits: int
    ) -> None:
        state.stamp = self.number
        self.budget -= count
        self.logit_budget -= logits
        self.seqs.append(seq)
        self.rows.append(seq.row)
        self.starts.append(start)
        self.counts.append(count)
        self.logits.append(logits)

    def _start(self, seq: Sequence, max_tokens: int | None) -> int:
        """A waiting sequence takes a row and what is cached of its prefix."""
        pool, cache, state = self._pool, self._pool.cache, seq.output
        if seq.status is not Status.WAITING or not pool.free_rows:
            return 0
        limit = self.budget if max_tokens is None else min(self.budget, max_tokens)
        if limit <= 0 or self.logit_budget <= 0:
            return 0
        if pool.running and cache.num_free_blocks <= state.blocked_at:
            self._cache_full = seq  # as little room as when it was tried last
            return 0
        if state.swapped:
            return self._swap_in(seq, state, limit)
        salt = 0
        if state.request.scoring:
            # All of its prompt must run, so it may find none of it in the cache.
            self._salts += 1
            salt = self._salts
            state.request.scored = 0
        known = len(seq.token_ids)
        try:
            cached = cache.acquire(seq.id, pool.next_row, seq.token_ids, salt)
        except Exception as error:
            return self._blame(cache, seq, error)
        if cached is None:
            return 0
        try:
            if not 0 <= cached < known:
                raise ValueError(f"acquire answered {cached} of {known} tokens")
            count, logits = self._clip(state, known - cached, limit)
            room = count > 0 and cache.reserve(seq.id, cached + count)
        except Exception as error:
            cache.free(seq.id)  # nobody else knows of it
            return self._blame(cache, seq, error)
        if not room:
            cache.free(seq.id)
            if count > 0:
                state.blocked_at = cache.num_free_blocks
                self._cache_full = seq
            return 0
        if seq.preemptions == 0 and seq.child == 0:
            seq.request.num_cached_tokens = cached
        return self._enter(seq, state, cached, count, logits)

    def _swap_in(self, seq: Sequence, state: SequenceState, limit: int) -> int:
        """One that was preempted goes on where it was."""
        cache, start = self._pool.cache, seq.num_computed
        count, logits = self._clip(state, len(seq.token_ids) - start, limit)
        if count <= 0:
            return 0
        try:
            room = cache.swap_in(seq.id, self._pool.next_row, seq.token_ids, start + count)
        except Exception as error:
            return self._blame(cache, seq, error)
        if not room:
            state.blocked_at = cache.num_free_blocks
            self._cache_full = seq
            return 0
        state.swapped = False
        return self._enter(seq, state, start, count, logits)

    def _enter(
        self, seq: Sequence, state: SequenceState, start: int, count: int, logits: int
    ) -> int:
        """The cache holds it: it takes the row that was named there."""
        self._pool.take_row(seq)
        self._pool.waiting.remove(seq)
        seq.num_computed = start
        state.blocked_at = -1
        try:
            self._on_start(seq)
        except Exception as error:
            return self._blame(state.request.decoder, seq, error)
        self._put(seq, state, start, count, logits)
        return count

    def _blame(self, part: Any, seq: Sequence, error: Exception) -> int:
        self.failed.append((seq, failure(part, error)))
        return 0
