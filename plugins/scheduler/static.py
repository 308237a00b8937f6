"""``static``: a batch runs until its longest member ends; then the next one starts."""

from __future__ import annotations

from pyllmlite.hooks.scheduler import Scheduler, ScheduleStep
from pyllmlite_plugins.scheduler.preemption import run_all


class Static(Scheduler):
    """The baseline that continuous batching is measured against.

    A batch takes in who waits until rows, cache or requests run out; those whose prompt is
    done wait for the others, then all decode together and nobody joins.
    """

    name = "static"
    priority = 10
    largest: int | None = None  # sequences of a batch; None: as many as there are rows

    def __init__(self) -> None:
        self._filling = True

    def schedule(self, step: ScheduleStep) -> None:
        # Who has nothing to run (a beam) waits for a sibling that got no row yet.
        self._filling = self._filling or not any(s.num_uncomputed for s in step.running)
        if self._filling:
            before = step.budget
            waiting = list(step.waiting)
            if not run_all(step, [s for s in step.running if s.num_uncomputed > 1]):
                for seq in waiting:
                    if self.largest is not None and len(step.running) >= self.largest:
                        break
                    step.run(seq)
            # If this step's tokens did not suffice for everybody, the next one goes on.
            self._filling = step.budget < before
            if self._filling:
                return
        run_all(step, list(step.running))
