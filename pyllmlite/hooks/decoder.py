"""Decoder, Proposer, Constraint: the three parts of decoding, chosen per request."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pyllmlite.hooks.strategy import Strategy

if TYPE_CHECKING:
    import numpy as np

    from pyllmlite.core.request import Sequence


class DraftModel(Protocol):
    """Another model with the same vocabulary.

    Attributes:
        weight_bytes: Of its weights.
    """

    weight_bytes: int

    def greedy(self, wanted: Seq[tuple[int, Seq[int], int]]) -> list[list[int]]:
        """The most probable tokens, one after the other.

        Args:
            wanted: For each sequence a key, its tokens, and how many shall follow.  Under a key
                the tokens only grow; what was computed of them is kept.
        Returns:
            For each as many tokens as were asked for, or fewer: where its cache or its context
            ends, and where another sequence has the same prefix and is ahead.
        """

    def forget(self, key: int) -> None:
        """The sequence will not come again."""


@dataclass(frozen=True)
class DecoderContext:
    """What the engine hands to a decoder, so that plugins import nothing upward.

    ``open_model(model, options)`` loads a second model: a path, alias or hub id, and options as
    ``LLM`` takes them, besides ``num_layers`` (only the first so many).  ``PyllmliteError``, also
    if its vocabulary is another one.  None: there is no such thing here.
    """

    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    tokenizer: Any = None
    max_logprobs: int = 20  # most that ``sampling`` may ask for as ``num_logprobs``
    extra: Mapping[str, Any] = field(default_factory=dict)  # options of strategies, by name
    weight_bytes: int = 0  # of the model
    open_model: Callable[[str, Mapping[str, Any]], DraftModel] | None = None


class StepPlan(Protocol):
    """Per-step wishes for one sequence; rows are its logit rows, 0 the first of this step."""

    def bias(self, ids: Seq[int], values: Seq[float]) -> None:
        """Added to the logits of all its rows in this step; ``-inf`` forbids a token."""

    def mask(self, row: int, bits: np.ndarray) -> None:
        """uint32 (or int32) ``[ceil(vocab / 32)]``: bit set, token allowed.  Copied; several
        masks for a row are joined.  ``ValueError`` for another shape or dtype, or a row that is
        not the sequence's."""

    def want_logits(self, row: int) -> None:
        """See the row's raw logits after the run: one copy of ``vocab_size`` floats."""


class StepResult(Protocol):
    """What came out for one sequence: ``tokens[i]`` was chosen natively after its i-th row."""

    tokens: Seq[int]
    num_rows: int

    def top(self, row: int) -> list[tuple[int, float]]:
        """``(id, logprob)``, best first; as many as the sequence's sampling asked for
        (``num_logprobs``).  Of the raw distribution: masks, biases and temperature are not in it.
        With ``top_of_processed`` in its sampling they are the best of those that masks, biases and
        penalties leave, and what these add to a logit counts; the normalizer stays that of the raw
        distribution, as with transformers' processors in a beam search.  A token that is not
        allowed has ``-inf``."""

    def logits(self, row: int) -> np.ndarray:
        """Raw float32 logits, if wanted; valid during the call."""


