"""``prompt-lookup``: what followed the last tokens further ahead is likely to follow them again."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from pyllmlite.core.errors import ConfigError
from pyllmlite.hooks.decoder import DecoderContext, Proposer
from pyllmlite_plugins.decoder.draft_length import TOKEN_COST, DraftLength
from pyllmlite_plugins.decoder.ngram_index import NgramIndex

if TYPE_CHECKING:
    from pyllmlite.core.request import Sequence


class _State:
    """Of one sequence."""

    __slots__ = ("call", "index", "length")

    def __init__(self, smallest: int, largest: int) -> None:
        self.index = NgramIndex(smallest, largest)
        self.length = DraftLength(largest + 1)
        self.call = 0


class PromptLookup(Proposer):
    """Drafts by looking up the last n-gram in prompt and output (Saxena 2023, "Prompt Lookup
    Decoding"), the longest first, as many tokens as the acceptance so far is worth.

    Options, in ``extra``; the first three are vLLM's words:
        prompt_lookup_min, prompt_lookup_max: Tokens of an n-gram; 2 and 8.
        num_speculative_tokens: Of a draft at most; 32.
        draft_token_cost: Time of one more token in a step, as a part of that of a step with one
            token; 0.15.
    """

    name = "prompt-lookup"

    def __init__(self, context: DecoderContext) -> None:
        super().__init__(context)
        self._smallest = _integer(context, "prompt_lookup_min", 2)
        self._largest = _integer(context, "prompt_lookup_max", max(8, self._smallest))
        self._longest = _integer(context, "num_speculative_tokens", 32)
        if self._largest < self._smallest:
            raise ConfigError(
                f"prompt_lookup_max ({self._largest}) is less than prompt_lookup_min "
                f"({self._smallest})"
            )
        cost = context.extra.get("draft_token_cost", TOKEN_COST)
        if not isinstance(cost, (int, float)) or not 0 < cost < 1:
            raise ConfigError(f"draft_token_cost must be in (0, 1), got {cost!r}")
        self._token_cost = float(cost)
        self._states: dict[int, _State] = {}
        self._calls = 0

    def open(self, seq: Sequence) -> None:
        self._states[seq.id] = _State(self._smallest, self._largest)

    def propose(self, seq: Sequence, max_tokens: int) -> Seq[int]:
        state = self._states[seq.id]
        # Every sequence that decodes is asked once a step: so many share the next one.
        self._calls += 1
        batch = self._calls - state.call if state.call else 1
        state.call = self._calls
        ids = seq.token_ids
        n, end = state.index.find(ids)
        if n == 0:
            return ()
        longest = min(self._longest, max_tokens)
        length = state.length.choose(n, min(batch, 1024), self._token_cost, longest)
        behind = ids[end : end + length]
        # A repetition that reaches the end of the text goes on as it began.
        return behind if len(behind) == length else (behind * length)[:length]

    def verified(self, seq: Sequence, num_proposed: int, num_accepted: int) -> None:
        self._states[seq.id].length.learn(num_proposed, num_accepted)

    def close(self, seq: Sequence) -> None:
        self._states.pop(seq.id, None)


def _integer(context: DecoderContext, name: str, default: int) -> int:
    value = context.extra.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}")
    return value
