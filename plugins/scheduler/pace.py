"""How many prompt tokens a step may take so that those who decode in it do not feel it much."""

from __future__ import annotations

from collections import deque
from statistics import median

FIRST = 16  # prompt tokens of the first step in which somebody decodes
REMEMBERED = 15  # steps whose median counts: one that was held up changes nothing


class Pace:
    """Learns from the clock of ``step.now`` what a step of decodes takes, and what a prompt token
    adds to it.

    Args:
        slowdown: A step with prompt tokens takes at most so many times one without (above 1).
    """

    def __init__(self, slowdown: float) -> None:
        self._slowdown = slowdown
        self._usual: deque[float] = deque(maxlen=REMEMBERED)
        self._added: deque[float] = deque(maxlen=REMEMBERED)  # seconds a prompt token
        self._last: tuple[float, int] | None = None
        self._most = FIRST  # so many have been tried; a chunk grows to twice that at most

    def begin(self, now: float, goes_on: bool) -> None:
        """A step begins.  ``goes_on``: the one before it has left somebody running, so that the
        time since then was the step's and not an idle engine's."""
        if self._last is not None and goes_on:
            start, prompt_tokens = self._last
            seconds = now - start
            if not prompt_tokens:
                self._usual.append(seconds)
            elif self._usual:
                self._added.append(max(0.0, seconds - median(self._usual)) / prompt_tokens)
        self._last = None

    def allowed(self) -> int:
        """Prompt tokens of this step, at least 1."""
        if not self._usual or not self._added:
            return FIRST
        added = median(self._added)
        room = (self._slowdown - 1) * median(self._usual)
        tokens = 2 * self._most if added * 2 * self._most <= room else int(room / added)
        return max(1, tokens)

    def end(self, now: float, prompt_tokens: int) -> None:
        """A step in which somebody decodes is put together; one without teaches nothing."""
        self._last = (now, prompt_tokens)
        self._most = max(self._most, prompt_tokens)
