"""Beam search as a call of its own: its parameters and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyllmlite.core.sampling import SamplingParams

if TYPE_CHECKING:
    from pyllmlite.core.request import RequestOutput


@dataclass
class BeamSearchParams:
    """Words are vLLM's, and transformers' ``early_stopping``; the search is that of the decoder
    ``beam``, which has them explained.

    Attributes:
        beam_width: Beams that run, and continuations that come out.
        temperature: 0 or 1: beams are compared by the model's own probabilities.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    include_stop_str_in_output: bool = False

    def sampling_params(self) -> SamplingParams:
        """The same for ``generate``."""
        return SamplingParams(
            # Greedy with n > 1 is refused, since it gives n times the same; beams never sample.
            temperature=self.temperature or 1.0,
            n=self.beam_width,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            decoder="beam",
            proposer="none",
            extra_args={
                "beam_width": self.beam_width,
                "length_penalty": self.length_penalty,
                "early_stopping": self.early_stopping,
            },
        )


@dataclass
class BeamSearchSequence:
    """``tokens``: prompt and continuation; ``text``: of the continuation; ``score``:
    ``cum_logprob`` divided by the continuation's length to the power ``length_penalty``."""

    tokens: list[int]
    text: str
    cum_logprob: float
    score: float
    finish_reason: str | None = None


@dataclass
class BeamSearchOutput:
    """``sequences``: the best first."""

    sequences: list[BeamSearchSequence]

    @classmethod
    def of(cls, output: RequestOutput, length_penalty: float) -> BeamSearchOutput:
        sequences = []
        for completion in output.outputs:
            length = max(len(completion.token_ids), 1)
            logprob = completion.cumulative_logprob or 0.0
            sequences.append(
                BeamSearchSequence(
                    output.prompt_token_ids + completion.token_ids,
                    completion.text,
                    logprob,
                    logprob / length**length_penalty,
                    completion.finish_reason,
                )
            )
        return cls(sequences)
