"""``guidance``: answers that follow a JSON schema, a regular expression, a grammar or a choice."""

from __future__ import annotations

import json
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

import numpy as np

from pyllmlite.core.errors import RequestError
from pyllmlite.hooks.decoder import Constraint, DecoderContext

if TYPE_CHECKING:
    from pyllmlite.core.request import Sequence
    from pyllmlite.core.structured import StructuredOutputsParams

# Between the parts of JSON: a line break and an indentation.  Bounded, since a model may go on
# with spaces for ever.
WHITESPACE = r"\n?[ ]{0,24}"
# Tokens of a class whose mask is known as a whole where all of it is allowed: llguidance's own
# classes (white space, characters of a JSON string up to a length), and more lengths, for strings
# near the end of their maxLength, where it would walk through the vocabulary.  A third less per
# mask on schemas that bound their strings.
_CHARACTER = r'[^"\\\x00-\x1F\x7F]'
SLICES = [
    r"[\x20\x0A\x0D\x09]+",
    *(f"{_CHARACTER}{{1,{length}}}" for length in (3, 6, 10, 16, 30)),
    f"{_CHARACTER}+",
]
MAX_GRAMMARS = 64  # kept compiled
MAX_GRAMMAR = 1 << 17  # characters; compiling takes a second or so from there on
COMPILER_STACK = 512 << 20  # bytes of address space
_STACK_SIZE = threading.Lock()  # the size for new threads is the process's


class _State:
    """Attributes:
    behind: End tokens that were accepted after the matcher had stopped.
    bits: The mask of the state, if it is known.
    """

    __slots__ = ("behind", "bits", "matcher")

    def __init__(self, matcher: Any, behind: int = 0) -> None:
        self.matcher = matcher
        self.bits: np.ndarray | None = None
        self.behind = behind


class Guidance(Constraint):
    """``SamplingParams(structured_outputs=...)`` by llguidance: token masks from an Earley parser
    over a lexer of derivatives, computed on the CPU in some tens of microseconds.

    The end token is allowed where the text is complete, and alone where nothing can follow.
    """

    name = "guidance"

    def __init__(self, context: DecoderContext) -> None:
        super().__init__(context)
        self._num_words = (context.vocab_size + 31) // 32
        self._bits = np.zeros((1, self._num_words), np.uint32)  # the masks of a step
        self._prepared: list[_State] = []
        self._executor: Any = None
        self._tokenizer: Any = None
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()  # of the last two: compile() comes from other threads

    @classmethod
    def applies(cls, params: Any) -> bool:
        return params.structured_outputs is not None

    def compile(self, params: Any) -> None:
        self._matcher(params.structured_outputs)

    def open(self, seq: Sequence) -> _State:
        params = seq.request.params
        if params.ignore_eos:
            raise RequestError("structured_outputs ends with the end token: no ignore_eos")
        if params.min_tokens:
            raise RequestError("structured_outputs says itself when it may end: no min_tokens")
        return _State(self._matcher(params.structured_outputs))

    def prepare(self, states: Seq[_State]) -> None:
        """The masks of many sequences, on all cores."""
        for state in self._prepared:  # those that nobody asked for
            state.bits = None
        self._prepared = list(states) if len(states) > 1 else []
        if not self._prepared:
            return
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor(len(os.sched_getaffinity(0)))
        if len(self._bits) < len(states):
            self._bits = np.zeros((len(states), self._num_words), np.uint32)
        bits = self._bits
        matchers = [(state.matcher, row) for row, state in enumerate(states)]
        self._executor.unsafe_compute_mask_ptr(
            matchers, bits.ctypes.data, 4 * self._num_words, len(bits)
        )
        for state, row in zip(states, bits, strict=False):
            state.bits = row

    def mask(self, state: _State) -> np.ndarray:
        bits = state.bits
        if bits is None:
            bits = np.zeros(self._num_words, np.uint32)
            state.matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if state.matcher.is_error():
            raise RuntimeError(_line(state.matcher))
        return bits

    def accept(self, state: _State, token_id: int) -> None:
        state.bits = None
        matcher = state.matcher
        if matcher.is_stopped() and token_id in self._tokenizer.eos_tokens:
            state.behind += 1
        elif not matcher.consume_token(token_id):
            raise RuntimeError(_line(matcher))

    def rollback(self, state: _State, num_tokens: int) -> None:
        state.bits = None
        behind = min(state.behind, num_tokens)
        state.behind -= behind
        if num_tokens > behind and not state.matcher.rollback(num_tokens - behind):
            raise RuntimeError(_line(state.matcher))

    def fork(self, state: _State) -> _State:
        return _State(state.matcher.deep_copy(), state.behind)

    # -- compiling -------------------------------------------------------------------------------
    def _matcher(self, asked: StructuredOutputsParams) -> Any:
        """A fresh matcher; one that has been compiled before is copied."""
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise RequestError(
                "structured_outputs needs llguidance: pip install 'pyllmlite[structured]' "
                f"({error})"
            ) from None
        try:
            grammar = _grammar(asked, LLMatcher)
        except ValueError as error:
            raise RequestError(f"structured_outputs: {' '.join(str(error).split())}") from None
        if len(grammar) > MAX_GRAMMAR:
            raise RequestError(
                f"structured_outputs: {asked.kind}: {len(grammar)} characters of grammar, "
                f"at most {MAX_GRAMMAR}"
            )
        made = self._compiled.get(grammar)
        if made is None:
            made = _compiled(self._made_tokenizer(), grammar)
            if made.is_error():
                raise RequestError(f"structured_outputs: {asked.kind}: {_line(made)}")
        with self._lock:
            self._compiled[grammar] = made
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > MAX_GRAMMARS:
                self._compiled.popitem(last=False)
        return made.deep_copy()

    def _made_tokenizer(self) -> Any:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._make_tokenizer()
            return self._tokenizer

    def _make_tokenizer(self) -> Any:
        from llguidance import LLTokenizer

        context = self.context
        backend = getattr(context.tokenizer, "backend", None)
        if backend is None:
            raise RequestError("structured_outputs needs the model's tokenizer")
        if not context.eos_token_ids:
            raise RequestError("structured_outputs needs a model with an end token")
        return LLTokenizer(
            backend.to_str(),
            n_vocab=context.vocab_size,
            eos_token=list(context.eos_token_ids),
            slices=SLICES,
        )


