"""Scheduler: who runs in this step, and with how many tokens.  Pure policy on plain data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pyllmlite.hooks.strategy import Strategy

if TYPE_CHECKING:
    from pyllmlite.core.request import Sequence


class ScheduleStep(Protocol):
    """The step being put together.  The engine implements it, a simulator can too.

    Attributes:
        running: Sequences that hold cache, in the order in which they started.
        waiting: Sequences that do not, in the order of arrival; a preempted one is first.
            Neither list changes under a loop over it; read again, it shows what ``run`` and
            ``preempt`` did.
        budget: Tokens left in this step (``max_num_batched_tokens`` at its start).
        free_rows: Sequences that may still be started (``max_num_seqs`` less the running).
        now: Seconds on the engine's clock, which a simulator may turn itself.
    """

    running: Seq[Sequence]
    waiting: Seq[Sequence]
    budget: int
    free_rows: int
    now: float

    def run(self, seq: Sequence, max_tokens: int | None = None) -> int:
        """Put a running or waiting sequence into the step with as many of its uncomputed tokens
        as budget and ``max_tokens`` allow.  Returns how many; 0: it does not fit (no budget, no
        row, no cache blocks) or must wait for a prefix in flight, and nothing changed.  A
        sequence can be put in once a step."""

    def preempt(self, seq: Sequence) -> None:
        """Take a running sequence's blocks; it goes back to waiting and recomputes later.  If
        it was already put into this step it is taken out again."""

    def blocked_by_cache(self, seq: Sequence) -> bool:
        """After ``run`` gave 0: it was the cache that had no room."""


@dataclass(frozen=True)
class SchedulerContext:
    """What a scheduler may know of the engine it works in.

    Attributes:
        max_num_seqs: Sequences that run at once.
        max_num_batched_tokens: Tokens of one step.
        extra: Options of strategies, by their names (``LLM(extra=...)``, ``--extra name=value``).
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    extra: dict[str, Any] = field(default_factory=dict)


class Scheduler(Strategy):
    """Called once a step; keeps no sequences of its own (``step`` has them all)."""

    contract = "scheduler"

    def setup(self, context: SchedulerContext) -> None:
        """Called once, before the first step.  ``ConfigError``: an option's value cannot work."""
        return None

    @abstractmethod
    def schedule(self, step: ScheduleStep) -> None:
        """Fill the step with ``step.run``.  Whoever is not put in waits.  If nothing is running
        and the first waiting sequence is not put in, the engine ends it with an error when the
        cache, empty, could not hold it, so a scheduler cannot hang the engine."""

    def next_event(self, now: float) -> float | None:
        """When an empty step should be tried again (a time window closing), on the clock of
        ``step.now``; an arrival comes first.  None: there is nothing to wait for.  If somebody
        waits all the same and three steps in a row stay empty, the requests end with an error;
        a time that is past, or for ever away, counts as None.  So do preemptions without end by
        which nobody computes a token that was not computed before."""
        return None
