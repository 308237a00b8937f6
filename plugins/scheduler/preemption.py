"""What the built-in schedulers do when the cache is full: someone gives way and recomputes."""

from __future__ import annotations

from collections.abc import Callable

from pyllmlite.core.request import Sequence
from pyllmlite.hooks.scheduler import ScheduleStep

Run = Callable[[Sequence], int]


def run_all(step: ScheduleStep, order: list[Sequence], run: Run | None = None) -> bool:
    """Run every sequence of ``order`` (running ones, most urgent first).  Where the cache has no
    room the last in the order is preempted: it has the least claim and, among equals, the least
    work to lose.  Returns whether any was.

    ``run``: in place of ``step.run``, to give a sequence fewer tokens."""
    run = run or step.run
    for i, seq in enumerate(order):
        if run(seq) == 0:
            if step.budget <= 0:
                return False
            if step.blocked_by_cache(seq):
                _make_room(step, order[i:], run)
                return True
    return False


def _make_room(step: ScheduleStep, order: list[Sequence], run: Run) -> None:
    first = 0
    while first < len(order):
        seq = order[first]
        if run(seq) == 0 and step.budget > 0 and step.blocked_by_cache(seq):
            step.preempt(order.pop())  # then again with the same one, unless it was that one
        else:
            first += 1
