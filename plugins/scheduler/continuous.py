"""``continuous``: iteration-level scheduling (Orca, Yu et al. 2022) with chunked prefill."""

from __future__ import annotations

from collections.abc import Iterable

from pyllmlite.core.request import Sequence
from pyllmlite.hooks.scheduler import Scheduler, SchedulerContext, ScheduleStep
from pyllmlite_plugins.scheduler.fairness import TokenCounters
from pyllmlite_plugins.scheduler.options import count, factor, flag
from pyllmlite_plugins.scheduler.pace import Pace
from pyllmlite_plugins.scheduler.preemption import Run, run_all


def urgency(seq: Sequence) -> tuple[int, float]:
    return (seq.request.priority, seq.request.arrival_time)


class Continuous(Scheduler):
    """Who runs goes on running; what is left of the step's tokens goes to who waits.

    A prompt longer than what is left runs in chunks (Sarathi, Agrawal et al. 2023).  Smaller
    ``priority`` first, then the earlier arrival.  If the cache is full, the least urgent, latest
    started sequence gives way and recomputes later (vLLM, Kwon et al. 2023).

    Options (``extra``):

    - ``max_prefill_tokens_per_step`` (none): prompt tokens of a step in which somebody decodes, so
      that a long prompt does not keep the others waiting for their next token.
    - ``max_decode_slowdown`` (none): the same by time, above 1: such a step takes at most so many
      times one without prompt tokens, which the scheduler learns from its clock (``pace.py``).
    - ``fair_clients`` (true): of those with the same priority the client that was served least goes
      first (``fairness.py``); with requests of one client nothing changes.
    """

    name = "continuous"
    priority = 50

    def __init__(self) -> None:
        self._max_prefill: int | None = None
        self._pace: Pace | None = None
        self._fair = True
        self._counters = TokenCounters()

    def setup(self, context: SchedulerContext) -> None:
        self._max_prefill = count(context, "max_prefill_tokens_per_step", None)
        slowdown = factor(context, "max_decode_slowdown")
        self._pace = None if slowdown is None else Pace(slowdown)
        self._fair = flag(context, "fair_clients", True)

    def schedule(self, step: ScheduleStep) -> None:
        seen = step.running
        running = list(seen)
        if len({s.request.priority for s in running}) > 1:
            running.sort(key=lambda s: s.request.priority)  # stable: then in the order of start
        run = step.run
        chunked: _Chunked | None = None
        if self._max_prefill is not None or self._pace is not None:
            decodes = sum(seq.num_uncomputed == 1 for seq in running)
            if self._pace is not None:
                self._pace.begin(step.now, bool(running))
            if decodes:
                chunked = _Chunked(step, decodes, self._most_prefill())
                run = chunked.run
        shared = self._fair and self._counters.look(seen, step.waiting)
        if shared:
            run = self._charging(run)
        if not run_all(step, running, run) and step.free_rows > 0:
            self._start(step, run, shared)
        if chunked is not None and self._pace is not None:
            self._pace.end(step.now, chunked.taken)

    def _most_prefill(self) -> int:
        """Prompt tokens of a step in which somebody decodes."""
        limits = [] if self._max_prefill is None else [self._max_prefill]
        if self._pace is not None:
            limits.append(self._pace.allowed())
        return min(limits)

    def _start(self, step: ScheduleStep, run: Run, shared: bool) -> None:
        """Those who wait, as far as they fit."""
        waiting: Iterable[Sequence] = list(step.waiting)
        if shared:
            waiting = self._counters.order(list(step.waiting))
        elif len({s.request.priority for s in step.waiting}) > 1:
            waiting = sorted(step.waiting, key=urgency)
        for seq in waiting:
            if step.budget <= 0 or step.free_rows <= 0:
                break
            # Whoever only waits for a prefix in flight is passed by; whoever lacks room is not,
            # or small requests would keep a big one waiting for ever.
            if run(seq) == 0 and step.blocked_by_cache(seq):
                break

    def _charging(self, run: Run) -> Run:
        def charged(seq: Sequence) -> int:
            tokens = run(seq)
            if tokens:
                self._counters.charge(seq, tokens)
            return tokens

        return charged


class _Chunked:
    """``step.run`` with at most ``most`` tokens of prompts, and none that a decode needs."""

    def __init__(self, step: ScheduleStep, decodes: int, most: int) -> None:
        self._step = step
        self.taken = 0
        self.left = min(most, max(1, step.budget - decodes))

    def run(self, seq: Sequence) -> int:
        if seq.num_uncomputed == 1:
            return self._step.run(seq)
        if self.left <= 0:
            return 0
        tokens = self._step.run(seq, self.left)
        self.left -= tokens
        self.taken += tokens
        return tokens
