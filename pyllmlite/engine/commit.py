"""After the run: what was computed is committed to the cache, what was drawn to the sequences."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pyllmlite.core.request import Sequence, Status
from pyllmlite.engine.failure import failure
from pyllmlite.engine.results import Result

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyllmlite.engine.actions import SequenceActions
    from pyllmlite.engine.results import Logprobs
    from pyllmlite.engine.schedule import Step
    from pyllmlite.engine.state import RequestState, SequenceState
    from pyllmlite.hooks.cache import KVCache

_BAD = {
    1: "the model's logits are not finite (NaN or infinity)",
    2: "no token is allowed: the mask and the bans leave none",
}


class Committer:
    """The second half of the transaction."""

    def __init__(
        self,
        batch: Any,
        cache: KVCache,
        actions: SequenceActions,
        logprobs: Logprobs,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._batch = batch
        self._cache = cache
        self._actions = actions
        self._logprobs = logprobs
        self._result = Result(batch)
        self._tokens: list[int] = []  # of this step, a token for each row of logits
        self._status: list[int] | None = None  # None: no row failed

    def commit(self, step: Step) -> None:
        batch, actions, result = self._batch, self._actions, self._result
        batch.append_sampled()
        self._tokens = tokens = batch.token_list
        self._status = status = batch.status.tolist() if batch.any_failed else None
        commit = self._cache.commit
        idle: list[Sequence] = []  # those that have no token to run next
        self._logprobs.begin()
        for seq, error in step.failed:
            actions.fail(seq.output.request, error)
        behind = 0
        for seq, start, count, rows in zip(
            step.seqs, step.starts, step.counts, step.logits, strict=True
        ):
            first, behind = behind, behind + rows
            state: SequenceState = seq.output
            if state.direct and rows and status is None and seq.row >= 0:
                seq.num_computed = end = start + count
                commit(seq.id, seq.token_ids, end)
                if end == seq.num_prompt_tokens:
                    self._note_first_token(seq)
                actions.take(seq, state, tokens[first])
                if state.constraint_states and seq.row >= 0:
                    self._tell(seq, state, tokens[first])
            elif self._commit_special(seq, state, start + count, first, behind):
                before, drafts = len(seq.token_ids), seq.draft_ids
                if before == seq.num_prompt_tokens:
                    self._note_first_token(seq)
                try:
                    state.decoder.advance(seq, result, actions)
                except Exception as error:
                    actions.fail(state.request, failure(state.decoder, error))
                if drafts:
                    self._settle_drafts(seq, before, drafts)
                if seq.num_computed >= len(seq.token_ids) or seq.row < 0:
                    idle.append(seq)
        self._check_progress(idle)
        actions.flush()

    def _tell(self, seq: Sequence, state: SequenceState, token: int) -> None:
        """The constraints hear of a token that did not end the sequence."""
        request = state.request
        for constraint, at in zip(request.constraints, state.constraint_states, strict=True):
            try:
                constraint.accept(at, token)
            except Exception as error:
                self._actions.fail(request, failure(constraint, error))
                return

    def _note_first_token(self, seq: Sequence) -> None:
        request = seq.request
        if request.first_token_time is None:
            request.first_token_time = self._clock()

    def _commit_special(
        self, seq: Sequence, state: SequenceState, end: int, first: int, behind: int
    ) -> bool:
        """Chunks, scored prompts, drafts, births, rows that failed.  Is there a token for the
        decoder?"""
        request = state.request
        if seq.status is Status.FINISHED or not self._usable(seq, first, behind):
            return False  # it ended with another sequence of its request, or does so now
        rows = 1
        if seq.draft_ids:
            rows = self._commit_drafts(seq, first)
        else:
            self._cache.commit(seq.id, seq.token_ids, end)
            start = seq.num_computed
            seq.num_computed = end
            if request.scoring:
                self._score(seq, request, start, end, first)
            if first == behind or end < len(seq.token_ids):
                return False
            first = behind - 1
        if request.unborn:
            self._give_birth(seq, request)
        result = self._result
        result.tokens = self._tokens[first : first + rows]
        result.num_rows = rows
        result.first = first
        result.num_top = state.num_top
        if request.num_logprobs >= 0:
            self._logprobs.set_rows(seq, first, rows)
        return seq.row >= 0  # unless its request has failed on the way

    def _usable(self, seq: Sequence, first: int, behind: int) -> bool:
        """Rows behind the first rejected draft do not count."""
        status = self._status
        if status is None:
            return True
        last = behind
        if seq.draft_ids:
            last = first + self._accepted(seq, first) + 1
        bad = next((status[row] for row in range(first, last) if status[row]), 0)
        if bad:
            self._actions.fail(seq.output.request, _BAD.get(bad, f"sampler status {bad}"))
        return not bad

    def _accepted(self, seq: Sequence, first: int) -> int:
        accepted = 0
        for draft in seq.draft_ids:
            if self._tokens[first + accepted] != draft:
                break
            accepted += 1
        return accepted

    def _commit_drafts(self, seq: Sequence, first: int) -> int:
        """Returns how many tokens were chosen; ``seq.draft_ids`` keeps those accepted."""
        ids = seq.token_ids
        proposed, accepted = len(seq.draft_ids), self._accepted(seq, first)
        end = len(ids) + accepted
        self._cache.commit(seq.id, ids + seq.draft_ids[:accepted], end)
        if accepted < proposed:
            self._cache.truncate(seq.id, end)
        seq.num_computed = end
        del seq.draft_ids[accepted:]
        request = seq.output.request
        try:
            if request.proposer is not None:
                request.proposer.verified(seq, proposed, accepted)
        except Exception as error:
            self._actions.fail(request, failure(request.proposer, error))
        return accepted + 1

    def _give_birth(self, seq: Sequence, request: RequestState) -> None:
        try:
            self._actions.give_birth(seq)
        except Exception as error:
            self._actions.fail(request, failure("starting the other completions", error))

    def _score(self, seq: Sequence, state: RequestState, start: int, end: int, first: int) -> None:
        """The row of position p scored the prompt's token p + 1; the first token has no score."""
        request = state.request
        num = request.params.prompt_logprobs or 0
        if request.prompt_logprobs is None or start == 0:
            request.prompt_logprobs = [None]
        for position in range(start, min(end, seq.num_prompt_tokens - 1)):
            token = seq.token_ids[position + 1]
            row = first + position - start
            request.prompt_logprobs.append(self._logprobs.of_row(row, token, num))
        state.scored = end

    def _settle_drafts(self, seq: Sequence, before: int, drafts: list[int]) -> None:
        """A decoder may have appended other tokens than were accepted: what the cache holds of
        drafts that are not in the output is forgotten."""
        seq.draft_ids = []
        if seq.status is not Status.RUNNING:
            return
        same = 0
        for draft, token in zip(drafts, seq.token_ids[before:], strict=False):
            if draft != token:
                break
            same += 1
        if same < len(drafts):
            seq.num_computed = before + same
            self._cache.truncate(seq.id, seq.num_computed)

    def _check_progress(self, idle: list[Sequence]) -> None:
        """A sequence may wait for others of its request (beams), but somebody must have a token
        to run.  One that has ended may have been the last that got on."""
        for seq in idle:
            if seq.num_computed < len(seq.token_ids) and seq.row >= 0:
                continue  # another one's turn gave it a token
            request: RequestState = seq.output.request
            if not request.live or any(
                other.num_uncomputed and other.status is not Status.FINISHED
                for other in request.request.sequences
            ):
                continue
            self._actions.fail(
                request,
                f"decoder {request.decoder.name!r} neither appended a token nor ended a sequence",
            )
