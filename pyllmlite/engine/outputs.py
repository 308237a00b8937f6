"""Requests as users see them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyllmlite.core.request import CompletionOutput, RequestMetrics, RequestOutput
from pyllmlite.engine.stop import held_back

if TYPE_CHECKING:
    from pyllmlite.core.request import Sequence
    from pyllmlite.engine.state import RequestState


def request_output(state: RequestState) -> RequestOutput:
    """What the request has come to so far; lists are copies, safe to hand to another thread."""
    request = state.request
    sequences = request.sequences
    n = request.params.n
    if state.live == 0 and request.params.num_completions > n:
        sequences = sorted(sequences, key=_logprob_per_token, reverse=True)[:n]
    completions = [_completion(index, seq, state) for index, seq in enumerate(sequences)]
    return RequestOutput(
        request_id=request.id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        outputs=completions,
        finished=state.live == 0,
        prompt_logprobs=request.prompt_logprobs,
        num_cached_tokens=request.num_cached_tokens,
        metrics=RequestMetrics(request.arrival_time, request.first_token_time, request.finish_time),
        error=request.error,
    )


def _logprob_per_token(seq: Sequence) -> float:
    return seq.cumulative_logprob / max(seq.num_output_tokens, 1)


def _completion(index: int, seq: Sequence, state: RequestState) -> CompletionOutput:
    params = state.request.params
    detokenizer = seq.output.detokenizer
    text = detokenizer.text if detokenizer is not None else ""
    if params.stop and text and seq.finish_reason is None:
        text = text[: len(text) - held_back(text, params.stop)]
    known = params.logprobs is not None or seq.output.ranked
    logprobs = None if params.logprobs is None else seq.logprobs
    return CompletionOutput(
        index=index,
        text=text,
        token_ids=seq.output_token_ids,
        cumulative_logprob=seq.cumulative_logprob if known else None,
        logprobs=None if logprobs is None else list(logprobs),
        finish_reason=seq.finish_reason,
        stop_reason=seq.stop_reason,
    )
