"""What came out of a step, as a decoder sees it, and the log-probabilities in it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pyllmlite.core.request import Logprob

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    import numpy as np

    from pyllmlite.core.request import Sequence


class Result:
    """A :class:`~pyllmlite.hooks.decoder.StepResult`, for one sequence after the other.

    Attributes:
        tokens: What was chosen, cut behind the last accepted draft.
        num_rows: Rows it was chosen after.
        first: The first of them.
    """

    __slots__ = ("_batch", "first", "num_rows", "num_top", "tokens")

    def __init__(self, batch: Any) -> None:
        self._batch = batch
        self.tokens: Seq[int] = []
        self.num_rows = 0
        self.first = 0
        self.num_top = 0

    def top(self, row: int) -> list[tuple[int, float]]:
        at = self.first + row
        num = max(self.num_top, 0)
        ids = self._batch.top_ids[at][:num].tolist()
        return list(zip(ids, self._batch.top_logprobs[at][:num].tolist(), strict=True))

    def logits(self, row: int) -> np.ndarray:
        return self._batch.logits(self.first + row)


class Logprobs:
    """The step's log-probabilities as Python numbers, read once a step and only if wanted."""

    def __init__(self, batch: Any, piece: Callable[[int], str | None]) -> None:
        self._batch = batch
        self._piece = piece
        self._rows_of: dict[int, tuple[int, int]] = {}
        self._read = False

    def begin(self) -> None:
        self._read = False
        self._rows_of.clear()

    def set_rows(self, seq: Sequence, first: int, count: int) -> None:
        """The rows after which a token of ``seq`` was chosen in this step."""
        self._rows_of[seq.id] = first, count

    def share_row(self, parent: Sequence, child: Sequence) -> None:
        if parent.id in self._rows_of:
            self._rows_of[child.id] = self._rows_of[parent.id]

    def of_sequence(self, seq: Sequence, index: int, token: int, num: int) -> dict[int, Logprob]:
        """Of the ``index``-th token that ``seq`` got in this step, and of the ``num`` best.  A
        decoder may append more than was drawn: the row behind is somebody else's."""
        first, count = self._rows_of.get(seq.id, (0, 0))
        if index >= count:
            return {token: self._make(token, math.nan, None)}
        return self.of_row(first + index, token, num, seq.output.num_top)

    def of_top(self, top: Seq[tuple[int, float]], token: int, num: int) -> dict[int, Logprob]:
        """Of a token that a decoder took from a row's best, in whatever step that was."""
        ranked = [(i, logprob, at) for at, (i, logprob) in enumerate(top, start=1)]
        mine = next((entry for entry in ranked if entry[0] == token), (token, math.nan, None))
        found = {token: self._make(*mine)}
        for other, logprob, rank in ranked[:num]:
            if other != token and logprob > -math.inf:
                found[other] = self._make(other, logprob, rank)
        return found

    def of_row(self, row: int, token: int, num: int, known: int = 0) -> dict[int, Logprob]:
        """``known``: how many of the row's best were counted, where that is more than ``num``."""
        if not self._read:
            batch = self._batch
            self._tokens = batch.token_list
            self._logprobs = batch.logprobs.tolist()
            self._ranks = batch.ranks.tolist()
            self._top_ids = batch.top_ids.tolist()
            self._top = batch.top_logprobs.tolist()
            self._read = True
        found: dict[int, Logprob] = {}
        if row < len(self._tokens) and self._tokens[row] == token:
            found[token] = self._make(token, self._logprobs[row], self._ranks[row])
        else:  # a decoder took another one than was sampled
            ids = self._top_ids[row][: max(num, known)] if row < len(self._top_ids) else []
            at = ids.index(token) if token in ids else -1
            found[token] = (
                self._make(token, self._top[row][at], at + 1)
                if at >= 0
                else self._make(token, math.nan, None)
            )
        if num > 0:
            best = zip(self._top_ids[row][:num], self._top[row][:num], strict=True)
            for rank, (other, logprob) in enumerate(best, start=1):
                if other != token or math.isnan(found[token].logprob):
                    found[other] = self._make(other, logprob, rank)
        return found

    def _make(self, token: int, logprob: float, rank: int | None) -> Logprob:
        return Logprob(logprob, rank, self._piece(token))
