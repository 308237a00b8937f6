"""Bytes of server-sent events, and what both kinds of completion say in the same words."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

DONE = b"data: [DONE]\n\n"
# JSON has no infinity; OpenAI's clients know this number for it.
_MINUS_INFINITY = -9999.0

_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False, allow_nan=False).encode


def event(value: Any) -> bytes:
    """``data: JSON``; ASCII, so a character that has no UTF-8 form cannot hurt."""
    return b"data: " + _encode(value).encode("ascii") + b"\n\n"


class ChunkTemplate:
    """Chunks of which only a text and the index change: most of a stream.

    Args:
        chunk: A whole chunk with ``TEXT`` and ``INDEX`` where they go.
    """

    TEXT = "\x00text\x00"
    INDEX = "\x00index\x00"

    def __init__(self, chunk: dict[str, Any]) -> None:
        encoded = "data: " + _encode(chunk) + "\n\n"
        before, rest = encoded.split(_encode(self.INDEX), 1)
        between, after = rest.split(_encode(self.TEXT), 1)
        self._parts = before.encode(), between.encode(), after.encode()

    def fill(self, index: int, text: str) -> bytes:
        before, between, after = self._parts
        return b"%b%d%b%b%b" % (before, index, between, _encode(text).encode(), after)


def finite(logprob: float) -> float:
    """A number that JSON has: not NaN, not below -9999."""
    return _MINUS_INFINITY if math.isnan(logprob) else max(logprob, _MINUS_INFINITY)


class Usage:
    """Counts tokens of one HTTP request."""

    def __init__(self, prompts: Iterable[list[int]]) -> None:
        self.prompt = sum(map(len, prompts))
        self.completion = 0
        self.cached = 0

    def add(self, deltas: list[list[Any]], end: dict[str, Any] | None) -> None:
        for delta in deltas:
            self.completion += delta[2]
        if end is not None:
            self.cached += end["cached"]

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }
