"""What the built-in schedulers do when the cache is full: someone gives way and recomputes."""

from __future__ import annotations

from pyllmlite.core.request import Sequence
from pyllmlite.hooks.scheduler import ScheduleStep


def run_all(step: ScheduleStep, order: list[Sequence]) -> bool:
    """Run every sequence of ``order`` (running ones, most urgent first).  Where the cache has no
    room the last in the order is preempted: it has the least claim and, among equals, the least
    work to lose.  Returns whether any was."""
    order = list(order)
    preempted = False
    i = 0
    while i < len(order):
        seq = order[i]
        if step.run(seq) == 0:
            if step.budget <= 0:
                break
            if step.blocked_by_cache(seq):
                preempted = True
                step.preempt(order.pop())
                continue  # again with the same one, unless it was the last itself
        i += 1
    return preempted
