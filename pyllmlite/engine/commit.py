"""After the run: what was computed is committed to the cache, what was drawn to the sequences."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pyllmlite.core.request import Sequence, Status
from pyllmlite.engine.failure import failure
from pyllmlite.engine.results import Result

if TYPE_CHECKING:
    from pyllmlite.engine.actions import SequenceActions
    from pyllmlite.engine.results import Logprobs
    from pyllmlite.engine.schedule import Step
    from pyllmlite.engine.state import RequestState
    from pyllmlite.hooks.cache import KVCache

_BAD = {
    1: "the model's logits are not finite (NaN or infinity)",
    2: "no token is allowed: the mask and the bans leave none",
}


class Committer:
    """The second half of the transaction."""

    def __init__(
        self, batch: Any, cache: KVCache, actions: SequenceActions, logprobs: Logprobs
    ) -> None:
        self._batch = batch
        self._cache = cache
        self._actions = actions
        self._logprobs = logprobs
        self._result = Result(batch)

    def commit(self, step: Step) -> None:
        tokens = self._batch.token_list
        status = self._batch.status.tolist() if self._batch.any_failed else None
        actions, result = self._actions, self._result
        commit = self._cache.commit
        self._logprobs.begin()
        for seq, error in step.failed:
            actions.fail(seq.output.request, error)
        first = 0
        for seq, start, count, rows in zip(
            step.seqs, step.starts, step.counts, step.logits, strict=True
        ):
            behind = first + rows
            if seq.status is Status.FINISHED:  # with another sequence of its request
                first = behind
                continue
            state: RequestState = seq.output.request
            if status is not None and not self._usable(seq, status, tokens, first, behind):
                first = behind
                continue
            ids = seq.token_ids
            end = start + count
            if rows == 1 and end == len(ids) and not state.unborn and not state.special:
                # Plain decoding, or the end of a prompt.
                commit(seq.id, ids, end)
                seq.num_computed = end
                result.tokens = tokens[first:behind]
                result.num_rows = 1
                result.first = first
            elif not self._commit_special(seq, state, end, tokens, first, rows):
                first = behind
                continue
            first = behind
            if state.num_logprobs >= 0:
                self._logprobs.set_rows(seq, result.first, result.num_rows)
            result.num_top = seq.output.num_top
            before = len(ids)
            if state.request.first_token_time is None:
                state.request.first_token_time = time.monotonic()
            drafts = seq.draft_ids
            try:
                state.decoder.advance(seq, result, actions)
            except Exception as error:
                actions.fail(state, failure(state.decoder, error))
            if drafts:
                self._settle_drafts(seq, before, drafts)
        self._check_progress(step)
        actions.flush()

    def _usable(
        self, seq: Sequence, status: list[int], tokens: list[int], first: int, behind: int
    ) -> bool:
        """Rows behind the first rejected draft do not count."""
        last = behind
        if seq.draft_ids:
            last = first + self._accepted(seq, tokens, first) + 1
        bad = next((status[row] for row in range(first, last) if status[row]), 0)
        if bad:
            self._actions.fail(seq.output.request, _BAD.get(bad, f"sampler status {bad}"))
        return not bad

    @staticmethod
    def _accepted(seq: Sequence, tokens: list[int], first: int) -> int:
        accepted = 0
        for draft in seq.draft_ids:
            if tokens[first + accepted] != draft:
                break
            accepted += 1
        return accepted

    def _commit_special(
        self, seq: Sequence, state: RequestState, end: int, tokens: list[int], first: int, rows: int
    ) -> bool:
        """Chunks, scored prompts, drafts, births.  Is there a token for the decoder?"""
        ids, result = seq.token_ids, self._result
        accepted = len(seq.draft_ids)
        if accepted:
            proposed = accepted
            accepted = self._accepted(seq, tokens, first)
            end = len(ids) + accepted
            self._cache.commit(seq.id, ids + seq.draft_ids[:accepted], end)
            if accepted < proposed:
                self._cache.truncate(seq.id, end)
            seq.num_computed = end
            del seq.draft_ids[accepted:]
            if state.proposer is not None:
                try:
                    state.proposer.verified(seq, proposed, accepted)
                except Exception as error:
                    self._actions.fail(state, failure(state.proposer, error))
                    return False
            result.tokens = tokens[first : first + accepted + 1]
            result.num_rows = accepted + 1
            result.first = first
            return True
        self._cache.commit(seq.id, ids, end)
        start = seq.num_computed
        seq.num_computed = end
        if state.scoring:
            self._score(seq, state, start, end, first)
        if rows == 0 or end < len(ids):
            return False
        result.tokens = tokens[first + rows - 1 : first + rows]
        result.num_rows = 1
        result.first = first + rows - 1
        if state.unborn:
            try:
                self._actions.give_birth(seq)
            except Exception as error:
                self._actions.fail(state, failure("starting the other completions", error))
                return False
        return True

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

    def _check_progress(self, step: Step) -> None:
        """A sequence may wait for others of its request (beams), but somebody must have a token
        to run."""
        for seq in step.seqs:
            # One that has ended may have been the last that got on.
            if seq.num_computed >= len(seq.token_ids) or seq.row < 0:
                state: RequestState = seq.output.request
                if not state.live or any(
                    other.num_uncomputed and other.status is not Status.FINISHED
                    for other in state.request.sequences
                ):
                    continue
                self._actions.fail(
                    state,
                    f"decoder {state.decoder.name!r} neither appended a token nor ended a sequence",
                )
