"""How a request's tokens are chosen and when it ends."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, fields
from typing import Any

from pyllmlite.core.errors import RequestError
from pyllmlite.core.structured import StructuredOutputsParams

MAX_N = 16384  # completions of one prompt, as in vLLM
_NUMBERS = (
    "n", "best_of", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "presence_penalty", "frequency_penalty", "seed", "max_tokens", "min_tokens", "logprobs",
    "prompt_logprobs",
)  # fmt: skip


@dataclass
class SamplingParams:
    """Words and defaults are vLLM's wherever it has them.

    Attributes:
        n: Completions per prompt; they share the prompt's KV blocks.
        best_of: So many are made, and the ``n`` of the highest log-probability per token come
            out, the best first; None: ``n``.
        temperature: 0 is greedy (the lowest id among equal logits).
        top_p: Nucleus sampling (Holtzman et al. 2020), in (0, 1].
        top_k: Keep the k best; 0 or -1 keeps all.
        min_p: Keep tokens of at least ``min_p`` times the best one's probability.
        repetition_penalty: Keskar et al. 2019; over prompt and output; 1 is off; in [1e-6, 1e6].
        presence_penalty, frequency_penalty: As in the OpenAI API, over the output; 0 is off.
        logit_bias: Token id to a bias in [-100, 100], added to the logit.
        seed: With a seed, a request's tokens depend on nothing but itself.
        stop: Strings that end the output; cut off unless ``include_stop_str_in_output``.
        stop_token_ids: Tokens that end it, besides the model's own end tokens.
        ignore_eos: Go on past the model's end tokens.
        max_tokens: Tokens to generate at most; None: up to the model's length.
        min_tokens: No end token before this many.
        logprobs: Log-probabilities of the chosen token and the n best, of the raw
            distribution; None: none.
        prompt_logprobs: The same for the prompt's tokens.
        detokenize: Turn tokens into text; without, ``text`` is empty and no stop
            strings can be given.
        decoder: Name of the decoder; None: the engine's.
        proposer: Name of what proposes draft tokens; None: the engine's; ``"none"``: nothing.
        structured_outputs: What the text must look like, a ``StructuredOutputsParams`` or its
            words in a dict.
        extra_args: For decoders and plugins; unknown names are refused by none.
    """

    n: int = 1
    best_of: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    decoder: str | None = None
    proposer: str | None = None
    structured_outputs: StructuredOutputsParams | dict[str, Any] | None = None
    extra_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.stop is None:
            self.stop = []
        elif isinstance(self.stop, str):
            self.stop = [self.stop]
        if self.top_k == -1:
            self.top_k = 0
        if isinstance(self.structured_outputs, dict):
            known = {f.name for f in fields(StructuredOutputsParams)}
            for name in self.structured_outputs.keys() - known:
                raise RequestError(
                    f"structured_outputs does not know {name!r}; known: {', '.join(sorted(known))}"
                )
            self.structured_outputs = StructuredOutputsParams(**self.structured_outputs)
        elif not isinstance(self.structured_outputs, StructuredOutputsParams | None):
            raise RequestError(
                "structured_outputs must be StructuredOutputsParams or a dict, got "
                f"{self.structured_outputs!r}"
            )
        if self.extra_args is None:
            self.extra_args = {}
        for name in _NUMBERS:  # NumPy's, as a sweep over parameters gives them
            value = getattr(self, name)
            if hasattr(value, "item") and getattr(value, "shape", None) == ():
                setattr(self, name, value.item())
        self._check()

    @property
    def num_completions(self) -> int:
        """Completions that are made, of which ``n`` come out."""
        return self.n if self.best_of is None else self.best_of

    def clone(self) -> SamplingParams:
        """A copy that shares nothing with this one."""
        return copy.deepcopy(self)

    def _check(self) -> None:
        def number(name: str, low: float, high: float, low_open: bool = False) -> None:
            value = getattr(self, name)
            ok = isinstance(value, (int, float)) and not isinstance(value, bool)
            ok = ok and math.isfinite(value)
            ok = ok and (value > low if low_open else value >= low) and value <= high
            if not ok:
                bracket = "(" if low_open else "["
                raise RequestError(f"{name} must be in {bracket}{low}, {high}], got {value!r}")

        def integer(name: str, low: int, optional: bool = False) -> None:
            value = getattr(self, name)
            if value is None and optional:
                return
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise RequestError(f"{name} must be an integer of at least {low}, got {value!r}")

        integer("n", 1)
        if self.n > MAX_N:
            raise RequestError(f"n must be at most {MAX_N}, got {self.n}")
        integer("best_of", self.n, optional=True)
        if (self.best_of or 1) > MAX_N:
            raise RequestError(f"best_of must be at most {MAX_N}, got {self.best_of}")
        number("temperature", 0.0, 1e6)
        number("top_p", 0.0, 1.0, low_open=True)
        integer("top_k", 0)
        number("min_p", 0.0, 1.0)
        number("repetition_penalty", 1e-6, 1e6)
        number("presence_penalty", -2.0, 2.0)
        number("frequency_penalty", -2.0, 2.0)
        integer("max_tokens", 1, optional=True)
        integer("min_tokens", 0)
        integer("logprobs", 0, optional=True)
        integer("prompt_logprobs", 0, optional=True)
        if self.seed is not None and type(self.seed) is not int:
            raise RequestError(f"seed must be an integer, got {self.seed!r}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) is greater than max_tokens ({self.max_tokens})"
            )
        if not isinstance(self.stop, list) or not all(
            isinstance(s, str) and s for s in self.stop
        ):
            raise RequestError("stop must be a non-empty string or a list of them")
        if self.stop and not self.detokenize:
            raise RequestError("stop strings need detokenize=True; use stop_token_ids without it")
        for name in ("n", "best_of"):
            if self.temperature == 0 and (getattr(self, name) or 1) > 1:
                raise RequestError(
                    f"{name} > 1 with temperature 0 gives equal outputs; use temperature > 0"
                )
        if self.stop_token_ids is not None and not isinstance(self.stop_token_ids, (list, tuple)):
            raise RequestError(f"stop_token_ids must be a list, got {self.stop_token_ids!r}")
        if self.logit_bias is not None and not isinstance(self.logit_bias, dict):
            raise RequestError(f"logit_bias must be a dict, got {self.logit_bias!r}")
        for token, bias in (self.logit_bias or {}).items():
            ok = isinstance(token, int) and isinstance(bias, (int, float))
            if not ok or not -100 <= bias <= 100:
                raise RequestError(
                    f"logit_bias maps token ids to [-100, 100], got {token!r}: {bias!r}"
                )
