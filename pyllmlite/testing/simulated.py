"""An engine without a model: a ``ScheduleStep`` in pure Python, to try schedulers in.

Time is turned by the simulator: a step takes ``step_time`` seconds and ``token_time`` more a
token.  The cache is a number of blocks.  A request's output length is known beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

from pyllmlite.core.request import Request, Sequence, Status
from pyllmlite.core.sampling import SamplingParams
from pyllmlite.hooks.scheduler import SchedulerContext


@dataclass
class StepReport:
    """What a step did: ``(sequence, tokens)`` in the order in which they were put in."""

    ran: list[tuple[Sequence, int]]
    preempted: list[Sequence]
    now: float

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.ran)


class SimulatedEngine:
    """Runs a scheduler.  It is the ``ScheduleStep`` itself, and checks what the scheduler does.

    Attributes:
        finished: Sequences that got all their tokens, in the order in which they ended.
        finish_times: Seconds at which they did, by request id.
        served: Tokens computed for each client.
        tokens_run: Tokens computed in all, recomputed ones included.
    """

    def __init__(
        self,
        scheduler: Any,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        num_blocks: int = 64,
        block_size: int = 16,
        step_time: float = 0.01,
        token_time: float = 0.0001,
        options: dict[str, Any] | None = None,
    ) -> None:
        """``options``: the scheduler's ``extra``; it is set up with them and the sizes."""
        self.scheduler = scheduler
        scheduler.setup(SchedulerContext(max_num_seqs, max_num_batched_tokens, dict(options or {})))
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.step_time = step_time
        self.token_time = token_time
        self.now = 0.0
        self.budget = 0
        self.finished: list[Sequence] = []
        self.finish_times: dict[str, float] = {}
        self.served: dict[str, int] = {}
        self.tokens_run = 0
        self._running: list[Sequence] = []
        self._waiting: list[Sequence] = []
        self._blocks: dict[int, int] = {}
        self._output_tokens: dict[int, int] = {}
        self._prefix_waits: dict[int, int] = {}
        self._put: dict[int, int] = {}
        self._preempted: list[Sequence] = []
        self._blocked: Sequence | None = None
        self._in_step = False
        self._next_id = 0

    # -- what happens to requests ------------------------------------------------------------
    def add(
        self,
        num_prompt_tokens: int,
        num_output_tokens: int,
        priority: int = 0,
        client: str = "",
        prefix_waits: int = 0,
    ) -> Sequence:
        """A request arrives now.  ``prefix_waits``: how often its start is refused because its
        prefix is in flight."""
        if self._blocks_for(num_prompt_tokens + num_output_tokens) > self.num_blocks:
            raise ValueError("the request does not fit into the empty cache")
        id = self._next_id
        self._next_id += 1
        params = SamplingParams(max_tokens=num_output_tokens)
        request = Request(
            str(id), [1] * num_prompt_tokens, params, None, self.now, priority, client
        )
        seq = Sequence(id, request, list(request.prompt_token_ids))
        request.sequences.append(seq)
        self._output_tokens[id] = num_output_tokens
        self._prefix_waits[id] = prefix_waits
        self._waiting.append(seq)
        return seq

    def abort(self, seq: Sequence) -> None:
        """The client has gone."""
        if seq.status is not Status.FINISHED:
            (self._running if seq.row >= 0 else self._waiting).remove(seq)
            self._end(seq, "abort")

    # -- ScheduleStep ------------------------------------------------------------------------
    @property
    def running(self) -> Seq[Sequence]:
        return self._running[:]

    @property
    def waiting(self) -> Seq[Sequence]:
        return self._waiting[:]

    @property
    def free_rows(self) -> int:
        return self.max_num_seqs - len(self._running)

    @property
    def free_blocks(self) -> int:
        return self.num_blocks - sum(self._blocks.values())

    def run(self, seq: Sequence, max_tokens: int | None = None) -> int:
        self._check(seq, "run")
        assert max_tokens is None or max_tokens > 0, f"run: max_tokens is {max_tokens}"
        count = min(seq.num_uncomputed, self.budget)
        count = count if max_tokens is None else min(count, max_tokens)
        if seq.id in self._put or count <= 0:
            return 0
        starts = seq.row < 0
        if starts and self.free_rows <= 0:
            return 0
        if starts and self._prefix_waits[seq.id] > 0:
            self._prefix_waits[seq.id] -= 1
            return 0
        needed = self._blocks_for(seq.num_computed + count)
        if needed - self._blocks.get(seq.id, 0) > self.free_blocks:
            self._blocked = seq
            return 0
        if starts:
            self._waiting.remove(seq)
            self._running.append(seq)
            seq.row, seq.status = seq.id, Status.RUNNING
        self._blocks[seq.id] = max(needed, self._blocks.get(seq.id, 0))
        self._put[seq.id] = count
        self.budget -= count
        return count

    def preempt(self, seq: Sequence) -> None:
        self._check(seq, "preempt")
        assert seq.row >= 0, f"preempt: {seq} is not running"
        self.budget += self._put.pop(seq.id, 0)
        del self._blocks[seq.id]
        self._running.remove(seq)
        self._waiting.insert(0, seq)
        seq.row, seq.status, seq.num_computed = -1, Status.WAITING, 0
        seq.preemptions += 1
        self._preempted.append(seq)

    def blocked_by_cache(self, seq: Sequence) -> bool:
        return self._blocked is seq

    # -- running -----------------------------------------------------------------------------
    def step(self) -> StepReport:
        """One step: schedule, compute, append a token where a sequence is up to date."""
        self.budget = self.max_num_batched_tokens
        self._put, self._preempted, self._blocked = {}, [], None
        before = [(s, s.num_computed, len(s.token_ids)) for s in self._running + self._waiting]
        self._in_step = True
        self.scheduler.schedule(self)
        self._in_step = False
        for seq, computed, tokens in before:
            kept = seq.num_computed == (0 if seq in self._preempted else computed)
            assert kept and len(seq.token_ids) == tokens, f"the scheduler changed {seq}"
        ran = [(seq, self._put[seq.id]) for seq in self._running if seq.id in self._put]
        total = sum(self._put.values())
        assert total + self.budget == self.max_num_batched_tokens, "the budget was changed"
        self.now += self.step_time + self.token_time * total
        self.tokens_run += total
        for seq, count in ran:
            client = seq.request.client
            self.served[client] = self.served.get(client, 0) + count
            seq.num_computed += count
            if seq.num_uncomputed == 0:
                seq.token_ids.append(2)
                if seq.num_output_tokens >= self._output_tokens[seq.id]:
                    self._running.remove(seq)
                    self._end(seq, "length")
        return StepReport(ran, list(self._preempted), self.now)

    def run_until_idle(self, max_steps: int = 10_000) -> int:
        """Steps until nothing is left; returns how many.  ``AssertionError`` if a scheduler lets
        sequences lie, or needs more than ``max_steps``."""
        idle = 0
        for steps in range(max_steps):
            if not self._running and not self._waiting:
                return steps
            report = self.step()
            idle = 0 if report.ran or report.preempted else idle + 1
            if not report.ran:
                event = self.scheduler.next_event(self.now)
                if event is not None:
                    self.now = max(self.now, event)
            refused = sum(self._prefix_waits[s.id] for s in self._waiting)
            assert idle <= 100 + refused, (
                f"100 steps ran nothing, with {len(self._running)} running and "
                f"{len(self._waiting)} waiting"
            )
        raise AssertionError(
            f"{len(self._running)} running and {len(self._waiting)} waiting are left after "
            f"{max_steps} steps"
        )

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _check(self, seq: Sequence, call: str) -> None:
        assert self._in_step, f"{call} outside of schedule()"
        assert seq.status is not Status.FINISHED, f"{call}: {seq} has ended"
        assert seq in self._running or seq in self._waiting, f"{call}: {seq} is unknown"

    def _end(self, seq: Sequence, reason: str) -> None:
        seq.status, seq.finish_reason, seq.row = Status.FINISHED, reason, -1
        self._blocks.pop(seq.id, None)
        if reason != "abort":
            self.finished.append(seq)
            self.finish_times[seq.request.id] = self.now
