"""The engine as the HTTP process sees it: a child process, and an inbox for each request."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from pyllmlite.core.sampling import SamplingParams
from pyllmlite.serve.errors import ApiError
from pyllmlite.serve.wire import Unpacker, WireError, pack
from pyllmlite.serve.worker import params_to_wire

log = logging.getLogger("pyllmlite.serve")


class Inbox:
    """What has come for one HTTP request and was not read yet.

    Its size is bounded by the tokens of the request, so the engine never waits for a reader.
    """

    __slots__ = ("_error", "_items", "_waiter", "accepted")

    def __init__(self) -> None:
        self.accepted = 0
        self._items: list[Any] = []
        self._error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Any) -> None:
        self._items.append(item)
        self._wake()

    def accept(self) -> None:
        self.accepted += 1
        self._wake()

    def fail(self, error: ApiError) -> None:
        """The first one counts; what came before it is still read."""
        if self._error is None:
            self._error = error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def until_accepted(self, count: int) -> None:
        """``count`` prompts are in the engine.  ``ApiError``: one was refused."""
        while self.accepted < count and self._error is None:
            await self._wait()
        if self._error is not None:
            raise self._error

    async def take(self) -> list[Any]:
        """All that has come; waits for the first."""
        while not self._items:
            if self._error is not None:
                raise self._error
            await self._wait()
        items, self._items = self._items, []
        return items

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


class Ticket:
    """One prompt in the engine.

    Attributes:
        tag: The place of the prompt in its HTTP request.
        weight: Sequences it becomes.
        arrival, first_time, end_time: Seconds on the monotonic clock.
        tokens: Generated so far.
    """

    __slots__ = (
        "arrival", "end_time", "first_time", "id", "inbox", "prompt_tokens", "reasons",
        "tag", "tokens", "weight",
    )  # fmt: skip

    def __init__(
        self, id: str, inbox: Inbox, tag: int, prompt_tokens: int, weight: int, arrival: float
    ) -> None:
        self.id = id
        self.inbox = inbox
        self.tag = tag
        self.prompt_tokens = prompt_tokens
        self.weight = weight
        self.arrival = arrival
        self.first_time: float | None = None
        self.end_time: float | None = None
        self.tokens = 0
        self.reasons: list[str] = []


class EngineClient(asyncio.Protocol):
    """Starts the engine's process and talks to it; lives on one event loop.

    Attributes:
        state: ``loading``, ``ready`` or ``dead``.
        info: What the engine said when it was ready.
        stats: The newest figures of the engine.
        failure: Why it is dead.
        on_found, on_ready, on_dead, on_end: Called on the loop.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self.state = "loading"
        self.info: dict[str, Any] = {}
        self.stats: dict[str, int] = {}
        self.failure: str | None = None
        self.load_failed = False
        self.sequences = 0  # in the engine, running or waiting
        self.on_found: Callable[[str], None] = lambda path: None
        self.on_ready: Callable[[], None] = lambda: None
        self.on_dead: Callable[[], None] = lambda: None
        self.on_end: Callable[[Ticket], None] = lambda ticket: None
        self.on_tokens: Callable[[int], None] = lambda count: None
        self._options = options
        self._tickets: dict[str, Ticket] = {}
        self._snapshots: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._ids = itertools.count()
        self._unpacker = Unpacker()
        self._closing = False
        self._died = False  # without being asked to
        self._transport: Any = None
        self.process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None

    # -- the process -----------------------------------------------------------------------------
    def launch(self) -> None:
        """Start it; it loads while this process does other things."""
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pyllmlite.serve.worker", "--fd", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        ours.sendall(pack(["start", self._options]))
        ours.setblocking(False)
        self._sock = ours

    async def connect(self) -> None:
        """Listen to it from this event loop."""
        await asyncio.get_running_loop().create_connection(lambda: self, sock=self._sock)

    @property
    def closed_on_purpose(self) -> bool:
        return self._closing and not self._died

    def close(self, timeout: float = 5.0) -> None:
        """End the process; blocks until it has."""
        self._closing = True
        if self._sock is not None:
            try:
                # At once: the event loop, which would close it, may never run again.
                self._sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        if self.process is not None:
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    # -- requests --------------------------------------------------------------------------------
    def submit(
        self,
        inbox: Inbox,
        tag: int,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        client: str = "",
        stream: bool = False,
        arrival: float | None = None,
    ) -> Ticket:
        """Send a prompt to the engine; answers come to ``inbox`` as ``(tag, deltas, end)``.

        Raises:
            ApiError: 503, the engine is not there; 400, the parameters cannot be sent.
        """
        self.check()
        ticket = Ticket(
            str(next(self._ids)), inbox, tag, len(prompt_token_ids), params.num_completions,
            time.monotonic() if arrival is None else arrival,
        )  # fmt: skip
        try:
            fields = params_to_wire(params)
            message = pack(["add", ticket.id, prompt_token_ids, fields, client, stream])
        except RecursionError:
            raise ApiError(400, "the request is nested too deeply") from None
        except WireError as error:
            raise ApiError(400, f"the request is too long: {error}") from None
        self._transport.write(message)
        self._tickets[ticket.id] = ticket
        self.sequences += ticket.weight
        return ticket

    def abort(self, ticket: Ticket) -> None:
        """Nobody waits for it any more: its blocks are free after the step in flight."""
        if self._tickets.pop(ticket.id, None) is None:
            return
        self.sequences -= ticket.weight
        ticket.reasons = ["abort"]
        ticket.end_time = time.monotonic()
        self.on_end(ticket)
        if self.state == "ready":
            self._transport.write(pack(["abort", ticket.id]))

    def abort_all(self, error: ApiError) -> None:
        """Everybody who waits is told ``error``."""
        for ticket in list(self._tickets.values()):
            ticket.inbox.fail(error)
            self.abort(ticket)

    def check(self) -> None:
        """``ApiError`` 503 unless the engine can take requests."""
        if self.state == "loading":
            raise ApiError(503, "the model is being loaded", headers={"retry-after": "2"})
        if self.state == "dead":
            raise ApiError(503, f"the engine has stopped: {self.failure}")

    async def snapshot(self) -> dict[str, Any]:
        """The map of KV blocks, and the figures that belong to it."""
        self.check()
        number = next(self._ids)
        future = asyncio.get_running_loop().create_future()
        self._snapshots[number] = future
        self._transport.write(pack(["snapshot", number]))
        try:
            return await asyncio.wait_for(future, 10.0)
        except asyncio.TimeoutError:
            raise ApiError(503, "the engine is busy") from None
        finally:
            self._snapshots.pop(number, None)

    # -- what the engine says --------------------------------------------------------------------
    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            messages = self._unpacker.feed(data)
        except WireError as error:
            self._die(str(error))
            return
        for message in messages:
            kind = message["t"]
            if kind == "step":
                self._step(message)
            elif kind == "snapshot":
                future = self._snapshots.get(message["id"])
                if future is not None and not future.done():
                    future.set_result(message)
            elif kind == "found":
                self.on_found(message["tokenizer"])
            elif kind == "ready":
                self.state, self.info, self.stats = "ready", message["info"], message["stats"]
                self.on_ready()
            else:  # failed, dead
                self.load_failed = kind == "failed"
                self._die(message["error"])

    def connection_lost(self, exc: Exception | None) -> None:
        self._die("its process has ended")

    def _step(self, message: dict[str, Any]) -> None:
        self.stats = message["stats"]
        for id in message.get("accepted", ()):
            ticket = self._tickets.get(id)
            if ticket is not None:
                ticket.inbox.accept()
        for id, reason in message.get("refused", ()):
            ticket = self._tickets.pop(id, None)
            if ticket is not None:
                self.sequences -= ticket.weight
                ticket.inbox.fail(ApiError(400, reason))
        count = 0
        for id, deltas, end in message.get("out", ()):
            ticket = self._tickets.get(id)
            if ticket is None:
                continue  # it was aborted meanwhile
            for delta in deltas:
                count += delta[2]
                ticket.tokens += delta[2]
                if delta[4] is not None:
                    ticket.reasons.append(delta[4])
            if end is not None:
                self._end(ticket, end)
            ticket.inbox.put((ticket.tag, deltas, end))
        if count:
            self.on_tokens(count)

    def _end(self, ticket: Ticket, end: dict[str, Any]) -> None:
        del self._tickets[ticket.id]
        self.sequences -= ticket.weight
        ticket.first_time = end["first_token_time"]
        ticket.end_time = end["finish_time"]
        self.on_end(ticket)

    def _die(self, reason: str) -> None:
        if self.state == "dead":
            return
        self.state, self.failure = "dead", reason
        error = ApiError(503, f"the engine has stopped: {reason}")
        for ticket in self._tickets.values():
            ticket.inbox.fail(error)
        self._tickets.clear()
        self.sequences = 0
        for future in self._snapshots.values():
            if not future.done():
                future.set_exception(error)
        if not self._closing:
            self._died = True
            self.on_dead()
