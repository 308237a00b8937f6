"""Tools: which the model is told of, and its calls found in what it writes.

The calls are found in the form that most templates with tools teach (Hermes; Qwen and others):
``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``; without the tags a text that is
nothing but such an object counts too (Llama 3, which says ``parameters``).
"""

from __future__ import annotations

import json
import secrets
from typing import Any

from pyllmlite.serve.errors import ApiError
from pyllmlite.serve.protocol import ChatRequest

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def wanted_tools(body: ChatRequest) -> list[dict[str, Any]] | None:
    """What the template is given; None: no tools."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise ApiError(400, "tool_choice needs tools", param="tool_choice")
        return None
    if choice == "none":
        return None
    return [tool.model_dump(exclude_none=True) for tool in body.tools]


def forced_call(body: ChatRequest) -> dict[str, Any] | None:
    """The JSON schema of the call that ``tool_choice`` forces; None: it forces none."""
    choice, tools = body.tool_choice, body.tools or []
    if choice in (None, "auto", "none"):
        return None
    if choice != "required":
        function = choice.get("function") if isinstance(choice, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        tools = [tool for tool in tools if tool.function.name == name]
        if not tools:
            raise ApiError(
                400,
                "tool_choice is auto, none, required or one of the tools by its name",
                param="tool_choice",
            )
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def _call(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", found.get("parameters"))
    if not isinstance(arguments, (dict, str)):
        return None
    if isinstance(arguments, dict):
        # In ASCII: a lone surrogate could not be sent otherwise.
        arguments = json.dumps(arguments)
    return {
        "id": "call_" + secrets.token_hex(12),
        "type": "function",
        "function": {"name": found["name"], "arguments": arguments},
    }


class ToolParser:
    """Takes a text apart as it grows: what is to be shown, and what are calls.

    Text that may turn out to be a call is held back until that is certain.
    """

    def __init__(self) -> None:
        self._held = ""
        self._begun = False  # something that is no call has been shown
        self.calls = 0

    def feed(self, text: str, last: bool) -> tuple[str, list[dict[str, Any]]]:
        """New text to the part that can be shown, and the calls that are complete."""
        self._held += text
        shown, calls = "", []
        while self._held:
            if not self._begun and not self.calls and self._held.lstrip()[:1] in ("{", ""):
                # Perhaps an object without tags: only the end tells.
                if not last:
                    break
                call = _call(self._held)
                if call is not None:
                    calls.append(call)
                    self._held = ""
                    break
            at = self._held.find(OPEN)
            if at < 0:
                keep = 0 if last else _overlap(self._held, OPEN)
                shown += self._held[: len(self._held) - keep]
                self._held = self._held[len(self._held) - keep :]
                break
            end = self._held.find(CLOSE, at)
            shown += self._held[:at]
            self._held = self._held[at:]
            if end < 0 and not last:
                break
            end = len(self._held) if end < 0 else end - at
            call = _call(self._held[len(OPEN) : end])
            if call is None:  # damaged: shown as it is, so that nothing is lost
                shown += self._held[: end + len(CLOSE)]
            else:
                calls.append(call)
            self._held = self._held[end + len(CLOSE) :]
        self.calls += len(calls)
        if self.calls and not shown.strip():
            shown = ""  # the line breaks between calls
        self._begun = self._begun or bool(shown.strip())
        return shown, calls


def _overlap(text: str, tag: str) -> int:
    """Characters at the end of ``text`` that ``tag`` begins with."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
