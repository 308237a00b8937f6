"""``continuous``: iteration-level scheduling (Orca, Yu et al. 2022) with chunked prefill."""

from __future__ import annotations

from collections.abc import Iterable

from pyllmlite.core.request import Sequence
from pyllmlite.hooks.scheduler import Scheduler, SchedulerContext, ScheduleStep
from pyllmlite_plugins.scheduler.fairness import TokenCounters
from pyllmlite_plugins.scheduler.options import count, flag
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
    - ``fair_clients`` (true): of those with the same priority the client that was served least goes
      first (``fairness.py``); with requests of one client nothing changes.
    """

    name = "continuous"
    priority = 50

    def __init__(self) -> None:
        self._max_prefill: int | None = None
        self._fair = True
        self._counters = TokenCounters()

    def setup(self, context: SchedulerContext) -> None:
        self._max_prefill = count(context, "max_prefill_tokens_per_step", None)
        self._fair = flag(context, "fair_clients", True)

    def schedule(self, step: ScheduleStep) -> None:
        seen = step.running
        running = list(seen)
        if len({s.request.priority for s in running}) > 1:
            running.sort(key=lambda s: s.request.priority)  # stable: then in the order of start
        run = step.run
        if self._max_prefill is not None and any(s.num_uncomputed == 1 for s in running):
            run = _Chunked(step, running, self._max_prefill).run
        shared = self._fair and self._counters.look(seen, step.waiting)
        if shared:
            run = self._charging(run)
        if run_all(step, running, run) or step.free_rows <= 0:
            return
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

    def __init__(self, step: ScheduleStep, running: list[Sequence], most: int) -> None:
        decodes = sum(seq.num_uncomputed == 1 for seq in running)
        self._step = step
        self.left = min(most, max(1, step.budget - decodes))

    def run(self, seq: Sequence) -> int:
        if seq.num_uncomputed == 1:
            return self._step.run(seq)
        if self.left <= 0:
            return 0
        tokens = self._step.run(seq, self.left)
        self.left -= tokens
        return tokens
