"""Text to measure on, cut into windows of tokens."""

from __future__ import annotations

import hashlib
import pydoc_data.topics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyllmlite.core.errors import ConfigError

DEFAULT_TEXT = "pydoc_data.topics"


@dataclass(frozen=True)
class Text:
    """Prose, and what it can be known by: a name and the SHA-256 of its UTF-8."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


def read_text(path: str | Path | None) -> Text:
    """A file of UTF-8 text; None: the topics of Python's own help, which are on every machine.

    Raises:
        ConfigError: It cannot be read, is empty or of another encoding.
    """
    if path is None:
        topics = pydoc_data.topics.topics
        return Text(DEFAULT_TEXT, "\n".join(topics[name] for name in sorted(topics)))
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: is not UTF-8 (byte {data[error.start]:#04x} at {error.start}); convert it, "
            "for instance with iconv -t UTF-8"
        ) from None
    if not content.strip():
        raise ConfigError(f"{path}: is empty")
    return Text(str(path), content)


def windows_of(text: Text, tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """``count`` windows of ``length`` tokens, evenly spaced over the text, without overlap.

    Each begins with BOS where the model wants one.

    Raises:
        ConfigError: The text is too short.
    """
    if count < 1 or length < 2:
        raise ConfigError(f"there must be 1 window of 2 tokens at least, got {count} of {length}")
    marked = tokenizer.encode("", add_special_tokens=True)
    start = marked[:1] if marked and marked[0] == tokenizer.bos_token_id else []
    body = length - len(start)
    tokens = tokenizer.encode(text.content, add_special_tokens=False)
    if len(tokens) < count * body:
        raise ConfigError(
            f"{text.name}: {len(tokens)} tokens are too few for {count} windows of {length}; give "
            "a longer text, or fewer or shorter windows"
        )
    step = len(tokens) // count
    return [[*start, *tokens[i * step : i * step + body]] for i in range(count)]
