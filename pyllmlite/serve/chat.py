"""``/v1/chat/completions``: bodies and streams in OpenAI's form."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from pyllmlite.serve.generation import Generation, check_end
from pyllmlite.serve.sse import DONE, ChunkTemplate, Usage, event, finite
from pyllmlite.serve.tools import ToolParser


def _token(entry: list[Any]) -> dict[str, Any]:
    text = entry[2] or ""
    return {
        "token": text,
        "logprob": finite(entry[1]),
        "bytes": list(text.encode("utf-8", "replace")),
    }


def _logprobs(entries: list[Any], num_top: int) -> dict[str, Any]:
    content = []
    for entry in entries:
        best = sorted(entry, key=lambda t: -finite(t[1]))[:num_top]
        content.append({**_token(entry[0]), "top_logprobs": [_token(other) for other in best]})
    return {"content": content, "refusal": None}


class ChatWriter:
    """Writes one request's answer.

    Args:
        head: ``id``, ``created`` and ``model``.
        tools: Look for calls in what the model writes.
    """

    def __init__(self, head: dict[str, Any], generation: Generation, tools: bool) -> None:
        self._head = head
        self._generation = generation
        self._num_top = generation.params.logprobs
        self._usage = Usage(generation.prompts)
        count = generation.params.n
        self._parsers = [ToolParser() if tools else None for _ in range(count)]

    def _parse(self, index: int, text: str, last: bool) -> tuple[str, list[dict[str, Any]]]:
        parser = self._parsers[index]
        return (text, []) if parser is None else parser.feed(text, last)

    def _reason(self, index: int, reason: str) -> str:
        parser = self._parsers[index]
        return "tool_calls" if parser is not None and parser.calls and reason == "stop" else reason

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        count = self._generation.params.n
        texts: list[list[str]] = [[] for _ in range(count)]
        entries: list[list[Any]] = [[] for _ in range(count)]
        ends: list[Any] = [(None, None)] * count
        async for _, deltas, end in self._generation.items():
            check_end(end)
            self._usage.add(deltas, end)
            for index, text, _, logprobs, reason, stop in deltas:
                texts[index].append(text)
                entries[index] += logprobs or ()
                if reason is not None:
                    ends[index] = reason, stop
        choices = []
        for index in range(count):
            text, calls = self._parse(index, "".join(texts[index]), last=True)
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            if calls:
                message["content"] = text or None
                message["tool_calls"] = calls
            logprobs = None
            if self._num_top is not None:
                logprobs = _logprobs(entries[index], self._num_top)
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": logprobs,
                    "finish_reason": self._reason(index, ends[index][0]),
                    "stop_reason": ends[index][1],
                }
            )
        return {
            **self._head,
            "object": "chat.completion",
            "choices": choices,
            "usage": self._usage.body(),
        }

    async def events(self, include_usage: bool) -> AsyncIterator[bytes]:
        """The stream, with a last chunk of usage if asked."""
        head = {**self._head, "object": "chat.completion.chunk"}
        if include_usage:
            head["usage"] = None
        template = ChunkTemplate(
            {
                **head,
                "choices": [
                    {"index": ChunkTemplate.INDEX, "delta": {"content": ChunkTemplate.TEXT},
                     "logprobs": None, "finish_reason": None}
                ],
            }
        )  # fmt: skip

        def chunk(index: int, delta: Any, logprobs: Any = None, reason: Any = None) -> bytes:
            choice = {
                "index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason,
            }  # fmt: skip
            return event({**head, "choices": [choice]})

        yield b"".join(
            chunk(index, {"role": "assistant", "content": ""})
            for index in range(self._generation.params.n)
        )
        async for _, deltas, end in self._generation.items():
            check_end(end)
            self._usage.add(deltas, end)
            data = b""
            for index, text, _, entries, reason, _ in deltas:
                before = self._calls(index)
                text, calls = self._parse(index, text, last=reason is not None)
                if entries:
                    logprobs = _logprobs(entries, self._num_top or 0)
                    data += chunk(index, {"content": text}, logprobs)
                elif text:
                    data += template.fill(index, text)
                for number, call in enumerate(calls, start=before):
                    data += chunk(index, {"tool_calls": [{"index": number, **call}]})
                if reason is not None:
                    data += chunk(index, {}, None, self._reason(index, reason))
            if data:
                yield data
        if include_usage:
            yield event({**head, "choices": [], "usage": self._usage.body()})
        yield DONE

    def _calls(self, index: int) -> int:
        parser = self._parsers[index]
        return 0 if parser is None else parser.calls
