"""``AsyncEngine``: requests come and go while one thread steps.

Callers hand commands over in a queue; after each step the thread sends every event loop one
message with all that is new for it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from typing import Any

from pyllmlite.core.config import EngineConfig
from pyllmlite.core.errors import PyllmliteError, RequestError, StepError
from pyllmlite.core.request import RequestOutput
from pyllmlite.core.sampling import SamplingParams
from pyllmlite.engine.engine import Engine
from pyllmlite.engine.outputs import request_output
from pyllmlite.engine.prompts import Prompt, parse_prompt

log = logging.getLogger("pyllmlite")


class _Done:
    """Awaited, it is there at once: what was asked for is in the queue already."""

    def __await__(self) -> Generator[None, None, None]:
        return
        yield


class RequestStream:
    """The outputs of one request: an async iterator on the loop that asked for it.

    Outputs hold everything so far, so a slow reader sees the newest and misses nothing.
    """

    def __init__(self, request_id: str, abort: Callable[[RequestStream], object]) -> None:
        self.request_id = request_id
        self._loop = asyncio.get_running_loop()
        self._abort = abort
        self._newest: RequestOutput | BaseException | None = None
        self._arrived = asyncio.Event()
        self._ended = False

    def put(self, item: RequestOutput | BaseException) -> None:
        """On the loop's thread."""
        self._newest = item
        self._arrived.set()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._ended:
            raise StopAsyncIteration
        await self._arrived.wait()
        self._arrived.clear()
        item, self._newest = self._newest, None
        assert item is not None
        if isinstance(item, BaseException):
            self._ended = True
            raise item
        self._ended = item.finished
        return item

    async def aclose(self) -> None:
        """End the request if it runs."""
        if not self._ended:
            self._ended = True
            self._abort(self)


