"""The suites for the three parts of decoding, run by a small engine without a model.

The model of this engine is a table: after token t comes ``(7 * t + 3) % vocab``, whatever stood
before, so every decoder's output can be foretold.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from pyllmlite.core.request import Request, Sequence, Status
from pyllmlite.core.sampling import SamplingParams
from pyllmlite.hooks.decoder import DecoderContext
from pyllmlite.testing.base import Conformance

VOCAB = 50
EOS = 0


def next_token(token: int) -> int:
    return (7 * token + 3) % VOCAB


class Result:
    """A ``StepResult``: the table's tokens behind ``last`` and the accepted drafts."""

    def __init__(
        self, tokens: list[int], last: list[int], allowed: frozenset[int] | None = None
    ) -> None:
        self.tokens: Seq[int] = tokens
        self.num_rows = len(tokens)
        self._last = last  # the token before each row
        self._allowed = allowed  # by a mask that ``top`` is to know of; None: there is none

    def logits(self, row: int) -> np.ndarray:
        return -((np.arange(VOCAB) - next_token(self._last[row])) % VOCAB).astype(np.float32)

    def top(self, row: int) -> list[tuple[int, float]]:
        logits = self.logits(row).astype(np.float64)
        scores = logits - np.log(np.exp(logits).sum())
        if self._allowed is not None:
            scores[[t for t in range(VOCAB) if t not in self._allowed]] = -np.inf
        return [(int(t), float(scores[t])) for t in np.argsort(-scores, kind="stable")[:16]]


class Plan:
    """A ``StepPlan`` that takes every wish and checks its form."""

    def bias(self, ids: Seq[int], values: Seq[float]) -> None:
        assert len(ids) == len(values) and all(0 <= t < VOCAB for t in ids)

    def mask(self, row: int, bits: np.ndarray) -> None:
        assert row >= 0
        check_mask(bits)

    def want_logits(self, row: int) -> None:
        assert row >= 0


