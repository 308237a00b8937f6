"""A request that starts again elsewhere goes on where its reader was.

Its tokens depend on the prompt, the parameters and the seed alone (docs/native.md: a row's bits
depend on no neighbour), so a second run says the same again.  What was sent already is left out,
and compared: where the machines differ in what they round to, the rest would not fit.
"""

from __future__ import annotations

from typing import Any


class Diverged(Exception):
    """The second run says something else than the first."""


class Replay:
    """One prompt's completions over several runs.

    Attributes:
        accepted: An engine has taken it.
    """

    def __init__(self) -> None:
        self.accepted = False
        self._text: dict[int, str] = {}  # sent, per completion
        self._tokens: dict[int, int] = {}
        self._ended: set[int] = set()
        self._seen: dict[int, list[int]] = {}  # in this run: characters, tokens

    def restart(self) -> None:
        """The next deltas are those of a new run."""
        self._seen = {}

    def fresh(self, deltas: list[list[Any]]) -> list[list[Any]]:
        """What of the deltas ``[index, text, count, logprobs, finish reason, stop reason]`` has
        not been sent.  ``Diverged``: they do not continue what has been."""
        found = []
        for delta in deltas:
            made = self._rest(*delta)
            if made is not None:
                found.append(made)
        return found

    def _rest(
        self, index: int, text: str, count: int, logprobs: Any, reason: Any, stop: Any
    ) -> list[Any] | None:
        seen = self._seen.setdefault(index, [0, 0])
        sent = self._text.get(index, "")
        known = sent[seen[0] : seen[0] + len(text)]
        if text[: len(known)] != known:
            raise Diverged
        seen[0] += len(text)
        seen[1] += count
        text = text[len(known) :]
        count = max(min(count, seen[1] - self._tokens.get(index, 0)), 0)
        if index in self._ended:
            if text or count:
                raise Diverged
            return None
        if reason is not None:
            if seen[0] < len(sent):  # it has ended before it got there
                raise Diverged
            self._ended.add(index)
        elif not text and not count:
            return None
        self._text[index] = sent + text
        self._tokens[index] = self._tokens.get(index, 0) + count
        if logprobs is not None:
            logprobs = logprobs[len(logprobs) - count :]
        return [index, text, count, logprobs, reason, stop]
