"""``dynamic``: waits for a batch size or a time window, then runs the batch to its end."""

from __future__ import annotations

from pyllmlite.hooks.scheduler import SchedulerContext, ScheduleStep
from pyllmlite_plugins.scheduler.options import count, seconds
from pyllmlite_plugins.scheduler.static import Static

WINDOW = 0.05


class Dynamic(Static):
    """Dynamic batching as model servers do it (Triton's dynamic batcher).

    A batch starts when ``batch_size`` requests wait, or when the first of them has waited for
    ``batch_window`` seconds; then it runs as ``static`` runs it, until its longest member ends.

    Options (``extra``):

    - ``batch_size`` (``max_num_seqs``): requests that start a batch at once, and its largest size.
    - ``batch_window`` (0.05): seconds that the first one waits for others; 0: never.
    """

    name = "dynamic"
    priority = 5

    def __init__(self) -> None:
        super().__init__()
        self._window = WINDOW
        self._due: float | None = None

    def setup(self, context: SchedulerContext) -> None:
        wanted = count(context, "batch_size", context.max_num_seqs)
        self.largest = min(wanted or 1, context.max_num_seqs)
        self._window = seconds(context, "batch_window", WINDOW)

    def schedule(self, step: ScheduleStep) -> None:
        self._due = None
        if not step.running and step.waiting:
            enough = len(step.waiting) >= (self.largest or step.free_rows)
            # One that was preempted counts by its arrival too: it does not wait again.
            due = min(seq.request.arrival_time for seq in step.waiting) + self._window
            if not enough and step.now < due:
                self._due = due
                return
        super().schedule(step)

    def next_event(self, now: float) -> float | None:
        return self._due
