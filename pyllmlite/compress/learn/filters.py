"""Which of a teacher's answers are worth learning from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pyllmlite.core.errors import ConfigError

GRAM = 4  # tokens of a repeated piece, as in seq-rep-4


def repetition(token_ids: Sequence[int], gram: int = GRAM) -> float:
    """Share of n-grams that stood there before (seq-rep-n, Welleck et al. 2020, section 6); 0 for
    a text shorter than one n-gram."""
    count = len(token_ids) - gram + 1
    if count < 1:
        return 0.0
    ids = tuple(token_ids)
    return 1 - len({ids[i : i + gram] for i in range(count)}) / count


@dataclass(frozen=True)
class Filters:
    """What an answer must be.

    Attributes:
        min_tokens: At least so long.
        max_repetition: :func:`repetition` at most; 1: any.
        min_confidence: The teacher's own probability of its tokens (geometric mean) at least; 0:
            any.
    """

    min_tokens: int = 8
    max_repetition: float = 0.5
    min_confidence: float = 0.0

    def __post_init__(self) -> None:
        if type(self.min_tokens) is not int or self.min_tokens < 1:
            raise ConfigError(
                f"min_tokens must be an integer of at least 1, got {self.min_tokens!r}"
            )
        for name in ("max_repetition", "min_confidence"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ConfigError(f"{name} must be in [0, 1], got {value!r}")

    def refusal(
        self, token_ids: Sequence[int], repeated: float, confidence: float | None
    ) -> str | None:
        """The name of the filter that drops an answer; None: it is kept."""
        if len(token_ids) < self.min_tokens:
            return "length"
        if repeated > self.max_repetition:
            return "repetition"
        if self.min_confidence and not (confidence or 0.0) >= self.min_confidence:
            return "confidence"
        return None


def confidence(logprobs: Sequence[float]) -> float:
    """Geometric mean of the tokens' probabilities."""
    return math.exp(sum(logprobs) / len(logprobs)) if logprobs else 0.0
