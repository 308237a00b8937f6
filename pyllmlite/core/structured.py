"""What the text of an answer must look like, as a request says it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pyllmlite.core.errors import RequestError

_KINDS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass
class StructuredOutputsParams:
    """Words are vLLM's.  One of the first five is given.

    Attributes:
        json: A JSON schema, as a dict or as text.
        regex: A regular expression for the whole answer.
        choice: The answer is one of these strings.
        grammar: A context-free grammar, in the syntax of Lark or of GBNF (llama.cpp).
        json_object: True: any JSON object.
        disable_any_whitespace: JSON without line breaks and spaces between its parts.
        disable_additional_properties: Objects of the schema have no properties but those named,
            unless it says otherwise.
        whitespace_pattern: A regular expression for what may stand between the parts of JSON.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise RequestError(
                f"structured_outputs takes one of {', '.join(_KINDS)}, got "
                + (" and ".join(given) or "none")
            )
        self.kind = given[0]
        if self.json is not None:
            self.json = _schema(self.json)
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise RequestError(f"structured_outputs: {name} must be a text, got {value!r}")
        if self.choice is not None and (
            isinstance(self.choice, str)
            or not self.choice
            or not all(isinstance(c, str) and c for c in self.choice)
        ):
            raise RequestError(
                f"structured_outputs: choice must be a list of texts, got {self.choice!r}"
            )


def _schema(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RequestError(f"structured_outputs: the schema is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise RequestError(f"structured_outputs: a JSON schema is an object, got {value!r}")
    return value
