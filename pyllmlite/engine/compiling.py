"""Constraints are compiled in threads of their own, before their requests come in.

A grammar takes from a fraction of a millisecond to seconds, a tokenizer's trie some tenths of a
second; between two steps everybody would wait for it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyllmlite.core.errors import PyllmliteError, RequestError
from pyllmlite.engine.failure import failure
from pyllmlite.hooks.decoder import Constraint

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyllmlite.core.sampling import SamplingParams

# Seconds that a grammar may take, from its turn on.
TIMEOUT = 10.0
# It waits for its turn at most so many times as long.
PATIENCE = 6
# At work at once; one whose grammar takes longer than it may cannot be stopped, and is replaced.
THREADS, MOST_THREADS = 2, 8


class Compiler:
    """Not thread-safe but for its own threads: the engine's thread calls it.

    Args:
        constraints: Of the engine.
        notify: Called, from a thread, when there is something to :meth:`take`.
        timeout: Seconds, from its turn on.
    """

    def __init__(
        self,
        constraints: Sequence[Constraint],
        notify: Callable[[], None],
        timeout: float = TIMEOUT,
    ) -> None:
        # Those that compile nothing need no thread.
        self._constraints = [c for c in constraints if type(c).compile is not Constraint.compile]
        self._notify = notify
        self._timeout = timeout
        self._lock = threading.Lock()  # of the two that follow
        self._deadlines: dict[str, float] = {}
        self._running: set[str] = set()
        self._asked: queue.SimpleQueue[tuple[str, SamplingParams]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[str, Exception | None]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def wants(self, params: SamplingParams) -> bool:
        """Is there something to compile?"""
        return any(_applies(c, params) for c in self._constraints)

    def submit(self, id: str, params: SamplingParams) -> None:
        """Compile what the request needs."""
        with self._lock:
            self._deadlines[id] = time.monotonic() + PATIENCE * self._timeout
        self._asked.put((id, params))
        if len(self._threads) < THREADS:
            self._start_thread()

    def cancel(self, id: str) -> bool:
        """Nobody waits for it any more.  False: it is not being compiled."""
        with self._lock:
            return self._deadlines.pop(id, None) is not None

    def take(self) -> list[tuple[str, PyllmliteError | None]]:
        """Requests that are done, with what is wrong with them, and those whose time is up."""
        found: list[tuple[str, PyllmliteError | None]] = []
        while True:
            try:
                id, error = self._done.get_nowait()
            except queue.Empty:
                break
            if not self.cancel(id):
                continue
            if error is None or isinstance(error, PyllmliteError):
                found.append((id, error))
            else:
                found.append((id, RequestError(failure("the constraint", error))))
        now = time.monotonic()
        with self._lock:
            late = [(id, id in self._running) for id, end in self._deadlines.items() if end <= now]
            for id, _ in late:
                del self._deadlines[id]
        for id, began in late:
            message = f"the constraint was not compiled within {self._timeout:g} s: simplify it"
            if not began:
                message = "too many constraints are being compiled: try again later"
            elif len(self._threads) < MOST_THREADS:
                self._start_thread()
            found.append((id, RequestError(message)))
        return found

    def wait_seconds(self) -> float | None:
        """Until the next time-out; None: nothing is being compiled."""
        with self._lock:
            if not self._deadlines:
                return None
            return max(min(self._deadlines.values()) - time.monotonic(), 0.0)

    def _start_thread(self) -> None:
        # A daemon, so that one that hangs does not keep the process.
        thread = threading.Thread(target=self._work, name="compiler", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _work(self) -> None:
        while True:
            id, params = self._asked.get()
            with self._lock:
                if id not in self._deadlines:
                    continue
                self._deadlines[id] = time.monotonic() + self._timeout
                self._running.add(id)
            self._notify()  # the next time-out is another one now
            error: Exception | None = None
            try:
                for constraint in self._constraints:
                    if constraint.applies(params):
                        constraint.compile(params)
            except Exception as raised:
                error = raised
            with self._lock:
                self._running.discard(id)
            self._done.put((id, error))
            self._notify()


def _applies(constraint: Any, params: SamplingParams) -> bool:
    try:
        return bool(constraint.applies(params))
    except Exception:  # taking the request in says so
        return False
