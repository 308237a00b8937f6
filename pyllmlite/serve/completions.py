"""``/v1/completions``: bodies and streams in OpenAI's form."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from pyllmlite.serve.generation import Generation, check_end
from pyllmlite.serve.sse import DONE, ChunkTemplate, Usage, event, finite


class Logprobs:
    """The four lists of a completion's ``logprobs``, with offsets that go on over chunks."""

    def __init__(self, num_top: int, offset: int = 0) -> None:
        self._num_top = num_top
        self._offset = offset

    def body(self, entries: list[Any]) -> dict[str, list[Any]]:
        tokens: list[str] = []
        chosen: list[float | None] = []
        top: list[dict[str, Any] | None] = []
        offsets: list[int] = []
        for entry in entries:
            text = entry[0][2] or ""
            tokens.append(text)
            chosen.append(None if entry[0][1] is None else finite(entry[0][1]))
            if entry[0][1] is None:  # nothing stands before a prompt's first token
                top.append(None)
            else:
                top.append({t[2] or "": finite(t[1]) for t in entry[: self._num_top + 1]})
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": tokens,
            "token_logprobs": chosen,
            "top_logprobs": top,
            "text_offset": offsets,
        }


class CompletionWriter:
    """Writes one request's answer.

    Args:
        head: ``id``, ``created`` and ``model``.
        echoed: Per prompt its text if it is to be repeated, else None.
        first_tokens: Per prompt the text of its first token, which has no log-probability.
        hide_output: With ``max_tokens`` 0 only the prompt is shown.
    """

    def __init__(
        self,
        head: dict[str, Any],
        generation: Generation,
        echoed: list[str | None],
        first_tokens: list[str],
        hide_output: bool,
    ) -> None:
        self._head = {**head, "object": "text_completion"}
        self._generation = generation
        self._n = generation.params.n
        self._num_top = generation.params.logprobs
        self._echoed = echoed
        self._first = first_tokens
        self._hide = hide_output
        self._usage = Usage(generation.prompts)

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        count = len(self._generation.prompts) * self._n
        texts: list[list[str]] = [[] for _ in range(count)]
        entries: list[list[Any]] = [[] for _ in range(count)]
        ends: list[Any] = [None] * count
        for tag, text in enumerate(self._echoed):
            for index in range(tag * self._n, (tag + 1) * self._n):
                texts[index].append(text or "")
        prompt_entries: dict[int, list[Any]] = {}
        async for tag, deltas, end in self._generation.items():
            check_end(end)
            self._usage.add(deltas, end)
            if end is not None and "prompt_logprobs" in end:
                prompt_entries[tag] = self._prompt_entries(tag, end)
            for index, text, _, logprobs, reason, stop in deltas:
                at = tag * self._n + index
                if not self._hide:
                    texts[at].append(text)
                    entries[at] += logprobs or ()
                if reason is not None:
                    ends[at] = reason, stop
        choices = []
        for at in range(count):
            logprobs = None
            if self._num_top is not None:
                all_entries = prompt_entries.get(at // self._n, []) + entries[at]
                logprobs = Logprobs(self._num_top).body(all_entries)
            choices.append(self._choice(at, "".join(texts[at]), logprobs, ends[at]))
        return {**self._head, "choices": choices, "usage": self._usage.body()}

    def _prompt_entries(self, tag: int, end: dict[str, Any]) -> list[Any]:
        return [entry or [[0, None, self._first[tag]]] for entry in end["prompt_logprobs"]]

    def _choice(self, at: int, text: Any, logprobs: Any, end: Any) -> dict[str, Any]:
        reason, stop = end or (None, None)
        if self._hide and reason is not None:
            reason = "length"
        made = {"index": at, "text": text, "logprobs": logprobs, "finish_reason": reason}
        if reason is not None:
            made["stop_reason"] = stop
        return made

    async def events(self, include_usage: bool) -> AsyncIterator[bytes]:
        """The stream, with a last chunk of usage if asked."""
        head = {**self._head, "usage": None} if include_usage else self._head
        offsets = [
            Logprobs(self._num_top or 0, len(text or "")) for text in self._echoed
            for _ in range(self._n)
        ]  # fmt: skip
        template = ChunkTemplate(
            {
                **head,
                "choices": [
                    {"index": ChunkTemplate.INDEX, "text": ChunkTemplate.TEXT, "logprobs": None,
                     "finish_reason": None}
                ],
            }
        )  # fmt: skip
        for tag, text in enumerate(self._echoed):
            if text:
                for index in range(self._n):
                    yield template.fill(tag * self._n + index, text)
        async for tag, deltas, end in self._generation.items():
            check_end(end)
            self._usage.add(deltas, end)
            data = b""
            for index, text, _, logprobs, reason, stop in deltas:
                at = tag * self._n + index
                text = "" if self._hide else text
                if reason is None and logprobs is None:
                    data += template.fill(at, text)
                    continue
                made = None if logprobs is None else offsets[at].body(logprobs)
                ended = None if reason is None else (reason, stop)
                choice = self._choice(at, text, made, ended)
                data += event({**head, "choices": [choice]})
            if data:
                yield data
        if include_usage:
            yield event({**self._head, "choices": [], "usage": self._usage.body()})
        yield DONE
