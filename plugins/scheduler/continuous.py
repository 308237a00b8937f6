"""``continuous``: iteration-level scheduling (Orca, Yu et al. 2022) with chunked prefill."""

from __future__ import annotations

from pyllmlite.core.request import Sequence
from pyllmlite.hooks.scheduler import Scheduler, ScheduleStep
from pyllmlite_plugins.scheduler.preemption import run_all


def urgency(seq: Sequence) -> tuple[int, float]:
    return (seq.request.priority, seq.request.arrival_time)


class Continuous(Scheduler):
    """Who runs goes on running; what is left of the step's tokens goes to who waits.

    A prompt longer than what is left runs in chunks (Sarathi, Agrawal et al. 2023).  Smaller
    ``priority`` first, then the earlier arrival.  If the cache is full, the least urgent, latest
    started sequence gives way and recomputes later (vLLM, Kwon et al. 2023).
    """

    name = "continuous"
    priority = 50

    def schedule(self, step: ScheduleStep) -> None:
        running = list(step.running)
        if len({s.request.priority for s in running}) > 1:
            running.sort(key=lambda s: s.request.priority)  # stable: then in the order of start
        if run_all(step, running) or step.free_rows <= 0:
            return
        waiting = list(step.waiting)
        if len({s.request.priority for s in waiting}) > 1:
            waiting.sort(key=urgency)
        for seq in waiting:
            if step.budget <= 0 or step.free_rows <= 0:
                break
            # Whoever only waits for a prefix in flight is passed by; whoever lacks room is not,
            # or small requests would keep a big one waiting for ever.
            if step.run(seq) == 0 and step.blocked_by_cache(seq):
                break
