"""What the engine keeps besides the plain data: one state a request, one a sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyllmlite.hooks.decoder import Decoder

if TYPE_CHECKING:
    from pyllmlite.core.request import Request, Sequence
    from pyllmlite.engine.detokenize import Detokenizer
    from pyllmlite.hooks.decoder import Constraint, Proposer

_MASK = (1 << 64) - 1
# What the native float32 and int32 hold.
_SMALLEST = 2.0**-126
_LARGEST = 2**31 - 1


def mix_seed(seed: int, index: int) -> int:
    """The ``index``-th 64-bit seed that follows from ``seed`` (SplitMix64, Steele et al. 2014)."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class RequestState:
    """Everything about a request that does not change, worked out once, and what is left of it.

    Attributes:
        limit: Tokens of a sequence at which it ends with ``length``.
        min_tokens_end: Sequences shorter than that may not end with a stop.
        stop_ids: Tokens that end a sequence; ``named_stop_ids`` those the request named.
        plain: Nothing to do for a new token but to append it and to look whether it ends.
        special: A step with it needs planning: drafts, masks, scores of the prompt.
        direct: All that there is to a step is to append the token that was sampled, and to tell
            the constraints of it.
        unborn: Completions still to be forked off when the prompt is in the cache.
        live: Sequences that have not ended.
        logprobs: As the request's, and 0 where the engine needs them itself.
        scored: Prompt tokens whose log-probability is known (``prompt_logprobs``).
        stream: Every step's outputs are wanted, not only the last ones.
        changed: A new output is due after this step.
    """

    __slots__ = (
        "changed",
        "constraints",
        "decoder",
        "direct",
        "limit",
        "live",
        "logprobs",
        "min_tokens_end",
        "named_stop_ids",
        "num_logprobs",
        "plain",
        "proposer",
        "request",
        "sampling",
        "scored",
        "seed",
        "special",
        "stop_ids",
        "stream",
        "unborn",
    )

    def __init__(
        self,
        request: Request,
        decoder: Decoder,
        proposer: Proposer | None,
        constraints: list[Constraint],
        seed: int,
        limit: int,
        eos_token_ids: tuple[int, ...],
        stream: bool,
    ) -> None:
        params = request.params
        prompt_len = len(request.prompt_token_ids)
        self.request = request
        self.decoder = decoder
        self.proposer = proposer
        self.constraints = constraints
        self.seed = seed & _MASK
        self.limit = limit
        if params.max_tokens is not None:
            self.limit = min(limit, prompt_len + params.max_tokens)
        self.min_tokens_end = prompt_len + params.min_tokens
        self.named_stop_ids = frozenset(params.stop_token_ids or ())
        eos = frozenset() if params.ignore_eos else frozenset(eos_token_ids)
        self.stop_ids = eos | self.named_stop_ids
        self.stream = stream
        # Those of which some are left out are compared by their log-probabilities.
        compared = params.num_completions > params.n
        self.logprobs = 0 if params.logprobs is None and compared else params.logprobs
        wanted = [n for n in (self.logprobs, params.prompt_logprobs) if n is not None]
        self.num_logprobs = max(wanted, default=-1)
        self.plain = not (
            params.stop or params.min_tokens or constraints or self.logprobs is not None or stream
        )
        self.special = bool(
            constraints
            or proposer is not None
            or decoder.plans_steps
            or params.prompt_logprobs is not None
        )
        self.direct = not (
            params.stop
            or params.min_tokens
            or stream
            or proposer is not None
            or decoder.plans_steps
            or self.num_logprobs >= 0
            or type(decoder).advance is not Decoder.advance
        )
        self.sampling = self._sampling(prompt_len)
        self.unborn = 0 if decoder.owns_completions else params.num_completions - 1
        self.live = 0
        self.scored = 0
        self.changed = False

    def _sampling(self, prompt_len: int) -> dict[str, Any]:
        params = self.request.params
        bias = params.logit_bias or {}
        return {
            "temperature": params.temperature,
            "top_p": max(params.top_p, _SMALLEST),
            "min_p": params.min_p,
            "top_k": min(params.top_k, _LARGEST),
            "repetition_penalty": params.repetition_penalty,
            "presence_penalty": params.presence_penalty,
            "frequency_penalty": params.frequency_penalty,
            "num_logprobs": self.num_logprobs,
            "prompt_len": prompt_len,
            "min_len": min(self.min_tokens_end, self.limit) if params.min_tokens else 0,
            "bias_ids": list(bias),
            "bias_values": list(bias.values()),
            "banned_ids": sorted(self.stop_ids) if params.min_tokens else [],
            "top_of_processed": False,
        }

    @property
    def scoring(self) -> bool:
        """Prompt tokens remain whose log-probability is asked for."""
        return self.request.params.prompt_logprobs is not None and self.scored < len(
            self.request.prompt_token_ids
        )

    def sampling_for(self, seq: Sequence) -> dict[str, Any]:
        """The native sampling parameters of one sequence."""
        seed = self.seed if seq.child == 0 else mix_seed(self.seed, seq.child)
        wishes = self.decoder.sampling(seq)
        unknown = wishes.keys() - self.sampling.keys() - {"seed"}
        if unknown:
            raise ValueError(
                f"sampling() names {', '.join(sorted(unknown))}; known: seed, "
                + ", ".join(self.sampling)
            )
        sampling = {**self.sampling, "seed": seed, **wishes}
        # A decoder may want more than the request asked for (beams), never less.
        sampling["num_logprobs"] = max(sampling["num_logprobs"], self.num_logprobs)
        seq.output.num_top = sampling["num_logprobs"]
        return sampling


class SequenceState:
    """Attributes:
    request: The request's state.
    decoder, stop_ids, limit, plain: Copied from there, for the step's inner loop.
    direct: As the request's, once its completions have been forked off.
    stamp: Number of the last step that it was put into.
    constraint_states: One for each of the request's constraints.
    detokenizer: Text so far; None: no text is asked for.
    blocked_at: Free blocks when the cache last had no room to start it; -1: it had.
    ranked: A decoder has set its ``cumulative_logprob``.
    num_top: Log-probabilities that its row yields, the decoder's wish included.
    reached: Tokens that it had computed at most when it was preempted.
    swapped: It waits, and its blocks in the swap space.
    """

    __slots__ = (
        "blocked_at",
        "constraint_states",
        "decoder",
        "detokenizer",
        "direct",
        "limit",
        "num_top",
        "plain",
        "ranked",
        "reached",
        "request",
        "stamp",
        "stop_ids",
        "swapped",
    )

    def __init__(self, request: RequestState, detokenizer: Detokenizer | None) -> None:
        self.request = request
        self.decoder = request.decoder
        self.direct = request.direct and not request.unborn
        self.stop_ids = request.stop_ids
        self.limit = request.limit
        self.plain = request.plain
        self.stamp = -1
        self.constraint_states: list[Any] = []
        self.detokenizer = detokenizer
        self.blocked_at = -1
        self.num_top = request.num_logprobs
        self.reached = 0
        self.ranked = False
        self.swapped = False
