"""Tokens to text, piece by piece.

A token's text depends on its neighbours: a character may need several byte tokens, and
SentencePiece writes a word's space only behind another word.  So a window is decoded twice,
with and without the new tokens, and the difference is what they add.  The window starts one
piece before the new tokens, which keeps the cost constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\ufffd"
# Tokens of the prompt that the first piece is decoded behind.
PROMPT_WINDOW = 5
# A character has at most 4 bytes.  Tokens that are still no text after twice as many never will
# be: they are given as they are, so that the window cannot grow for ever.
MAX_PENDING = 8
MAX_WINDOW = 64


class TextDecoder(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """The text of one sequence.

    Args:
        token_ids: Prompt and output, the list that the sequence grows.
        num_prompt_tokens: Text begins behind them.

    Attributes:
        text: Text of the tokens read so far, without an unfinished character.
        read: Tokens read so far.
    """

    __slots__ = ("_ids", "_pending", "_prefix", "_skip", "_tokenizer", "_window", "read", "text")

    def __init__(
        self,
        tokenizer: TextDecoder,
        token_ids: list[int],
        num_prompt_tokens: int,
        skip_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._ids = token_ids
        self._skip = skip_special_tokens
        self._window = max(num_prompt_tokens - PROMPT_WINDOW, 0)
        self._pending = num_prompt_tokens  # first token that is not in `text` yet
        self._prefix: str | None = None  # text of ids[window:pending]
        self.read = num_prompt_tokens
        self.text = ""

    def fork(self, token_ids: list[int]) -> Detokenizer:
        """A copy for a sequence with the same tokens."""
        other = object.__new__(Detokenizer)
        for name in Detokenizer.__slots__:
            setattr(other, name, getattr(self, name))
        other._ids = token_ids
        return other

    def advance(self, end: int) -> str:
        """Read tokens up to ``end``; returns the text that became certain."""
        before = len(self.text)
        while self.read < end:
            self.read += 1
            self._decode(self.read, last=False)
        return self.text[before:]

    def finish(self, end: int) -> str:
        """Read tokens up to ``end``, behind which none follows: an unfinished character is given
        as U+FFFD.  One call however many tokens were not read yet."""
        before = len(self.text)
        self.read = max(self.read, end)
        if self._pending < self.read:
            self._decode(self.read, last=True)
        return self.text[before:]

    def _decode(self, end: int, last: bool) -> None:
        ids = self._ids
        if self._prefix is None:
            self._prefix = self._text(ids[self._window : self._pending])
        text = self._text(ids[self._window : end])
        if text.endswith(REPLACEMENT) and not last and end - self._pending < MAX_PENDING:
            return
        if len(text) > len(self._prefix):
            self.text += text[len(self._prefix) :]
            self._window, self._pending, self._prefix = self._pending, end, None
        elif end - self._pending >= MAX_PENDING:
            # Special tokens only.  The window still begins with what had text, so that the next
            # word keeps its space, unless there are very many.
            if end - self._window > MAX_WINDOW:
                self._window = end - PROMPT_WINDOW
            self._pending, self._prefix = end, None

    def _text(self, token_ids: list[int]) -> str:
        if not token_ids:
            return ""
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)
