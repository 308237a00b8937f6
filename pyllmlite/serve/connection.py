"""One HTTP connection: uvicorn's, with an end to headers that are too long or never end."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pyllmlite.serve.generation import ABORT

MAX_HEADER = 64 << 10


def connection_class(header_timeout: float) -> type[HttpToolsProtocol]:
    """A protocol class for ``uvicorn.Config(http=...)``."""

    class Connection(HttpToolsProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._header_bytes = 0
            self._in_header = True  # also before the first byte of the first request
            self._timer: asyncio.TimerHandle | None = None
            self._arm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self.scope[ABORT] = self.transport.abort  # type: ignore[literal-required, typeddict-unknown-key]
            self._header_bytes = 0
            self._in_header = True
            self._arm()

        def on_headers_complete(self) -> None:
            self._in_header = False
            self._disarm()
            super().on_headers_complete()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self._in_header:
                self._header_bytes += len(data)
                if self._header_bytes > MAX_HEADER:
                    self._refuse(b"431 Request Header Fields Too Large")

        def _arm(self) -> None:
            if self._timer is None:
                self._timer = self.loop.call_later(header_timeout, self._too_slow)

        def _disarm(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _too_slow(self) -> None:
            self._timer = None
            self._refuse(b"408 Request Timeout")

        def _refuse(self, status: bytes) -> None:
            if self.transport.is_closing():
                return
            # Into the middle of another answer nothing may be written.
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(
                    b"HTTP/1.1 %b\r\nconnection: close\r\ncontent-length: 0\r\n\r\n" % status
                )
            self.transport.close()

    return Connection
