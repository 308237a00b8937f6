"""``beam``: the most probable continuations, by beam search as transformers defines it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from pyllmlite.core.errors import RequestError
from pyllmlite.core.request import Status
from pyllmlite.hooks.decoder import Actions, Decoder, StepResult

if TYPE_CHECKING:
    from pyllmlite.core.request import Sequence

# What would change the log-probabilities that beams are compared by, and its value when off.
_OFF: dict[str, Any] = {
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0, "logit_bias": None, "stop": [],
    "best_of": None,
}  # fmt: skip


class _Candidate(NamedTuple):
    """A beam and a token behind it."""

    logprob: float  # of the whole continuation
    token: int
    beam: Sequence


@dataclass(eq=False)
class _Ended:
    """A continuation that is complete.  ``token`` is still to be appended to ``seq``; None: it
    has been."""

    score: float
    logprob: float
    seq: Sequence
    token: int | None


@dataclass
class _Search:
    """What all beams of a request share.

    Attributes:
        num_candidates: Best continuations looked at in a step; with so many, ``width`` of them
            do not end.
        stop_ids: Tokens that end a beam; none of the first ``min_tokens`` can be one.
        logprobs: Of the beams that run, by sequence id.
        reported: The best tokens behind each, of those that have had their turn in this step.
        ended: The best continuations that are complete, best first; at most ``width``.
    """

    width: int
    length_penalty: float
    early_stopping: bool | str
    num_candidates: int
    stop_ids: frozenset[int]
    min_tokens: int
    max_tokens: int
    logprobs: dict[int, float]
    reported: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    ended: list[_Ended] = field(default_factory=list)

    def candidates(self, beams: list[Sequence], length: int) -> list[_Candidate]:
        """The best continuations of all beams by one token, their ``length``-th."""
        banned = self.stop_ids if length <= self.min_tokens else frozenset()
        found = [
            _Candidate(self.logprobs[beam.id] + logprob, token, beam)
            for beam in beams
            for token, logprob in self.reported[beam.id]
            if token not in banned
        ]
        found.sort(key=lambda candidate: -candidate.logprob)
        self.reported.clear()
        return found[: self.num_candidates]

    def keep_best(self, candidates: list[_Candidate], length: int) -> list[_Ended]:
        """Enter continuations that are complete; returns those that others displace."""
        every = self.ended + [
            _Ended(self.score(c.logprob, length), c.logprob, c.beam, c.token) for c in candidates
        ]
        every.sort(key=lambda ended: -ended.score)
        self.ended, rest = every[: self.width], every[self.width :]
        return [ended for ended in rest if ended.token is None]

    def score(self, logprob: float, length: int) -> float:
        return logprob / length**self.length_penalty

    def goes_on(self, best: float, length: int) -> bool:
        """Can a running beam still come among the best?  ``best``: the greatest log-probability
        of those that run, which have ``length`` tokens."""
        if len(self.ended) < self.width:
            return True
        if self.early_stopping is True:
            return False
        if self.early_stopping == "never" and self.length_penalty > 0:
            length = self.max_tokens
        return self.score(best, length) > self.ended[-1].score


class Beam(Decoder):
    """Beam search (Graves 2012), step by step as in transformers' ``_beam_search``: the same
    candidates, length penalty, early stopping and scores.

    Words of the request, in ``SamplingParams.extra_args``, or of ``BeamSearchParams``:
        beam_width: Beams that run; 4.
        length_penalty: A continuation's score is its log-probability divided by its length to
            this power; 1.
        early_stopping: True: stop when ``beam_width`` continuations have ended; False: when the
            best beam, as long as it is now, would score less than the worst of them;
            ``"never"``: when it would at any length.

    ``n`` continuations come out, the best first; ``cumulative_logprob`` is their
    log-probability.

    Under constraints only the allowed tokens are candidates, with the log-probabilities that the
    model gives them (as with transformers' ``prefix_allowed_tokens_fn``): a sequence's score is
    what it would be without.  Where they allow fewer than ``beam_width`` continuations, fewer beams
    run, and fewer than ``n`` may come out.
    """

    name = "beam"
    needs_sync = True
    takes_drafts = False
    owns_completions = True

    def open(self, seq: Sequence) -> None:
        params = seq.request.params
        words = _checked(params.extra_args)
        width = words["beam_width"]
        for name, off in _OFF.items():
            if getattr(params, name) != off:
                raise RequestError(f"beam search compares plain log-probabilities: no {name}")
        if params.temperature not in (0, 1):
            raise RequestError("beam search compares plain log-probabilities: no temperature")
        if params.n > width:
            raise RequestError(f"n ({params.n}) is more than beam_width ({width})")
        eos = () if params.ignore_eos else self.context.eos_token_ids
        stop_ids = frozenset(eos) | frozenset(params.stop_token_ids or ())
        num_candidates = max(2, 1 + len(stop_ids)) * width
        if min(num_candidates, self.context.vocab_size) > self.context.max_logprobs:
            raise RequestError(
                f"beam_width {width} with {len(stop_ids)} end tokens looks at {num_candidates} "
                f"tokens a beam; the engine's max_logprobs is {self.context.max_logprobs}"
            )
        room = self.context.max_model_len - seq.num_prompt_tokens
        seq.state = _Search(
            width,
            words["length_penalty"],
            words["early_stopping"],
            num_candidates,
            stop_ids,
            params.min_tokens,
            room if params.max_tokens is None else min(room, params.max_tokens),
            {seq.id: 0.0},
        )

    def fork(self, parent: Sequence, child: Sequence) -> None:
        child.state = parent.state

    def sampling(self, seq: Sequence) -> dict[str, Any]:
        # What the sampler draws is not looked at: greedy is cheapest.
        num = min(seq.state.num_candidates, self.context.vocab_size)
        return {"num_logprobs": num, "temperature": 0.0, "top_of_processed": True}

    def advance(self, seq: Sequence, result: StepResult, actions: Actions) -> None:
        search: _Search = seq.state
        search.reported[seq.id] = [entry for entry in result.top(0) if entry[1] > -math.inf]
        beams = [s for s in seq.request.sequences if s.status is not Status.FINISHED]
        if any(beam.id not in search.reported for beam in beams):
            return  # their turn comes in this step or, if they wait for a row, in a later one
        length = seq.num_output_tokens + 1
        tops = dict(search.reported)
        candidates = search.candidates(beams, length)
        if not candidates and not search.ended:
            raise ValueError("no token may follow any beam")
        last = length >= search.max_tokens
        ends = [last or c.token in search.stop_ids for c in candidates]
        running = [c for c, end in zip(candidates, ends, strict=True) if not end]
        # Those behind the first ``width`` are there so that as many go on, not to be results.
        complete = [c for c, end in zip(candidates[: search.width], ends, strict=False) if end]
        dropped = search.keep_best(complete, length)
        running = running[: search.width]
        if running and not search.goes_on(running[0].logprob, length):
            running = []
        self._replace(search, beams, running, tops, actions)
        for ended in dropped:
            actions.end(ended.seq, "dropped")
        if not running:
            self._finish(seq.request.params.n, search, actions)

    @staticmethod
    def _replace(
        search: _Search,
        beams: list[Sequence],
        running: list[_Candidate],
        tops: dict[int, list[tuple[int, float]]],
        actions: Actions,
    ) -> None:
        """Every beam becomes its successors: ``end``, ``fork``, ``append``, in this order."""
        new = [ended for ended in search.ended if ended.token is not None]
        parents = [c.beam for c in running] + [ended.seq for ended in new]
        found = [tops[parent.id] for parent in parents]
        for beam in beams:
            if beam not in parents:
                actions.end(beam, "dropped")
        taken: set[int] = set()
        heirs = []
        for parent in parents:
            heirs.append(actions.fork(parent) if parent.id in taken else parent)
            taken.add(parent.id)
        search.logprobs.clear()
        for candidate, heir, top in zip(running, heirs, found, strict=False):
            search.logprobs[heir.id] = candidate.logprob
            actions.append(heir, [candidate.token], [top])
        behind = len(running)
        for ended, heir, top in zip(new, heirs[behind:], found[behind:], strict=True):
            token, ended.seq, ended.token = ended.token, heir, None
            actions.append(heir, [token], [top])

    @staticmethod
    def _finish(n: int, search: _Search, actions: Actions) -> None:
        for ended in search.ended[n:]:
            actions.end(ended.seq, "dropped")
        best = search.ended[:n]
        actions.rank([ended.seq for ended in best], [ended.logprob for ended in best])


def _checked(args: Mapping[str, Any]) -> dict[str, Any]:
    """The three words with their defaults.  ``RequestError``."""
    width = args.get("beam_width", 4)
    if not isinstance(width, int) or isinstance(width, bool) or width < 1:
        raise RequestError(f"beam_width must be an integer of at least 1, got {width!r}")
    penalty = args.get("length_penalty", 1.0)
    if not isinstance(penalty, (int, float)) or not math.isfinite(penalty):
        raise RequestError(f"length_penalty must be a number, got {penalty!r}")
    early = args.get("early_stopping", False)
    if not isinstance(early, bool) and early != "never":
        raise RequestError(f'early_stopping must be True, False or "never", got {early!r}')
    return {"beam_width": width, "length_penalty": float(penalty), "early_stopping": early}