class AsyncEngine:
    """A model that serves requests as they come.

    Args:
        model: Path of a checkpoint, alias or hub id; None: the default model.
        options: Fields of :class:`~pyllmlite.core.config.EngineConfig`.

    :meth:`add`, :meth:`abort` and :meth:`close` may be called from any thread (``add`` from one
    with a running event loop).
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        from pyllmlite.model.build import build

        config = EngineConfig.from_kwargs(model=model, **options)
        self._take(build(config.model, config))

    @classmethod
    def from_built(cls, built: Any) -> AsyncEngine:
        """Around a model that is built already; nobody else may use it from then on."""
        engine = cls.__new__(cls)
        engine._take(built)
        return engine

    def _take(self, built: Any) -> None:
        self.built = built
        self._engine = Engine(built)
        self._streams: dict[str, RequestStream] = {}  # the thread's own
        self._commands: deque[tuple[Any, ...]] = deque()
        self._wake = threading.Event()
        self._ids = itertools.count()
        self._lock = threading.Lock()  # of the next two
        self._closing = False
        self._failure: PyllmliteError | None = None
        self._thread = threading.Thread(target=self._serve, name="pyllmlite-engine", daemon=True)
        self._thread.start()

    # -- from any thread -------------------------------------------------------------------------
    def add(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        client: str = "",
        stream: bool = True,
    ) -> RequestStream:
        """Let a request in.

        Args:
            stream: An output after each step with something new; else only the last one.
        Raises:
            RequestError: The prompt cannot be read; other reasons to refuse it come out of the
                stream.
            StepError: The engine has failed or is closed.
        """
        params = sampling_params if sampling_params is not None else SamplingParams()
        text, ids = parse_prompt(prompt, self.built.tokenizer)
        if request_id is None:
            request_id = f"request-{next(self._ids)}"
        made = RequestStream(request_id, self._abort_stream)
        prepared = {"prompt": text, "prompt_token_ids": ids}
        self._send(("add", made, prepared, params, priority, client, stream))
        return made

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        client: str = "",
        stream: bool = True,
    ) -> AsyncIterator[RequestOutput]:
        """:meth:`add` as an async generator; leaving it early, or cancelling it, ends the
        request."""
        outputs = self.add(
            prompt, sampling_params, request_id, priority=priority, client=client, stream=stream
        )
        try:
            async for output in outputs:
                yield output
        finally:
            await outputs.aclose()

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        """:meth:`generate`, under the name that ``LLM`` has for it."""
        return self.generate(prompt, sampling_params, **options)

    def abort(self, request_id: str) -> Awaitable[None]:
        """End a request after the step in flight; its last output has ``finish_reason``
        ``abort``.  An unknown id is ignored.  May be awaited, need not be."""
        self._send_abort(request_id, None)
        return _Done()

    def _abort_stream(self, stream: RequestStream) -> None:
        self._send_abort(stream.request_id, stream)

    def _send_abort(self, request_id: str, stream: RequestStream | None) -> None:
        try:
            self._send(("abort", request_id, stream))
        except StepError:
            pass  # nothing runs any more

    def stats(self) -> dict[str, int]:
        """A snapshot, taken between or within steps."""
        return self._engine.stats()

    def explain(self) -> str:
        return self.built.explain()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def close(self, timeout: float | None = 10.0) -> None:
        """Abort what runs and end the thread.  Calling it again does nothing."""
        with self._lock:
            self._closing = True
        self._wake.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def __enter__(self) -> AsyncEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.close)

    def _send(self, command: tuple[Any, ...]) -> None:
        with self._lock:  # so that the thread cannot end between the look and the append
            if self._failure is not None:
                raise self._failure
            if self._closing:
                raise StepError("the engine is closed")
            self._commands.append(command)
        self._wake.set()

    # -- the engine's thread -----------------------------------------------------------------------
    def _serve(self) -> None:
        engine = self._engine
        try:
            while not self._closing:
                while self._commands:
                    self._execute(self._commands.popleft())
                if engine.has_unfinished:
                    self._ship([(s.request.id, request_output(s)) for s in engine.step()])
                    wait = engine.wait_seconds()
                    if wait == 0.0:
                        continue
                else:
                    wait = None
                self._wake.wait(wait)
                self._wake.clear()
            self._end_all(None)
        except BaseException as error:
            log.exception("the engine's thread failed")
            self._end_all(StepError(f"the engine failed: {type(error).__name__}: {error}"))

    def _execute(self, command: tuple[Any, ...]) -> None:
        engine = self._engine
        if command[0] == "abort":
            _, request_id, stream = command
            if stream is not None and self._streams.get(request_id) is not stream:
                return  # it has ended, or never ran: the id is somebody else's
            output = engine.abort(request_id)
            if output is not None:
                self._ship([(request_id, output)])
            return
        _, stream, prompt, params, priority, client, streams = command
        try:
            if stream.request_id in self._streams:
                raise RequestError(f"a request {stream.request_id!r} is running already")
            engine.add(
                stream.request_id, prompt, params, priority=priority, client=client, stream=streams
            )
        except Exception as error:
            if not isinstance(error, PyllmliteError):
                error = RequestError(f"the request was refused: {type(error).__name__}: {error}")
            self._post({stream._loop: [(stream, error)]})
            return
        self._streams[stream.request_id] = stream

    def _ship(self, outputs: list[tuple[str, RequestOutput]]) -> None:
        """One message to each loop that waits for something."""
        if not outputs:
            return
        messages: dict[Any, list[tuple[RequestStream, Any]]] = {}
        for request_id, output in outputs:
            stream = self._streams.get(request_id)
            if stream is None:
                continue
            if output.finished:
                del self._streams[request_id]
            messages.setdefault(stream._loop, []).append((stream, output))
        self._post(messages)

    def _post(self, messages: dict[Any, list[tuple[RequestStream, Any]]]) -> None:
        for loop, items in messages.items():
            try:
                loop.call_soon_threadsafe(_deliver, items)
            except RuntimeError:  # the loop is closed: nobody will read them
                for stream, _ in items:
                    self._streams.pop(stream.request_id, None)
                    self._engine.abort(stream.request_id)

    def _end_all(self, failure: PyllmliteError | None) -> None:
        """Nobody is left waiting, whatever happened."""
        with self._lock:
            self._closing = True
            self._failure = failure
            commands = list(self._commands)
            self._commands.clear()
        closed = StepError("the engine is closed")
        waiting = [(c[1], failure or closed) for c in commands if c[0] == "add"]
        for request_id, stream in list(self._streams.items()):
            item: Any = failure
            if failure is None:
                item = self._engine.abort(request_id) or closed
            waiting.append((stream, item))
        self._streams.clear()
        for stream, item in waiting:
            try:
                stream._loop.call_soon_threadsafe(_deliver, [(stream, item)])
            except RuntimeError:
                continue


def _deliver(items: list[tuple[RequestStream, Any]]) -> None:
    for stream, item in items:
        stream.put(item)
