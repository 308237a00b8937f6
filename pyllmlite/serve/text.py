"""Text to tokens in the HTTP process, so that a long prompt costs the engine nothing."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from pyllmlite.core.errors import PyllmliteError
from pyllmlite.serve.errors import ApiError

if TYPE_CHECKING:
    from pyllmlite.model.tokenizer import Tokenizer
    from pyllmlite.serve.protocol import ChatRequest, Message, TokenizeRequest

T = TypeVar("T")
# Characters that are tokenized on the event loop: a fraction of a millisecond.
_SHORT = 2048
# Names that a template gets from us.
_RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "chat_template", "source",
             "self"}  # fmt: skip


class Text:
    """The model's tokenizer and chat template.

    ``max_tokens`` (what a prompt and its answer may have together) is known when the engine is.
    """

    def __init__(self) -> None:
        self._tokenizer: Tokenizer | None = None
        self._failure: str | None = None
        self._loaded = threading.Event()
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="tokenizer")
        # Of /tokenize and /detokenize, whose length nothing limits: they hold up themselves alone.
        self._side = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
        self._longest = 0
        self.max_tokens = 0

    def load(self, path: str) -> None:
        """Read the tokenizer, in the background."""
        self._pool.submit(self._load, path)

    def _load(self, path: str) -> None:
        from pyllmlite.model.tokenizer import open_tokenizer

        try:
            self._tokenizer = open_tokenizer(path)
        except Exception as error:
            self._failure = str(error)
        finally:
            self._loaded.set()

    async def ready(self) -> None:
        """``ApiError`` 503 if there is no tokenizer."""
        if not self._loaded.is_set():
            await asyncio.get_running_loop().run_in_executor(None, self._loaded.wait, 60.0)
        if self._tokenizer is None:
            raise ApiError(503, f"the tokenizer cannot be loaded: {self._failure}")

    @property
    def tokenizer(self) -> Tokenizer:
        assert self._tokenizer is not None
        return self._tokenizer

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._side.shutdown(wait=False, cancel_futures=True)

    async def _run(
        self, size: int, work: Callable[[], T], pool: ThreadPoolExecutor | None = None
    ) -> T:
        """On the event loop if it is short, else in a thread."""
        try:
            if size <= _SHORT:
                return work()
            return await asyncio.get_running_loop().run_in_executor(pool or self._pool, work)
        except PyllmliteError as error:
            raise ApiError(400, str(error)) from None

    # -- prompts ---------------------------------------------------------------------------------
    async def prompt(self, prompt: str | list[int], add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, none longer than the model takes."""
        await self.ready()
        if isinstance(prompt, str):
            ids = await self._run(len(prompt), lambda: self._encode(prompt, add_special_tokens))
        else:
            ids = prompt
        return self._checked(ids)

    async def chat(
        self, body: ChatRequest, tools: list[dict[str, Any]] | None, size: int
    ) -> list[int]:
        """Token ids of a conversation, with the beginning of the answer.

        Args:
            size: Of the whole body, in bytes.
        """
        await self.ready()
        if body.chat_template is not None:
            raise ApiError(
                400, "a request may not bring a chat_template of its own", param="chat_template"
            )
        variables = body.chat_template_kwargs or {}
        if _RESERVED & variables.keys():
            raise ApiError(400, "chat_template_kwargs may not set " + ", ".join(sorted(_RESERVED)))
        messages = [_plain(message) for message in body.messages]
        generate = body.add_generation_prompt is not False

        def work() -> list[int]:
            text = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=generate, tools=tools, **variables
            )
            # The template has written BOS where the model wants it.
            return self._encode(text, False)

        return self._checked(await self._run(size, work))

    async def tokenize(self, body: TokenizeRequest) -> list[int]:
        """Of ``/tokenize``, whatever the model's length."""
        await self.ready()
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages")
        if body.prompt is not None:
            prompt = body.prompt
            return await self._run(
                len(prompt),
                lambda: self.tokenizer.encode(prompt, body.add_special_tokens),
                self._side,
            )
        messages = [_plain(message) for message in body.messages or ()]

        def work() -> list[int]:
            text = self.tokenizer.apply_chat_template(messages, body.add_generation_prompt)
            return self.tokenizer.encode(text, add_special_tokens=False)

        return await self._run(_SHORT + 1, work, self._side)

    async def detokenize(self, ids: list[int]) -> str:
        await self.ready()
        decode = self.tokenizer.decode
        return await self._run(
            len(ids), lambda: decode(ids, skip_special_tokens=False), self._side
        )

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        limit = self.max_tokens
        if len(text) > 16 * limit:
            # It may be known to be too long before a second is spent on tokenizing it.
            if not self._longest:
                vocabulary = self.tokenizer.backend.get_vocab()
                self._longest = max(map(len, vocabulary), default=1)
            if len(text) > self._longest * limit:
                raise ApiError(
                    400,
                    f"the prompt has {len(text)} characters; the model takes {limit} tokens",
                    param="prompt",
                    code="context_length_exceeded",
                )
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def _checked(self, ids: list[int]) -> list[int]:
        if not ids:
            raise ApiError(400, "the prompt is empty: at least one token is needed", "prompt")
        if len(ids) >= self.max_tokens:
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens; at most {self.max_tokens - 1} leave room for "
                "an answer",
                param="prompt",
                code="context_length_exceeded",
            )
        return ids

    def knows_tools(self) -> bool:
        """Does the model's template say what it does with tools?"""
        tokenizer = self.tokenizer
        named = tokenizer.chat_templates.get("tool_use")
        return named is not None or "tools" in (tokenizer.chat_template or "")

    def tool_template(self) -> str:
        tokenizer = self.tokenizer
        return tokenizer.chat_templates.get("tool_use") or tokenizer.chat_template or ""


def _plain(message: Message) -> dict[str, Any]:
    """A message as templates read it: content as one string."""
    made = {**(message.model_extra or {}), "role": message.role, "content": message.content}
    if isinstance(message.content, list):
        texts = []
        for part in message.content:
            text = part.get("text")
            if part.get("type") != "text" or not isinstance(text, str):
                raise ApiError(400, "only parts of the type text are supported", param="messages")
            texts.append(text)
        made["content"] = "\n".join(texts)
    calls = made.get("tool_calls")
    if isinstance(calls, list):
        made["tool_calls"] = [_plain_call(call) for call in calls]
    return made


def _plain_call(call: Any) -> Any:
    """A call as templates read it: its arguments an object, which OpenAI's API has as a string."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
