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
    completions = [_completion(index, seq, state) for index, seq in enumerate(request.sequences)]
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


def _completion(index: int, seq: Sequence, state: RequestState) -> CompletionOutput:
    params = state.request.params
    detokenizer = seq.output.detokenizer
    text = detokenizer.text if detokenizer is not None else ""
    if params.stop and text and seq.finish_reason is None:
        text = text[: len(text) - held_back(text, params.stop)]
    return CompletionOutput(
        index=index,
        text=text,
        token_ids=seq.output_token_ids,
        cumulative_logprob=seq.cumulative_logprob if params.logprobs is not None else None,
        logprobs=None if seq.logprobs is None else list(seq.logprobs),
        finish_reason=seq.finish_reason,
        stop_reason=seq.stop_reason,
    )
