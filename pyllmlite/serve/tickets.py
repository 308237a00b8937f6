"""What the HTTP side knows of its requests while they are in an engine, wherever that engine is."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any

from pyllmlite.core.sampling import SamplingParams
from pyllmlite.serve.errors import ApiError


class Inbox:
    """What has come for one HTTP request and was not read yet.

    Its size is bounded by the tokens of the request, so the engine never waits for a reader.
    """

    __slots__ = ("_error", "_items", "_rester", "_waiter", "accepted")

    def __init__(self) -> None:
        self.accepted = 0
        self._items: list[Any] = []
        self._error: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._rester: asyncio.Future[None] | None = None

    def put(self, item: Any) -> None:
        """``(tag, deltas, end)``."""
        self._items.append(item)
        self._wake()
        if item[2] is not None:
            self._wake_rester()

    def accept(self) -> None:
        self.accepted += 1
        self._wake()

    def fail(self, error: ApiError) -> None:
        """The first one counts; what came before it is still read."""
        if self._error is None:
            self._error = error
        self._wake()
        self._wake_rester()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _wake_rester(self) -> None:
        if self._rester is not None and not self._rester.done():
            self._rester.set_result(None)

    async def rest(self, seconds: float) -> None:
        """Let things gather that long; less if the end comes."""
        if seconds <= 0 or self._error is not None or any(i[2] is not None for i in self._items):
            return
        self._rester = asyncio.get_running_loop().create_future()
        timer = asyncio.get_running_loop().call_later(seconds, self._wake_rester)
        try:
            await self._rester
        finally:
            timer.cancel()
            self._rester = None

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


class BaseClient:
    """An engine as the HTTP side sees it; lives on one event loop.

    A subclass carries prompts there and hands what comes back to :meth:`_accepted`,
    :meth:`_refused`, :meth:`_delivered` and :meth:`_die`.

    Attributes:
        state: ``loading``, ``ready`` or ``dead``.
        info: What the engine said when it was ready.
        stats: The newest figures of the engine.
        failure: Why it is dead.
        sequences: In the engine, running or waiting.
        on_found, on_ready, on_dead, on_end: Called on the loop.
    """

    def __init__(self) -> None:
        self.state = "loading"
        self.info: dict[str, Any] = {}
        self.stats: dict[str, int] = {}
        self.failure: str | None = None
        self.sequences = 0
        self.on_found: Callable[[str], None] = lambda path: None
        self.on_ready: Callable[[], None] = lambda: None
        self.on_dead: Callable[[], None] = lambda: None
        self.on_end: Callable[[Ticket], None] = lambda ticket: None
        self.on_tokens: Callable[[int], None] = lambda count: None
        self._tickets: dict[str, Ticket] = {}
        self._ids = itertools.count()
        self._closing = False

    # -- a subclass has ----------------------------------------------------------------------------
    async def connect(self) -> None:
        """Begin to listen, on the event loop that runs."""
        raise NotImplementedError

    def close(self, timeout: float = 5.0) -> None:
        """End it."""
        raise NotImplementedError

    async def snapshot(self) -> dict[str, Any]:
        """The map of KV blocks, and the figures that belong to it."""
        raise NotImplementedError

    def _send(
        self, ticket: Ticket, ids: list[int], params: SamplingParams, client: str, stream: bool
    ) -> None:
        """Carry a prompt to the engine.  ``ApiError``: that cannot be done."""
        raise NotImplementedError

    def _cancel(self, ticket: Ticket) -> None:
        """Tell the engine that nobody waits for it any more."""
        raise NotImplementedError

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
        self._send(ticket, prompt_token_ids, params, client, stream)
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
            self._cancel(ticket)

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

    # -- what the engine says --------------------------------------------------------------------
    def _accepted(self, id: str) -> None:
        ticket = self._tickets.get(id)
        if ticket is not None:
            ticket.inbox.accept()

    def _refused(self, id: str, error: ApiError) -> None:
        ticket = self._tickets.pop(id, None)
        if ticket is not None:
            self.sequences -= ticket.weight
            ticket.inbox.fail(error)

    def _delivered(self, id: str, deltas: list[list[Any]], end: dict[str, Any] | None) -> int:
        """New tokens of a request; returns how many.  Nobody may wait for it any more."""
        ticket = self._tickets.get(id)
        if ticket is None:
            return 0
        count = 0
        for delta in deltas:
            count += delta[2]
            if delta[4] is not None:
                ticket.reasons.append(delta[4])
        ticket.tokens += count
        if end is not None:
            del self._tickets[id]
            self.sequences -= ticket.weight
            ticket.first_time = end["first_token_time"]
            ticket.end_time = end["finish_time"]
            self.on_end(ticket)
        ticket.inbox.put((ticket.tag, deltas, end))
        return count

    def _die(self, reason: str) -> None:
        """The engine is gone for good."""
        if self.state == "dead":
            return
        self.state, self.failure = "dead", reason
        error = ApiError(503, f"the engine has stopped: {reason}")
        for ticket in self._tickets.values():
            ticket.inbox.fail(error)
        self._tickets.clear()
        self.sequences = 0
