"""A request is taken in: checked, given its strategies and its first sequence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pyllmlite.core.errors import PyllmliteError, RequestError
from pyllmlite.core.request import Request
from pyllmlite.core.sampling import SamplingParams
from pyllmlite.engine.detokenize import Detokenizer
from pyllmlite.engine.failure import failure
from pyllmlite.engine.prompts import check_prompt, parse_prompt
from pyllmlite.engine.state import RequestState, SequenceState, mix_seed

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyllmlite.engine.actions import SequenceActions
    from pyllmlite.hooks.decoder import Constraint


class Admission:
    """Everything that can be wrong with a request is found here, before it runs.

    Args:
        built: The model and its strategies.
        max_logprobs: Most that a request may ask for.
        seed: Requests without a seed draw theirs from it and from their number.
    """

    def __init__(self, built: Any, actions: SequenceActions, max_logprobs: int, seed: int) -> None:
        self._built = built
        self._actions = actions
        self._max_logprobs = max_logprobs
        self._seed = seed
        self._count = 0
        self._cache_len = built.cache.max_tokens_per_sequence()

    def make(
        self,
        request_id: str,
        prompt: object,
        params: SamplingParams,
        priority: int = 0,
        client: str = "",
        stream: bool = False,
    ) -> RequestState:
        """A request with its first sequence, its strategies opened.  ``RequestError``."""
        built = self._built
        if not isinstance(params, SamplingParams):
            raise RequestError(f"sampling_params must be SamplingParams, got {params!r}")
        # Schedulers compare it with everybody's.
        if not isinstance(priority, (int, float)) or not math.isfinite(priority):
            raise RequestError(f"priority must be a number, got {priority!r}")
        if not isinstance(client, str):
            raise RequestError(f"client must be a string, got {client!r}")
        text, ids = parse_prompt(prompt, built.tokenizer)
        check_prompt(ids, built.spec.vocab_size, built.max_model_len, self._cache_len)
        self._check_params(params)
        if stream and params.num_completions > params.n:
            raise RequestError("best_of knows the best when all have ended: it cannot be streamed")
        decoder = built.decoder
        if params.decoder is not None and params.decoder != decoder.name:
            decoder = self._named(params.decoder, built.decoders)
        proposer = built.proposer
        if params.proposer == "none":
            proposer = None
        elif params.proposer is not None and (
            proposer is None or params.proposer != proposer.name
        ):
            proposer = self._named(params.proposer, built.proposers)
        constraints = [c for c in built.constraints if _applies(c, params)]
        self._check_pairs(decoder, proposer, constraints)
        if params.structured_outputs is not None and not constraints:
            raise RequestError(
                "structured_outputs: no constraint plugin is there for it; the built-in one is "
                "'guidance'"
            )
        request = Request(request_id, ids, params, prompt=text, priority=priority, client=client)
        seed = params.seed if params.seed is not None else mix_seed(self._seed, self._count)
        state = RequestState(
            request,
            decoder,
            proposer,
            constraints,
            seed,
            min(built.max_model_len, self._cache_len),
            built.spec.eos_token_ids,
            stream,
        )
        self._open(state)
        self._count += 1
        return state

    @staticmethod
    def _named(name: str, strategies: Callable[[str], Any]) -> Any:
        try:
            return strategies(name)
        except PyllmliteError as error:
            raise RequestError(str(error)) from None

    @staticmethod
    def _check_pairs(decoder: Any, proposer: Any, constraints: list[Any]) -> None:
        if proposer is not None and not decoder.takes_drafts:
            raise RequestError(
                f"decoder {decoder.name!r} does not work with proposer {proposer.name!r}; "
                "proposer='none' turns it off for a request"
            )
        if constraints and not decoder.takes_constraints:
            raise RequestError(
                f"decoder {decoder.name!r} does not work with constraint {constraints[0].name!r}"
            )

    def _open(self, state: RequestState) -> None:
        request = state.request
        detokenizer = None
        seq = self._actions.new_sequence(state, list(request.prompt_token_ids), 0)
        if request.params.detokenize and self._built.tokenizer is not None:
            detokenizer = Detokenizer(
                self._built.tokenizer,
                seq.token_ids,
                seq.num_prompt_tokens,
                request.params.skip_special_tokens,
            )
        seq.output = SequenceState(state, detokenizer)
        request.sequences.append(seq)
        state.live = 1
        part: Any = state.decoder
        try:
            state.decoder.open(seq)
            for part in state.constraints:
                seq.output.constraint_states.append(part.open(seq))
            if state.proposer is not None:
                part = state.proposer
                state.proposer.open(seq)
        except Exception as error:
            if isinstance(error, PyllmliteError):
                raise
            raise RequestError(failure(part, error)) from error

    def _check_params(self, params: SamplingParams) -> None:
        vocab_size = self._built.spec.vocab_size
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            if value is not None and value > self._max_logprobs:
                raise RequestError(
                    f"{name}={value} is more than max_logprobs={self._max_logprobs}, an option "
                    "of the engine"
                )
        for name, ids in (
            ("stop_token_ids", params.stop_token_ids or ()),
            ("logit_bias", params.logit_bias or ()),
        ):
            for token in ids:
                if not isinstance(token, int) or not 0 <= token < vocab_size:
                    raise RequestError(f"{name}: token id {token!r} is not in [0, {vocab_size})")
        if params.stop and self._built.tokenizer is None:
            raise RequestError("stop strings need a tokenizer; use stop_token_ids without one")


def _applies(constraint: Constraint, params: SamplingParams) -> bool:
    try:
        return constraint.applies(params)
    except Exception as error:
        raise RequestError(failure(constraint, error)) from error
