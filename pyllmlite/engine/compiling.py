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

# Seconds that a grammar may take.
TIMEOUT = 10.0
THREADS = 2


class Compiler:
    """Not thread-safe but for its own threads: the engine's thread calls it.

    Args:
        constraints: Of the engine.
        notify: Called, from a thread, when there is something to :meth:`take`.
        timeout: Seconds, from being submitted on.
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
        self._deadlines: dict[str, float] = {}
        self._asked: queue.SimpleQueue[tuple[str, SamplingParams]] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[str, Exception | None]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def wants(self, params: SamplingParams) -> bool:
        """Is there something to compile?"""
        return any(_applies(c, params) for c in self._constraints)

    def submit(self, id: str, params: SamplingParams) -> None:
        """Compile what the request needs."""
        self._deadlines[id] = time.monotonic() + self._timeout
        self._asked.put((id, params))
        if len(self._threads) < THREADS:
            # A daemon, so that one that hangs does not keep the process.
            thread = threading.Thread(target=self._work, name="compiler", daemon=True)
            self._threads.append(thread)
            thread.start()

    def cancel(self, id: str) -> bool:
        """Nobody waits for it any more.  False: it is not being compiled."""
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
        for id in [id for id, deadline in self._deadlines.items() if deadline <= now]:
            del self._deadlines[id]
            message = f"the constraint was not compiled within {self._timeout:g} s: simplify it"
            found.append((id, RequestError(message)))
        return found

    def wait_seconds(self) -> float | None:
        """Until the next time-out; None: nothing is being compiled."""
        if not self._deadlines:
            return None
        return max(min(self._deadlines.values()) - time.monotonic(), 0.0)

    def _work(self) -> None:
        while True:
            id, params = self._asked.get()
            if id not in self._deadlines:
                continue
            error: Exception | None = None
            try:
                for constraint in self._constraints:
                    if constraint.applies(params):
                        constraint.compile(params)
            except Exception as raised:
                error = raised
            self._done.put((id, error))
            self._notify()


def _applies(constraint: Any, params: SamplingParams) -> bool:
    try:
        return bool(constraint.applies(params))
    except Exception:  # taking the request in says so
        return False
