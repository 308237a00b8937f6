"""Ctrl-C between two steps, never inside one."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class DeferredInterrupt:
    """While it is open, Ctrl-C is noted and raised by :meth:`check`, so that no step is cut off
    in its middle.  A second Ctrl-C is raised at once.  Only the main thread gets signals; in any
    other this does nothing."""

    def __init__(self) -> None:
        self._noted = False
        self._previous: object = None

    def __enter__(self) -> DeferredInterrupt:
        self._noted = False
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.getsignal(signal.SIGINT)
            if self._previous is signal.default_int_handler:
                signal.signal(signal.SIGINT, self._note)
            else:  # somebody else's: it knows what it does
                self._previous = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            self._previous = None
        if kind is None:
            self.check()

    @property
    def noted(self) -> bool:
        """Ctrl-C came and has not been raised yet."""
        return self._noted

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted:
            raise KeyboardInterrupt
        self._noted = True

    def check(self) -> None:
        if self._noted:
            self._noted = False
            raise KeyboardInterrupt
