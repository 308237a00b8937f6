"""The engine as a child process of the HTTP process, and the talk with it."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
from typing import Any

from pyllmlite.core.sampling import SamplingParams
from pyllmlite.serve.errors import ApiError
from pyllmlite.serve.tickets import BaseClient, Ticket
from pyllmlite.serve.wire import Unpacker, WireError, pack
from pyllmlite.serve.worker import params_to_wire

log = logging.getLogger("pyllmlite.serve")


class EngineClient(BaseClient, asyncio.Protocol):
    """Starts the engine's process and talks to it.

    Attributes:
        load_failed: It died before it was ready.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.load_failed = False
        self._options = options
        self._snapshots: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._unpacker = Unpacker()
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
    def _send(
        self, ticket: Ticket, ids: list[int], params: SamplingParams, client: str, stream: bool
    ) -> None:
        try:
            fields = params_to_wire(params)
            message = pack(["add", ticket.id, ids, fields, client, stream])
        except RecursionError:
            raise ApiError(400, "the request is nested too deeply") from None
        except WireError as error:
            raise ApiError(400, f"the request is too long: {error}") from None
        self._transport.write(message)

    def _cancel(self, ticket: Ticket) -> None:
        self._transport.write(pack(["abort", ticket.id]))

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
            self._accepted(id)
        for id, reason in message.get("refused", ()):
            self._refused(id, ApiError(400, reason))
        count = 0
        for id, deltas, end in message.get("out", ()):
            count += self._delivered(id, deltas, end)
        if count:
            self.on_tokens(count)

    def _die(self, reason: str) -> None:
        if self.state == "dead":
            return
        super()._die(reason)
        error = ApiError(503, f"the engine has stopped: {reason}")
        for future in self._snapshots.values():
            if not future.done():
                future.set_exception(error)
        if not self._closing:
            self._died = True
            self.on_dead()