class Actions(Protocol):
    """What a decoder may do with a sequence after a step, also with another sequence of the
    same request (beams): first ``end`` what is dropped, which makes room, then ``fork``, which
    takes tokens as they are, then ``append``."""

    def append(
        self,
        seq: Sequence,
        token_ids: Seq[int],
        tops: Seq[Seq[tuple[int, float]]] | None = None,
    ) -> None:
        """Add tokens to its output.  The engine applies stop rules and max_tokens in order and
        drops what stands behind an end.  ``ValueError`` for an id that is not in the vocabulary.
        Tokens behind those that were drawn have no log-probability (NaN), unless ``tops`` says for
        each what :meth:`StepResult.top` said in the step, this one or an earlier, that it was
        chosen in."""

    def fork(self, seq: Sequence) -> Sequence:
        """A second sequence of the same request with the same tokens and cache.  With no row
        free the child waits, as if preempted: it costs time, not correctness.  ``ValueError`` if
        it has ended."""

    def end(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End it (``stop``, ``length``), or drop it from the request (``dropped``, also after
        it has ended).  ``ValueError``: the last one of a request cannot be dropped."""

    def rank(self, seqs: Seq[Sequence], logprobs: Seq[float]) -> None:
        """For a decoder that compares a request's completions: their order in its output, the
        best first, and the log-probability of each (``cumulative_logprob``).  ``ValueError`` if
        these are not all that the request has left."""


class Decoder(Strategy):
    """The selector: turns what was sampled into what the sequence becomes.

    Attributes:
        needs_sync: Results of step N must be seen before step N+1 is planned.
        plans_steps: :meth:`plan` is called every step (costs Python a row).
        takes_drafts: It works with a proposer; if not, a request with both is refused.
        takes_constraints: It works with constraints; if not, a request with both is refused.
        owns_completions: It makes the ``n`` completions itself, by ``fork``; if not, the engine
            starts them when the prompt is in the cache.
    """

    contract = "decoder"
    role = "selector"
    needs_sync: bool = False
    plans_steps: bool = False
    takes_drafts: bool = True
    takes_constraints: bool = True
    owns_completions: bool = False

    def __init__(self, context: DecoderContext) -> None:
        self.context = context

    def open(self, seq: Sequence) -> None:
        """A sequence starts; ``seq.state`` is yours.  ``RequestError`` refuses the request."""

    def sampling(self, seq: Sequence) -> dict[str, Any]:
        """Changes to the native sampling parameters of its row (names as in
        ``Batch.set_sampling``), over those that follow from its ``SamplingParams``."""
        return {}

    def plan(self, seq: Sequence, plan: StepPlan) -> None:
        """Before a step in which a token of ``seq`` is chosen."""

    def advance(self, seq: Sequence, result: StepResult, actions: Actions) -> None:
        """After it.  As it stands here it is plain decoding, which the engine does by itself where
        nobody overrides it: with drafts it has already cut ``tokens`` behind the last accepted
        one."""
        actions.append(seq, result.tokens)

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Copy ``parent.state`` to the child."""

    def close(self, seq: Sequence) -> None:
        """The sequence is gone."""


class Proposer(Strategy):
    """Proposes tokens that the next step verifies together with the known ones.

    Verification leaves the output as it would have been: the sampler draws for every draft
    position with the random number it would use there anyway, and drafts are accepted while
    they equal what was drawn (for a proposal without probabilities this is the rejection
    sampling of Leviathan et al. 2023, with tokens equal to plain decoding's).
    """

    contract = "decoder"
    role = "proposer"

    def __init__(self, context: DecoderContext) -> None:
        self.context = context

    def open(self, seq: Sequence) -> None:
        """A sequence starts."""

    def prepare(self, seqs: Seq[Sequence], max_tokens: Seq[int]) -> None:
        """Once before a step: all sequences that :meth:`propose` will be asked for, and the most
        tokens for each.  For a proposer that works on many at a time."""

    @abstractmethod
    def propose(self, seq: Sequence, max_tokens: int) -> Seq[int]:
        """At most ``max_tokens`` tokens that may follow ``seq.token_ids``; empty: none."""

    def verified(self, seq: Sequence, num_proposed: int, num_accepted: int) -> None:
        """How the last proposal fared."""

    def close(self, seq: Sequence) -> None:
        """The sequence is gone."""


class Constraint(Strategy):
    """Says which tokens may come next (a grammar, a schema)."""

    contract = "decoder"
    role = "constraint"

    def __init__(self, context: DecoderContext) -> None:
        self.context = context

    @classmethod
    def applies(cls, params: Any) -> bool:
        """Does a request with these ``SamplingParams`` ask for this constraint?"""
        return False

    def compile(self, params: Any) -> None:  # noqa: B027
        """What takes long for these ``SamplingParams`` (a grammar), before :meth:`open`, and kept
        for it.  A server calls this, from other threads and for several requests at once, while
        the engine steps; elsewhere :meth:`open` has to do without.  ``RequestError`` as there."""

    @abstractmethod
    def open(self, seq: Sequence) -> Any:
        """A state for the sequence; ``RequestError`` if the grammar does not compile."""

    def prepare(self, states: Seq[Any]) -> None:
        """Once before a step: all states whose :meth:`mask` will be asked for, as they stand
        before any draft.  For a constraint that works on many at a time."""

    @abstractmethod
    def mask(self, state: Any) -> np.ndarray | None:
        """uint32 bitmask of the tokens allowed next; None: all.  Copied."""

    @abstractmethod
    def accept(self, state: Any, token_id: int) -> None:
        """A token was appended."""

    @abstractmethod
    def rollback(self, state: Any, num_tokens: int) -> None:
        """Undo the last ``num_tokens`` accepts."""

    @abstractmethod
    def fork(self, state: Any) -> Any:
        """An independent copy."""
