"""Steps done, loss and time left, on standard error."""

from __future__ import annotations

import sys
import time
from typing import Any

LINE_SECONDS = 15.0  # between two lines where there is no terminal


def clock(seconds: float) -> str:
    """``75`` to ``1:15``."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """A bar on a terminal, else a line now and then.

    Args:
        total: What there is to do.
        start: What an earlier run has done: it counts for nothing in the time left.
        what: The noun of a line: ``step``.
    """

    def __init__(self, total: int, start: int = 0, what: str = "step", show: bool = True) -> None:
        self.total, self.start, self.what = total, start, what
        self._began = self._last = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        self._show = show and sys.stderr is not None
        if self._show and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn(what), BarColumn(), MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"), TextColumn("{task.fields[left]} left"),
                console=Console(stderr=True),
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("", total=total, completed=start, note="", left="-:--")
        elif self._show and start:
            self._say(f"going on: {start} of {total} {what}s are there")

    def update(self, done: int, note: str = "") -> None:
        """``done`` of all are done, earlier runs' included."""
        if not self._show:
            return
        now = time.monotonic()
        made = done - self.start
        left = clock((now - self._began) / made * (self.total - done)) if made > 0 else "-:--"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note, left=left)
        elif now - self._last >= LINE_SECONDS or done >= self.total:
            self._last = now
            text = f"{self.what} {done} of {self.total}"
            self._say(", ".join([text, *([note] if note else []), f"{left} left"]))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._show = False

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