def _compiled(tokenizer: Any, grammar: str) -> Any:
    """Compiled on a stack of its own: rules that lead to rules are followed by recursion, some
    kilobytes each, and what exceeds the stack ends the process."""
    from llguidance import LLMatcher

    made: list[Any] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            made.append(LLMatcher(tokenizer, grammar, log_level=0))
        except BaseException as error:
            failed.append(error)

    with _STACK_SIZE:
        usual = threading.stack_size(COMPILER_STACK)
        try:
            thread = threading.Thread(target=work, name="grammar")
            thread.start()
        finally:
            threading.stack_size(usual)
    thread.join()
    if failed:
        raise failed[0]
    return made[0]


def _grammar(asked: StructuredOutputsParams, matcher: Any) -> str:
    """In llguidance's own form."""
    if asked.kind == "regex":
        return matcher.grammar_from_regex(asked.regex)
    if asked.kind == "choice":
        quoted = (json.dumps(c, ensure_ascii=False) for c in asked.choice or ())
        words = " | ".join(text.replace("\x7f", "\\u007f") for text in quoted)
        return matcher.grammar_from_lark(f"start: {words}")
    if asked.kind == "grammar":
        from llguidance import grammar_from

        return grammar_from("grammar", asked.grammar or "")
    schema: Any = asked.json if asked.kind == "json" else {"type": "object"}
    if asked.disable_additional_properties:
        schema = _closed(schema)
    if asked.disable_any_whitespace:
        options = {"whitespace_flexible": False}
    else:
        options = {"whitespace_pattern": asked.whitespace_pattern or WHITESPACE}
    return matcher.grammar_from_json_schema(schema, overrides=options)


def _closed(schema: Any) -> Any:
    """``additionalProperties`` false where properties are named and it is not."""
    if isinstance(schema, list):
        return [_closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(part) for name, part in schema.items()}
    if isinstance(schema.get("properties"), dict):
        closed.setdefault("additionalProperties", False)
    return closed


def _line(matcher: Any) -> str:
    """The first line of its error, which goes on with the whole grammar."""
    lines = [line.strip() for line in matcher.get_error().splitlines() if line.strip()]
    return lines[0] if lines else "the grammar takes no such token"