def check_mask(bits: np.ndarray) -> None:
    assert bits.dtype == np.uint32, f"a mask is uint32, not {bits.dtype}"
    assert bits.shape == (-(-VOCAB // 32),), f"a mask has {-(-VOCAB // 32)} words, not {bits.shape}"


class TableEngine:
    """Runs a selector, and a proposer if given, over the table until everything has ended.

    ``allowed``: the tokens that a constraint lets through; None: all.
    """

    def __init__(
        self, decoder: Any, proposer: Any = None, allowed: frozenset[int] | None = None
    ) -> None:
        self.decoder, self.proposer, self.allowed = decoder, proposer, allowed
        self.live: list[Sequence] = []
        self.done: list[Sequence] = []
        self.proposed = self.accepted = 0
        self._ids = 0

    def add(self, prompt: list[int], **params: Any) -> Request:
        request = Request(str(self._ids), prompt, SamplingParams(**params))
        seq = self._new(request, list(prompt))
        self.decoder.open(seq)
        assert isinstance(self.decoder.sampling(seq), dict)
        return request

    def _new(self, request: Request, tokens: list[int]) -> Sequence:
        self._ids += 1
        seq = Sequence(self._ids, request, tokens, len(request.sequences))
        seq.status = Status.RUNNING
        request.sequences.append(seq)
        self.live.append(seq)
        if self.proposer is not None:
            self.proposer.open(seq)
        return seq

    # -- Actions -----------------------------------------------------------------------------
    def append(
        self,
        seq: Sequence,
        token_ids: Seq[int],
        tops: Seq[Seq[tuple[int, float]]] | None = None,
    ) -> None:
        assert seq in self.live, f"append to {seq}, which is not live"
        assert tops is None or len(tops) == len(token_ids), "tops are one for each token"
        params = seq.request.params
        for token in token_ids:
            assert 0 <= int(token) < VOCAB, f"token {token} is not in the vocabulary"
            seq.token_ids.append(int(token))
            if token == EOS and not params.ignore_eos:
                return self.end(seq, "stop")
            if seq.num_output_tokens == params.max_tokens:
                return self.end(seq, "length")
        return None

    def fork(self, seq: Sequence) -> Sequence:
        child = self._new(seq.request, list(seq.token_ids))
        child.num_computed = seq.num_computed
        self.decoder.fork(seq, child)
        return child

    def end(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        assert reason in ("stop", "length", "dropped"), f"unknown reason {reason!r}"
        if seq in self.done and reason == "dropped":
            seq.finish_reason = reason
            return
        seq.status, seq.finish_reason, seq.stop_reason = Status.FINISHED, reason, stop_reason
        self.live.remove(seq)
        self.done.append(seq)
        if self.proposer is not None:
            self.proposer.close(seq)
        self.decoder.close(seq)

    def rank(self, seqs: Seq[Sequence], logprobs: Seq[float]) -> None:
        left = [s for s in seqs[0].request.sequences if s.finish_reason != "dropped"]
        assert {s.id for s in seqs} == {s.id for s in left}, "rank() left somebody out"
        assert len(seqs) == len(left) == len(logprobs)

    # -- running -----------------------------------------------------------------------------
    def step(self) -> None:
        asked = [(seq, room) for seq in self.live if (room := self._room(seq)) > 0]
        if asked:
            self.proposer.prepare([seq for seq, _ in asked], [room for _, room in asked])
        for seq in list(self.live):
            if seq not in self.live:
                continue
            drafts = self._drafts(seq)
            if self.decoder.plans_steps:
                self.decoder.plan(seq, Plan())
            last = [seq.token_ids[-1], *drafts]
            drawn = [self._drawn(token) for token in last]
            taken = 0
            while taken < len(drafts) and drafts[taken] == drawn[taken]:
                taken += 1
            seq.num_computed = len(seq.token_ids) + taken
            knows = self.decoder.sampling(seq).get("top_of_processed")
            result = Result(
                drawn[: taken + 1], last[: taken + 1], self.allowed if knows else None
            )
            self.decoder.advance(seq, result, self)
            if drafts and seq in self.live:
                self.proposer.verified(seq, len(drafts), taken)
            self.proposed += len(drafts)
            self.accepted += taken

    def _drawn(self, last: int) -> int:
        """The likeliest of the allowed tokens: the table's own, or the next one above it."""
        first = next_token(last)
        following = ((first + i) % VOCAB for i in range(VOCAB))
        return next(t for t in following if self.allowed is None or t in self.allowed)

    def _room(self, seq: Sequence) -> int:
        """For drafts of the sequence."""
        if self.proposer is None or seq.num_output_tokens == 0:
            return 0
        return min(8, (seq.request.params.max_tokens or 8) - seq.num_output_tokens - 1)

    def _drafts(self, seq: Sequence) -> list[int]:
        room = self._room(seq)
        before = list(seq.token_ids)
        drafts = self.proposer.propose(seq, room) if room > 0 else []
        assert len(drafts) <= max(room, 0), f"{len(drafts)} tokens were proposed, {room} allowed"
        assert all(0 <= int(t) < VOCAB for t in drafts), "a proposed token is not in the vocabulary"
        assert seq.token_ids == before, "propose() changed the sequence"
        return [int(t) for t in drafts]

    def run(self, max_steps: int = 500) -> None:
        for _ in range(max_steps):
            if not self.live:
                return
            self.step()
        raise AssertionError(f"{len(self.live)} sequences have not ended after {max_steps} steps")


class _Appends:
    """Plain decoding, to run proposers under."""

    plans_steps = False

    def open(self, seq: Sequence) -> None: ...
    def close(self, seq: Sequence) -> None: ...
    def sampling(self, seq: Sequence) -> dict[str, Any]:
        return {}

    def advance(self, seq: Sequence, result: Any, actions: Any) -> None:
        actions.append(seq, result.tokens)


def context() -> DecoderContext:
    return DecoderContext(VOCAB, 256, (EOS,))


def table_line(token: int, length: int) -> list[int]:
    line = []
    for _ in range(length):
        token = next_token(token)
        line.append(token)
    return line


class DecoderConformance(Conformance):
    """``strategy``: the selector's class.  ``params``: sampling parameters of its requests."""

    contract = "decoder"
    role = "selector"
    params: dict[str, Any] = {}

    def engine(self) -> TableEngine:
        return TableEngine(self.strategy(context()))

    def _params(self, **more: Any) -> dict[str, Any]:
        return {"max_tokens": 12, "ignore_eos": True} | self.params | more

    def test_requests_end(self) -> None:
        engine = self.engine()
        requests = [engine.add([i + 1, i + 2], **self._params()) for i in range(5)]
        engine.run()
        for request in requests:
            kept = [s for s in request.sequences if s.finish_reason != "dropped"]
            assert len(kept) == request.params.n, f"{len(kept)} completions, n={request.params.n}"
            assert all(1 <= s.num_output_tokens <= 12 for s in kept)

    def test_one_token(self) -> None:
        engine = self.engine()
        request = engine.add([4], **self._params(max_tokens=1))
        engine.run()
        kept = [s for s in request.sequences if s.finish_reason != "dropped"]
        assert all(s.num_output_tokens == 1 for s in kept)

    def test_end_token(self) -> None:
        """Token 21 leads to the end token: ``(7 * 21 + 3) % 50 == 0``."""
        engine = self.engine()
        request = engine.add([21], **self._params(ignore_eos=False))
        engine.run()
        assert any(s.finish_reason == "stop" for s in request.sequences)

    def test_constraints(self) -> None:
        """What a constraint forbids does not come out, or the decoder says that it takes none."""
        if not self.strategy.takes_constraints:
            return
        for allowed in (frozenset(range(0, VOCAB, 2)), frozenset({7, 9, 30})):
            engine = TableEngine(self.strategy(context()), allowed=allowed)
            request = engine.add([4], **self._params())
            engine.run()
            kept = [s for s in request.sequences if s.finish_reason != "dropped"]
            assert kept, "nothing came out"
            for seq in kept:
                assert set(seq.output_token_ids) <= allowed, "a forbidden token was taken"

    def test_requests_do_not_mix(self) -> None:
        def outputs(prompts: list[int]) -> dict[int, list[list[int]]]:
            engine = self.engine()
            requests = {p: engine.add([p], **self._params()) for p in prompts}
            engine.run()
            return {
                p: sorted(s.output_token_ids for s in r.sequences if s.finish_reason != "dropped")
                for p, r in requests.items()
            }

        together = outputs([3, 8, 15])
        for prompt in (3, 8, 15):
            assert together[prompt] == outputs([prompt])[prompt], "a request feels its neighbours"

    def test_closed_in_any_state(self) -> None:
        """The engine may drop a sequence (abort) after any step."""
        for steps in range(4):
            engine = self.engine()
            engine.add([5], **self._params())
            for _ in range(steps):
                engine.step()
            for seq in list(engine.live):
                engine.decoder.close(seq)
            engine.live.clear()
            engine.add([5], **self._params())
            engine.run()


class ProposerConformance(Conformance):
    """``strategy``: the proposer's class."""

    contract = "decoder"
    role = "proposer"

    def context(self) -> DecoderContext:
        """Override to give options, or a draft model."""
        return context()

    def engine(self) -> TableEngine:
        return TableEngine(_Appends(), self.strategy(self.context()))

    def test_output_is_as_without(self) -> None:
        for prompt in ([3], [9, 9, 9, 9], table_line(4, 30), table_line(4, 12) * 3):
            engine = self.engine()
            request = engine.add(prompt, max_tokens=40, ignore_eos=True)
            engine.run()
            want = table_line(prompt[-1], 40)
            assert request.sequences[0].output_token_ids == want, "proposals changed the output"

    def test_respects_max_tokens(self) -> None:
        engine = self.engine()
        seq = engine.add(table_line(4, 60), max_tokens=64, ignore_eos=True).sequences[0]
        for room in (1, 2, 5, 100):
            assert len(engine.proposer.propose(seq, room)) <= room
        engine.run()

    def test_many_sequences(self) -> None:
        engine = self.engine()
        requests = [engine.add(table_line(i, 20), max_tokens=20, ignore_eos=True) for i in range(9)]
        engine.run()
        for i, request in enumerate(requests):
            want = table_line(table_line(i, 20)[-1], 20)
            assert request.sequences[0].output_token_ids == want

    def test_closed_in_any_state(self) -> None:
        for steps in range(4):
            engine = self.engine()
            engine.add(table_line(4, 20), max_tokens=30, ignore_eos=True)
            for _ in range(steps):
                engine.step()
            for seq in list(engine.live):
                engine.proposer.close(seq)
            engine.live.clear()
            engine.add([5], max_tokens=5, ignore_eos=True)
            engine.run()


class ConstraintConformance(Conformance):
    """``strategy``: the constraint's class; ``params``: sampling parameters that it applies to."""

    contract = "decoder"
    role = "constraint"
    params: dict[str, Any] = {}

    def opened(self) -> tuple[Any, Any]:
        constraint = self.strategy(self.context())
        params = SamplingParams(**self.params)
        request = Request("0", [1, 2, 3], params)
        return constraint, constraint.open(Sequence(0, request, [1, 2, 3]))

    def context(self) -> DecoderContext:
        """Override to give a tokenizer."""
        return context()

    def allowed(self, constraint: Any, state: Any) -> list[int]:
        bits = constraint.mask(state)
        if bits is None:
            return list(range(VOCAB))
        check_mask(bits)
        return [t for t in range(VOCAB) if int(bits[t // 32]) >> (t % 32) & 1]

    def test_applies(self) -> None:
        assert self.strategy.applies(SamplingParams(**self.params))
        assert not self.strategy.applies(SamplingParams()) or not self.params

    def test_rollback(self) -> None:
        constraint, state = self.opened()
        seen = []
        for _ in range(8):
            allowed = self.allowed(constraint, state)
            if not allowed:
                break
            seen.append(allowed)
            constraint.accept(state, allowed[-1])
        for count in range(len(seen), 0, -1):
            constraint.rollback(state, 1)
            assert self.allowed(constraint, state) == seen[count - 1], "rollback(1) went elsewhere"
        for allowed in seen:
            constraint.accept(state, allowed[-1])
        constraint.rollback(state, len(seen))
        assert not seen or self.allowed(constraint, state) == seen[0]

    def test_prepare(self) -> None:
        constraint, state = self.opened()
        states = [state]
        for _ in range(4):  # each a token further
            allowed = self.allowed(constraint, states[-1])
            if not allowed:
                break
            states.append(constraint.fork(states[-1]))
            constraint.accept(states[-1], allowed[0])
        want = [self.allowed(constraint, at) for at in states]
        for together in (states, states[:1], states[::-1], states[1:]):
            constraint.prepare(together)
            got = [self.allowed(constraint, at) for at in states]
            assert got == want, "prepare() changed a mask"

    def test_fork(self) -> None:
        constraint, state = self.opened()
        before = self.allowed(constraint, state)
        assert before, "no token is allowed at the start"
        copy = constraint.fork(state)
        constraint.accept(copy, before[0])
        assert self.allowed(constraint, state) == before, "a fork moved its parent"
