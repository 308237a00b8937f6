"""Chat templates: the checkpoint's Jinja template, rendered in a sandbox as transformers does.

A template comes with a model from wherever the model came from, so it is run as untrusted code:
in jinja2's immutable sandbox, over plain data only.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from pyllmlite.core.errors import ModelError, RequestError

if TYPE_CHECKING:
    from jinja2 import Template

# Under these names messages carry a model's reasoning; templates read the first.
_REASONING = ("reasoning_content", "thinking", "reasoning")


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> Template:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """``{% generation %}`` marks what the model wrote, for training; here it is just text."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        # Jinja's own filter escapes HTML, which a prompt must not have.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as error:
        raise ModelError(f"the chat template is not valid Jinja: {_line(error)}") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def plain(value: Any) -> Any:
    """Rebuilt from JSON's types, so that a template meets no object with methods of its own."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):  # pydantic
        return plain(value.model_dump())
    return f"<{type(value).__name__}>"


def _message(message: Any) -> dict[str, Any]:
    message = plain(message)
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestError("a chat message is a mapping with 'role' and 'content'")
    reasoning = next((message[k] for k in _REASONING if message.get(k) is not None), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


def render(
    source: str,
    messages: list[Any],
    *,
    add_generation_prompt: bool = True,
    tools: list[Any] | None = None,
    documents: list[Any] | None = None,
    **variables: Any,
) -> str:
    """The prompt's text.

    Args:
        source: The Jinja template.
        messages: Mappings with ``role`` and ``content``.
        add_generation_prompt: End with the beginning of the assistant's answer.
        tools: JSON schemas of functions the model may call.
        variables: Further names the template reads (``bos_token``, ``enable_thinking``, ...).
    Raises:
        RequestError: A message that is none, or one the template refuses; ModelError: a template
            that cannot be compiled.
    """
    import jinja2

    template = _compiled(source)
    if not isinstance(messages, (list, tuple)):
        raise RequestError("chat messages are a list of mappings with 'role' and 'content'")
    if tools is not None and not all(isinstance(tool, Mapping) for tool in tools):
        raise RequestError("tools are JSON schemas (mappings)")
    try:
        return template.render(
            messages=[_message(m) for m in messages],
            tools=plain(tools),
            documents=plain(documents),
            add_generation_prompt=add_generation_prompt,
            **plain(variables),
        )
    # A template is a program: it can divide by zero, call itself for ever, ask for all memory.
    except (
        jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError,
        RecursionError, MemoryError,
    ) as error:  # fmt: skip
        if isinstance(error, RequestError):
            raise
        raise RequestError(f"the chat template refuses these messages: {_line(error)}") from None
