"""Models beside a reference, token by token, all through the engine's own Programs.

A window is read in chunks: the reference's distribution over the vocabulary is in memory for a
chunk at a time, and every other model is compared with it there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pyllmlite.core.errors import CapacityError, ModelError

if TYPE_CHECKING:
    from pyllmlite.model.build import Built

CHUNK = 64  # tokens whose logits are in memory at once
SEQUENCE = 1


@dataclass(frozen=True)
class Distributions:
    """Over the vocabulary, a row a token: logits less the largest (float32), the logarithm of their
    exponentials' sum (float64), and the likeliest token."""

    shifted: np.ndarray
    log_sum: np.ndarray
    best: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray) -> Distributions:
        best = logits.argmax(axis=-1)
        shifted = logits - logits.max(axis=-1, keepdims=True)
        sums = np.exp(shifted).sum(axis=-1, dtype=np.float64)
        return cls(shifted, np.log(sums), best)

    def probabilities(self) -> np.ndarray:
        """float32 ``[tokens, vocab]``."""
        return np.exp(self.shifted) * np.exp(-self.log_sum)[:, None].astype(np.float32)

    def log_probability(self, tokens: np.ndarray) -> np.ndarray:
        """Of one token a row, float64."""
        return self.shifted[np.arange(len(tokens)), tokens] - self.log_sum


@dataclass
class Score:
    """Sums over tokens.

    Attributes:
        tokens: Distributions compared.
        kl, kl_squares: Of ``D(reference || model)``, nats.
        kl_largest: Of one token.
        agreed: Tokens whose most probable successor is the same.
        nll, predicted: Negative log-probability of the tokens that follow, and their number (the
            last of a window has none).
    """

    tokens: int = 0
    kl: float = 0.0
    kl_squares: float = 0.0
    kl_largest: float = 0.0
    agreed: int = 0
    nll: float = 0.0
    predicted: int = 0

    def add(
        self,
        reference: Distributions,
        probabilities: np.ndarray,
        other: Distributions,
        following: np.ndarray,
    ) -> None:
        """A chunk.

        Args:
            probabilities: The reference's, float32 ``[tokens, vocab]``.
            following: The next token of each; -1: there is none.
        """
        if not np.isfinite(other.log_sum).all():
            raise ModelError("the model gives logits that are not finite")
        differing = np.multiply(probabilities, reference.shifted - other.shifted)
        kl = differing.sum(axis=-1, dtype=np.float64) - (reference.log_sum - other.log_sum)
        self.tokens += len(kl)
        self.kl += float(kl.sum())
        self.kl_squares += float(np.square(kl).sum())
        self.kl_largest = max(self.kl_largest, float(kl.max(initial=0)))
        self.agreed += int((reference.best == other.best).sum())
        known = following >= 0
        self.nll -= float(other.log_probability(following)[known].sum())
        self.predicted += int(known.sum())

    @property
    def mean_kl(self) -> float:
        """Nats per token.  Rounding can leave a sum a hair below 0."""
        return max(self.kl / self.tokens, 0.0) if self.tokens else math.nan

    @property
    def kl_error(self) -> float:
        """Standard error of the mean, as if tokens were independent."""
        if not self.tokens:
            return math.nan
        variance = max(self.kl_squares / self.tokens - (self.kl / self.tokens) ** 2, 0.0)
        return math.sqrt(variance / self.tokens)

    @property
    def agreement(self) -> float:
        return self.agreed / self.tokens if self.tokens else math.nan

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll / self.predicted, 700.0)) if self.predicted else math.nan


def compare(
    reference: Built,
    others: list[Built],
    windows: list[list[int]],
    progress: Callable[[int], None] | None = None,
) -> tuple[Score, list[Score]]:
    """Scores of the reference (beside itself) and of every other model.

    Args:
        windows: Token ids; each is read from an empty context.
        progress: Called with the number of tokens that were read.
    """
    for other in others:
        if other.spec.vocab_size != reference.spec.vocab_size:
            raise ModelError(
                f"a vocabulary of {other.spec.vocab_size} tokens cannot be compared with the "
                f"reference's {reference.spec.vocab_size}"
            )
    own, scores = Score(), [Score() for _ in others]
    for tokens in windows:
        for built in (reference, *others):
            built.cache.acquire(SEQUENCE, 0, tokens)
            built.batch.token_table[0, : len(tokens)] = tokens
            built.batch.set_sampling(0, temperature=0.0)
        following = np.array([*tokens[1:], -1])
        for start in range(0, len(tokens), CHUNK):
            after = following[start : start + CHUNK]
            expected = Distributions.of(read_chunk(reference, tokens, start))
            probabilities = expected.probabilities()
            own.add(expected, probabilities, expected, after)
            for built, score in zip(others, scores, strict=True):
                found = Distributions.of(read_chunk(built, tokens, start))
                score.add(expected, probabilities, found, after)
            if progress is not None:
                progress(len(after))
        for built in (reference, *others):
            built.cache.free(SEQUENCE)
    return own, scores


def read_chunk(built: Built, tokens: list[int], start: int) -> np.ndarray:
    """Logits ``[count, vocab]`` behind the next tokens of a window whose first ``start`` were
    read."""
    count = min(CHUNK, len(tokens) - start)
    batch = built.batch
    if not built.cache.reserve(SEQUENCE, start + count):
        raise CapacityError("the KV cache holds no window; use a smaller --length")
    batch.set_step([0], [start], [count], [count])
    for row in range(count):
        batch.want_logits(row)
    built.program.run(batch)
    logits = np.stack([batch.logits(row) for row in range(count)])
    built.cache.commit(SEQUENCE, tokens, start + count)
    return logits
