"""A request, the sequences it consists of, and what comes out of it."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyllmlite.core.sampling import SamplingParams


class Status(enum.Enum):
    WAITING = "waiting"  # not in the running set: new, or preempted
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One line of tokens of a request (a request with ``n > 1`` or beams has several).

    Owned by the engine.  Schedulers and decoders read it; only the engine writes it.

    Attributes:
        id: Unique in the engine; keys the cache.
        request: The request it belongs to.
        token_ids: Prompt and output so far.
        num_prompt_tokens: How many of them are the prompt's.
        num_computed: Tokens whose keys and values are in the cache.
        draft_ids: Tokens proposed for verification in the coming step.
        row: Row of the native batch, -1 while waiting.
        child: Index among the request's completions.
    """

    __slots__ = (
        "child",
        "cumulative_logprob",
        "draft_ids",
        "finish_reason",
        "id",
        "logprobs",
        "num_computed",
        "num_prompt_tokens",
        "output",
        "preemptions",
        "request",
        "row",
        "state",
        "status",
        "stop_reason",
        "token_ids",
    )

    def __init__(self, id: int, request: Request, token_ids: list[int], child: int = 0) -> None:
        self.id = id
        self.request = request
        self.token_ids = token_ids
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_computed = 0
        self.draft_ids: list[int] = []
        self.row = -1
        self.child = child
        self.status = Status.WAITING
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.cumulative_logprob = 0.0
        self.logprobs: list[dict[int, Logprob]] | None = None
        self.preemptions = 0
        self.state: Any = None  # the decoder's own
        self.output: Any = None  # the engine's detokenizer state

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed(self) -> int:
        """Tokens to run before the next one can be chosen: 1 in decode, more in prefill."""
        return len(self.token_ids) - self.num_computed

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    def __repr__(self) -> str:
        return (
            f"Sequence({self.id}, {self.status.value}, tokens={len(self.token_ids)}, "
            f"computed={self.num_computed})"
        )


@dataclass
class Request:
    """What was asked.  ``priority``: smaller runs earlier (vLLM's convention); ``client``: for
    fairness between clients."""

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt: str | None = None
    arrival_time: float = field(default_factory=time.monotonic)
    priority: int = 0
    client: str = ""
    sequences: list[Sequence] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    first_token_time: float | None = None
    finish_time: float | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        return bool(self.sequences) and all(s.status is Status.FINISHED for s in self.sequences)


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One completion.  ``finish_reason``: stop, length, abort, error, or None while running;
    ``stop_reason``: the stop string or token id that ended it."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Seconds on the monotonic clock."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass
class RequestOutput:
    """A request's outputs so far; shapes and names are vLLM's."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    metrics: RequestMetrics | None = None
    error: str | None = None
