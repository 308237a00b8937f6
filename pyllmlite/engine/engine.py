"""The step loop: schedule, plan, run, commit.  A step is a transaction."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any

from pyllmlite.core.errors import RequestError
from pyllmlite.engine.actions import SequenceActions
from pyllmlite.engine.admission import Admission
from pyllmlite.engine.commit import Committer
from pyllmlite.engine.failure import failure
from pyllmlite.engine.outputs import request_output
from pyllmlite.engine.plan import Planner, propose
from pyllmlite.engine.pool import SequencePool
from pyllmlite.engine.results import Logprobs
from pyllmlite.engine.schedule import Step

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyllmlite.core.request import RequestOutput, Sequence
    from pyllmlite.core.sampling import SamplingParams
    from pyllmlite.engine.state import RequestState

# Steps in a row that may stay empty though somebody waits and no event is announced.
MAX_EMPTY_STEPS = 3
# Preemptions without anybody computing a token for the first time, besides 4 for each row.
MAX_PREEMPTIONS = 100
# Seconds; longer waits are cut in pieces.
MAX_WAIT = 3600.0


class Engine:
    """Runs requests on one model.  Not thread-safe: one thread calls it.

    Args:
        built: What ``pyllmlite.model.build.build`` returns.
        clock: Seconds; a simulation turns its own.
    """

    def __init__(self, built: Any, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.built = built
        self.scheduler = built.scheduler
        self.program = built.program
        self.batch = built.batch
        self.requests: dict[str, RequestState] = {}
        self.num_steps = 0
        self._max_num_seqs = built.max_num_seqs
        self.pool = SequencePool(
            built.cache, built.max_num_seqs, getattr(built, "worth_swapping", None)
        )
        self._pieces: dict[int, str] = {}
        self._changed: dict[str, RequestState] = {}
        self._special = 0  # live requests that need planning
        self._empty_steps = 0
        self._preemptions = 0  # so many there were when somebody last got on
        config = built.config
        logprobs = Logprobs(built.batch, self._piece)
        self.actions = SequenceActions(
            self.pool, built.batch, logprobs, self._note_change, built.spec.vocab_size
        )
        self._admission = Admission(built, self.actions, config.max_logprobs, config.seed)
        self._planner = Planner(built.batch, built.cache, built.spec.vocab_size)
        self._committer = Committer(built.batch, built.cache, self.actions, logprobs, clock)
        self._step = Step(
            self.pool, built.max_num_batched_tokens, built.max_logit_rows, self._start
        )

    # -- one step ------------------------------------------------------------------------------
    def step(self) -> list[RequestState]:
        """Run one step.  Returns the requests that ended, and those that stream and got tokens."""
        step = self._step
        step.begin(self._clock())
        special = self._special > 0
        try:
            if special:
                propose(self.pool, step, self.built.spec.vocab_size)
            self.scheduler.schedule(step)
        except Exception as error:
            self._fail(list(self.requests.values()), f"scheduler {self.scheduler.name!r}", error)
        else:
            if step.seqs:
                try:
                    self._planner.plan(step, special)
                    self.program.run(self.batch)
                    self._committer.commit(step)
                except Exception as error:
                    self._fail([seq.output.request for seq in step.seqs], "the step", error)
                    for seq in self.pool.waiting:  # the step's copies may not have been made
                        self.pool.forget_swapped(seq)
                if self.pool.preemptions != self._preemptions:
                    self._watch_preemptions(step)
                self.num_steps += 1
                self._empty_steps = 0
            else:
                self._nothing_ran(step)
        if not self._changed:
            return []
        changed = list(self._changed.values())
        self._changed.clear()
        return changed

    # -- requests ------------------------------------------------------------------------------
    def prepare(
        self,
        request_id: str,
        prompt: object,
        params: SamplingParams,
        priority: int = 0,
        client: str = "",
        stream: bool = False,
    ) -> RequestState:
        """Check a request without letting it in.  ``RequestError`` says what is wrong with it."""
        if request_id in self.requests:
            raise RequestError(f"a request with the id {request_id!r} is running already")
        return self._admission.make(request_id, prompt, params, priority, client, stream)

    def submit(self, state: RequestState) -> None:
        """Let a prepared request in."""
        self.requests[state.request.id] = state
        self._special += state.special
        for seq in state.request.sequences:
            self.pool.add(seq)

    def add(self, request_id: str, prompt: object, params: SamplingParams, **options: Any) -> None:
        """:meth:`prepare` and :meth:`submit`."""
        self.submit(self.prepare(request_id, prompt, params, **options))

    def discard(self, state: RequestState) -> None:
        """Close a prepared request that will not be submitted."""
        self.actions.fail(state, "", reason="abort")
        self._changed.pop(state.request.id, None)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request between two steps; its blocks are free at once.  None: not known."""
        state = self.requests.get(request_id)
        if state is None:
            return None
        self.actions.fail(state, "", reason="abort")
        self._changed.pop(request_id, None)
        return request_output(state)

    @property
    def has_unfinished(self) -> bool:
        return bool(self.requests)

    def wait_seconds(self) -> float:
        """How long nothing will happen without an arrival; 0: step at once."""
        if not self._empty_steps:
            return 0.0
        now = self._clock()
        try:
            event = self._next_event(now)
        except Exception:  # the next empty step says so
            return 0.0
        return 0.0 if event is None else min(event - now, MAX_WAIT)

    def stats(self) -> dict[str, int]:
        return {
            "steps": self.num_steps,
            "running": len(self.pool.running),
            "waiting": len(self.pool.waiting),
            **self.built.cache.stats(),
        }

    def check_integrity(self) -> None:
        """``AssertionError`` with a reason if something leaked."""
        self.pool.check_integrity()
        live = sum(state.live for state in self.requests.values())
        assert live == len(self.pool), f"{live} live sequences, {len(self.pool)} in the pool"

    # -- its parts call back ---------------------------------------------------------------------
    def _start(self, seq: Sequence) -> None:
        """A sequence has got a row: its tokens and sampling parameters go there."""
        state: RequestState = seq.output.request
        self.batch.set_sampling(seq.row, **state.sampling_for(seq))
        self._planner.table[seq.row, : len(seq.token_ids)] = seq.token_ids

    def _note_change(self, state: RequestState) -> None:
        request = state.request
        if state.live == 0 and request.finish_time is None:
            request.finish_time = self._clock()
            if self.requests.pop(request.id, None) is not None:
                self._special -= state.special
        self._changed[request.id] = state

    def _piece(self, token: int) -> str | None:
        """A token's text by itself, for log-probabilities."""
        tokenizer = self.built.tokenizer
        if tokenizer is None:
            return None
        if token not in self._pieces:
            self._pieces[token] = tokenizer.decode([token], skip_special_tokens=False)
        return self._pieces[token]

    def _next_event(self, now: float) -> float | None:
        """The scheduler's, if it is one: in the future, and not for ever away."""
        event = self.scheduler.next_event(now)
        return event if event is not None and now < event < math.inf else None

    # -- when it goes wrong ------------------------------------------------------------------------
    def _fail(self, states: list[RequestState], what: str, error: Exception) -> None:
        message = failure(what, error)
        for state in states:
            self.actions.fail(state, message)
        self.actions.flush()

    def _watch_preemptions(self, step: Step) -> None:
        """Whoever gives way computes again what it had.  Without end, if a scheduler lets nobody
        get further than that."""
        if any(seq.num_computed > seq.output.reached for seq in step.seqs):
            self._preemptions = self.pool.preemptions
        elif self.pool.preemptions - self._preemptions > MAX_PREEMPTIONS + 4 * self._max_num_seqs:
            count = self.pool.preemptions - self._preemptions
            message = f"scheduler {self.scheduler.name!r} preempted {count} times, nobody got on"
            for state in list(self.requests.values()):
                self.actions.fail(state, message)
            self._preemptions = self.pool.preemptions

    def _nothing_ran(self, step: Step) -> None:
        """An empty step: somebody could not be started, a time window is open, or a scheduler
        hangs."""
        pool = self.pool
        if step.failed:
            for seq, message in step.failed:
                self.actions.fail(seq.output.request, message)
            return
        if not len(pool):
            self._empty_steps = 0
            return
        self._empty_steps += 1
        try:
            if self._next_event(step.now) is not None:
                return
        except Exception as error:
            self._fail(list(self.requests.values()), f"scheduler {self.scheduler.name!r}", error)
            return
        stuck = pool.running and pool.waiting and not pool.running[0].num_uncomputed
        if len(pool.running) > 1 or stuck:
            # Nobody gets on, so somebody gives way.  Behind the others: it may hold the row that
            # another sequence of its own request needs for both to get on (beams).
            pool.preempt(pool.running[-1], first=False)
        elif self._empty_steps >= MAX_EMPTY_STEPS:
            name = f"scheduler {self.scheduler.name!r}"
            message = f"{name} put nobody into {self._empty_steps} steps in a row"
            blocked = [s for s in pool.running + pool.waiting if step.blocked_by_cache(s)]
            if blocked:
                message = (
                    f"the KV cache has no room for a sequence of {blocked[0].num_tokens} tokens; "
                    "raise kv_cache_memory"
                )
            for state in list(self.requests.values()):
                self.actions.fail(state, message)
            self._empty_steps = 0
