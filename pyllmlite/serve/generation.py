"""One HTTP request's prompts in the engine: let in, read, timed out, left."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.responses import Response

from pyllmlite.core.sampling import SamplingParams
from pyllmlite.serve.errors import ApiError, left
from pyllmlite.serve.settings import ServeConfig
from pyllmlite.serve.sse import DONE, event
from pyllmlite.serve.tickets import BaseClient, Inbox, Ticket

log = logging.getLogger("pyllmlite.serve")

# Under this name the connection's own way to end itself stands in the ASGI scope.
ABORT = "pyllmlite.abort"
# Seconds that a reader who takes nothing keeps its connection behind the time-out.
_GRACE = 5.0

Item = tuple[int, list[list[Any]], dict[str, Any] | None]


class Door:
    """Who is let in: a bounded queue.

    ``Retry-After`` is guessed from how fast requests have ended lately.
    """

    def __init__(self, client: BaseClient, config: ServeConfig) -> None:
        self._client = client
        self._config = config
        self._ends: deque[float] = deque(maxlen=64)
        self.draining = False

    def note_end(self) -> None:
        self._ends.append(time.monotonic())

    def check(self, count: int) -> None:
        """``ApiError`` unless ``count`` sequences may come in."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", headers={"retry-after": "5"})
        self._client.check()
        if count > self._config.max_n:
            raise ApiError(
                400, f"{count} completions at once; at most {self._config.max_n}", param="n"
            )
        room = self._client.info["max_num_seqs"] + self._config.max_waiting
        if self._client.sequences and self._client.sequences + count > room:
            raise ApiError(
                429,
                f"{self._client.sequences} sequences run or wait, there is room for {room}: try "
                "again later",
                code="queue_full",
                headers={"retry-after": str(self._retry_after())},
            )

    def _retry_after(self) -> int:
        if len(self._ends) < 2:
            return 1
        rate = len(self._ends) / max(time.monotonic() - self._ends[0], 1e-3)
        return max(1, min(60, round(self._config.max_waiting / 4 / rate)))


class Generation:
    """Prompts that run, and what comes out of them.

    Args:
        prompts: Token ids; several for a request with a list of prompts.
    """

    def __init__(
        self,
        client: BaseClient,
        prompts: list[list[int]],
        params: SamplingParams,
        *,
        stream: bool,
        timeout: float,
        who: str,
        arrival: float,
    ) -> None:
        self.params = params
        self.prompts = prompts
        self._client = client
        self._inbox = Inbox()
        self._abort: Callable[[], None] | None = None
        self._watch: asyncio.Task[None] | None = None
        loop = asyncio.get_running_loop()
        rest = max(timeout - (time.monotonic() - arrival), 0.0)
        self._timer = loop.call_later(rest, self._expire, timeout)
        self._tickets: list[Ticket] = []
        try:
            for tag, ids in enumerate(prompts):
                self._tickets.append(
                    client.submit(
                        self._inbox, tag, ids, params, client=who, stream=stream, arrival=arrival
                    )
                )
        except BaseException:
            self.close()
            raise

    async def accepted(self) -> None:
        """All prompts are in the engine.  ``ApiError``: it refuses one."""
        await self._inbox.until_accepted(len(self.prompts))

    async def items(self) -> AsyncIterator[Item]:
        """``(prompt, deltas, end)`` as they come, until every prompt has ended."""
        running = len(self.prompts)
        while running:
            for item in await self._inbox.take():
                running -= item[2] is not None
                yield item

    def watch(self, scope: Any, receive: Callable[[], Awaitable[Any]]) -> None:
        """End everything at once when the client leaves."""
        self._abort = scope.get(ABORT)
        self._watch = asyncio.ensure_future(self._wait_for_end(receive))

    async def _wait_for_end(self, receive: Callable[[], Awaitable[Any]]) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._inbox.fail(left())
        self._end_tickets()

    def _expire(self, timeout: float) -> None:
        self._inbox.fail(ApiError(504, f"the request took longer than {timeout:g} seconds"))
        self._end_tickets()
        # A reader that takes nothing would not take the error either.
        if self._abort is not None:
            self._timer = asyncio.get_running_loop().call_later(_GRACE, self._abort)

    def _end_tickets(self) -> None:
        for ticket in self._tickets:
            self._client.abort(ticket)

    def close(self) -> None:
        """Nobody reads any more."""
        self._timer.cancel()
        if self._watch is not None:
            self._watch.cancel()
        self._end_tickets()


def check_end(end: dict[str, Any] | None) -> None:
    """``ApiError`` if the request has failed while it ran."""
    if end is not None and end["error"]:
        raise ApiError(500, end["error"])


class EventStream(Response):
    """Server-sent events, each written as it comes.

    Args:
        events: ``data: ...`` lines; errors in it become an event too.
        generation: Closed at the end.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], generation: Generation) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._generation = generation

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await send(
                {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            )
            try:
                async for event in self._events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            except ApiError as error:
                if error.status != 499:
                    await self._say(send, error)
            except Exception:
                log.exception("a stream failed")
                await self._say(send, ApiError(500, "internal error"))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._generation.close()

    async def _say(self, send: Any, error: ApiError) -> None:
        body = event(error.body()) + DONE
        await send({"type": "http.response.body", "body": body, "more_body": True})
