"""What a decoder may do with a sequence: append, fork, end."""

from __future__ import annotations

import logging
import operator
from typing import TYPE_CHECKING, Any

from pyllmlite.core.request import Sequence, Status
from pyllmlite.engine.state import RequestState, SequenceState
from pyllmlite.engine.stop import find_stop

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from pyllmlite.engine.pool import SequencePool
    from pyllmlite.engine.results import Logprobs

log = logging.getLogger("pyllmlite")


class SequenceActions:
    """The engine's :class:`~pyllmlite.hooks.decoder.Actions`.

    Tokens that were appended reach the native batch in one call a step (:meth:`flush`).

    Args:
        on_change: Called with a request's state when it has ended or streams and has changed.
        vocab_size: Token ids are below it; a decoder that appends another one fails.
    """

    def __init__(
        self,
        pool: SequencePool,
        batch: Any,
        logprobs: Logprobs,
        on_change: Callable[[RequestState], None],
        vocab_size: int,
    ) -> None:
        self._pool = pool
        self._batch = batch
        self._logprobs = logprobs
        self._on_change = on_change
        self._vocab_size = vocab_size
        self._rows: list[int] = []
        self._tokens: list[int] = []
        self._positions: list[int] = []
        self._next_id = 0

    def new_sequence(self, state: RequestState, token_ids: list[int], child: int) -> Sequence:
        self._next_id += 1
        return Sequence(self._next_id, state.request, token_ids, child)

    # -- append ----------------------------------------------------------------------------------
    def take(self, seq: Sequence, state: SequenceState, token: int) -> None:
        """Append a token that the native batch has sampled, and so appended itself."""
        ids = seq.token_ids
        ids.append(token)
        if token in state.stop_ids:
            self._end_by_token(seq, token)
        elif len(ids) >= state.limit:
            self.end(seq, "length")

    def append(
        self,
        seq: Sequence,
        token_ids: Seq[int],
        tops: Seq[Seq[tuple[int, float]]] | None = None,
    ) -> None:
        state: SequenceState = seq.output
        if not state.plain or len(token_ids) != 1 or seq.row < 0:
            self._append(seq, state, token_ids, tops)
            return
        token = token_ids[0]
        if type(token) is not int or not 0 <= token < self._vocab_size:
            token = self._checked(token)
        ids = seq.token_ids
        position = len(ids)
        ids.append(token)
        if token in state.stop_ids:
            self._end_by_token(seq, token)
        elif position + 1 >= state.limit:
            self.end(seq, "length")
        else:
            self._rows.append(seq.row)
            self._tokens.append(token)
            self._positions.append(position)

    def _append(
        self,
        seq: Sequence,
        state: SequenceState,
        token_ids: Seq[int],
        tops: Seq[Seq[tuple[int, float]]] | None,
    ) -> None:
        if seq.status is Status.FINISHED:
            return
        ids, request = seq.token_ids, state.request
        params = request.request.params
        text = state.detokenizer if params.stop or request.stream else None
        before = len(ids)
        request.changed = True
        for index, token in enumerate([self._checked(token) for token in token_ids]):
            ids.append(token)
            if request.logprobs is not None:
                top = None if tops is None else tops[index]
                self._add_logprob(seq, index, token, request.logprobs, top)
            may_stop = len(ids) >= request.min_tokens_end
            if may_stop and token in state.stop_ids:
                self._end_by_token(seq, token)
                return
            for constraint, at in zip(request.constraints, state.constraint_states, strict=True):
                constraint.accept(at, token)
            if text is not None:
                piece = text.advance(len(ids))
                found = None
                if piece and may_stop and params.stop:
                    found = find_stop(text.text, len(piece), params.stop)
                if found is not None:
                    position, stop = found
                    keep = len(stop) if params.include_stop_str_in_output else 0
                    text.text = text.text[: position + keep]
                    state.detokenizer = text
                    self._end(seq, "stop", stop, cut=True)
                    return
            if len(ids) >= state.limit:
                self.end(seq, "length")
                return
        if seq.row >= 0:
            count = len(ids) - before
            self._rows += [seq.row] * count
            self._tokens += ids[before:]
            self._positions += range(before, len(ids))
        if request.stream:
            self._on_change(request)

    def _checked(self, token: object) -> int:
        """Before it reaches the native batch, which all requests share."""
        try:
            token_id = operator.index(token)  # type: ignore[arg-type]
        except TypeError:
            raise ValueError(f"token id {token!r} is not an integer") from None
        if not 0 <= token_id < self._vocab_size:
            raise ValueError(f"token id {token_id} is not in [0, {self._vocab_size})")
        return token_id

    def _add_logprob(
        self,
        seq: Sequence,
        index: int,
        token: int,
        num: int,
        top: Seq[tuple[int, float]] | None,
    ) -> None:
        if top is None:
            entry = self._logprobs.of_sequence(seq, index, token, num)
        else:
            entry = self._logprobs.of_top(top, token, num)
        if seq.logprobs is None:
            seq.logprobs = []
        seq.logprobs.append(entry)
        seq.cumulative_logprob += entry[token].logprob

    def flush(self) -> None:
        """Write appended tokens into the native batch."""
        if self._rows:
            rows, tokens, positions = self._rows, self._tokens, self._positions
            self._rows, self._tokens, self._positions = [], [], []
            self._batch.append(rows, tokens, positions)

    # -- fork ------------------------------------------------------------------------------------
    def fork(self, seq: Sequence) -> Sequence:
        if seq.status is Status.FINISHED:
            raise ValueError("a sequence that has ended cannot be forked; fork it first")
        return self._fork(seq, seq.num_computed)

    def give_birth(self, seq: Sequence) -> None:
        """The prompt of a request with ``n > 1`` is in the cache: the other completions start
        from it.  They run its last token again, each with random numbers of its own."""
        state: RequestState = seq.output.request
        while state.unborn:
            state.unborn -= 1
            self._fork(seq, seq.num_prompt_tokens - 1)
        for sibling in state.request.sequences:
            sibling.output.direct = state.direct

    def _fork(self, seq: Sequence, num_computed: int) -> Sequence:
        state: SequenceState = seq.output
        request = state.request
        children = request.request.sequences
        child = self.new_sequence(request, list(seq.token_ids), max(s.child for s in children) + 1)
        text = state.detokenizer
        child.output = SequenceState(request, text.fork(child.token_ids) if text else None)
        child.output.constraint_states = [
            constraint.fork(at)
            for constraint, at in zip(request.constraints, state.constraint_states, strict=True)
        ]
        child.cumulative_logprob = seq.cumulative_logprob
        child.logprobs = None if seq.logprobs is None else list(seq.logprobs)
        children.append(child)
        request.live += 1
        self._logprobs.share_row(seq, child)
        pool = self._pool
        if seq.row >= 0 and pool.free_rows:
            self.flush()
            pool.cache.fork(seq.id, child.id, pool.next_row)
            row = pool.take_row(child)
            if num_computed < seq.num_computed:
                pool.cache.truncate(child.id, num_computed)
            child.num_computed = num_computed
            self._batch.copy_row(seq.row, row, len(seq.token_ids))
        else:
            pool.add(child, first=True)
        request.decoder.fork(seq, child)
        if request.proposer is not None:
            request.proposer.open(child)
        if child.row >= 0:
            self._batch.set_sampling(child.row, **request.sampling_for(child))
        return child

    # -- end -------------------------------------------------------------------------------------
    def end(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        self._end(seq, reason, stop_reason)

    def _end(
        self, seq: Sequence, reason: str, stop_reason: int | str | None, cut: bool = False
    ) -> None:
        """``cut``: its text is complete, a stop string has ended it."""
        state: SequenceState = seq.output
        request = state.request
        if not isinstance(reason, str) or not reason:
            raise ValueError(f"the reason of an end is stop, length or dropped, got {reason!r}")
        if reason == "dropped" and request.request.sequences == [seq]:
            raise ValueError("the last sequence of a request cannot be dropped")
        if seq.status is Status.FINISHED:
            if reason == "dropped" and seq in request.request.sequences:
                request.request.sequences.remove(seq)
            return
        self._pool.remove(seq)
        seq.finish_reason = reason
        seq.stop_reason = stop_reason
        if state.detokenizer is not None and not cut:
            self._finish_text(seq, state)
        self._close(seq, request)
        if reason == "dropped":
            request.request.sequences.remove(seq)
        request.live -= 1
        request.changed = True
        if request.live == 0 or request.stream:
            self._on_change(request)

    def rank(self, seqs: Seq[Sequence], logprobs: Seq[float]) -> None:
        request = seqs[0].request
        if len(seqs) != len(logprobs) or sorted(s.id for s in seqs) != sorted(
            s.id for s in request.sequences
        ):
            raise ValueError("rank takes every sequence of the request and a number for each")
        request.sequences[:] = seqs
        for seq, logprob in zip(seqs, logprobs, strict=True):
            seq.cumulative_logprob = logprob
            seq.output.ranked = True

    def _end_by_token(self, seq: Sequence, token: int) -> None:
        named = token in seq.output.request.named_stop_ids
        self.end(seq, "stop", token if named else None)

    def _finish_text(self, seq: Sequence, state: SequenceState) -> None:
        end = len(seq.token_ids)
        params = state.request.request.params
        stopped = seq.finish_reason == "stop" and seq.num_output_tokens > 0
        if stopped and not params.include_stop_str_in_output:
            end -= seq.token_ids[-1] in state.stop_ids
        assert state.detokenizer is not None
        try:
            state.detokenizer.finish(end)
        except Exception as error:  # a tokenizer that fails on some id takes no request down
            log.warning("request %s: detokenizing failed: %s", seq.request.id, error)

    def _close(self, seq: Sequence, request: RequestState) -> None:
        for part in (request.proposer, request.decoder):
            if part is None:
                continue
            try:
                part.close(seq)
            except Exception as error:  # the sequence is gone already, nobody can be told more
                log.warning("%s.close failed: %s", type(part).__name__, error)

    def fail(self, request: RequestState, message: str, reason: str = "error") -> None:
        """The whole request ends, with what it has so far."""
        if reason == "error" and request.request.error is None:
            request.request.error = message
        request.unborn = 0
        for seq in list(request.request.sequences):
            self.end(seq, reason)
