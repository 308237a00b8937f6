"""One HTTP connection: uvicorn's, with an end to headers that are too long or never end, and to
answers that nobody reads.

It answers one request at a time.  A request that is sent before the answer to the last one is
complete (pipelining) is dropped, and the connection closed behind that answer, as RFC 9112,
section 9.3.2 lets a server do: one that waited would hide that the client has left.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from pyllmlite.serve.generation import ABORT

MAX_HEADER = 64 << 10


def connection_class(
    header_timeout: float, request_timeout: float = 600.0, read_timeout: float = 30.0
) -> type[HttpToolsProtocol]:
    """A protocol class for ``uvicorn.Config(http=...)``.

    Args:
        header_timeout: Seconds for the headers of a request.
        request_timeout: Seconds that a client may read nothing while its request runs.
        read_timeout: The same when the answer is complete.
    """

    class Connection(HttpToolsProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._header_bytes = 0
            self._in_header = True  # also before the first byte of the first request
            self._timer: asyncio.TimerHandle | None = None
            self._dropping = False  # nothing that comes is looked at any more
            self._reader_timer: asyncio.TimerHandle | None = None
            self._unread = 0  # bytes that waited for the reader at the last look
            self._stalled = 0.0  # seconds since they became fewer
            self._arm()

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            self._unwatch_reader()
            super().connection_lost(exc)

        @property
        def _answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _drop_rest(self) -> None:
            self._dropping = True
            self.cycle.keep_alive = False

        def on_message_begin(self) -> None:
            if self._answering:
                self._drop_rest()
                return
            super().on_message_begin()
            self.scope[ABORT] = self.transport.abort  # type: ignore[literal-required, typeddict-unknown-key]
            self._header_bytes = 0
            self._in_header = True
            self._arm()

        def on_url(self, url: bytes) -> None:
            if not self._dropping:
                super().on_url(url)

        def on_header(self, name: bytes, value: bytes) -> None:
            if not self._dropping:
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            if self._dropping:
                return
            self._in_header = False
            self._disarm()
            super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            if not self._dropping:
                super().on_body(body)

        def on_message_complete(self) -> None:
            if not self._dropping:
                super().on_message_complete()

        def send_400_response(self, msg: str) -> None:
            if self._answering and not self.cycle.more_body:
                self._drop_rest()  # what is behind a request that is whole and being answered
            else:
                super().send_400_response(msg)

        def data_received(self, data: bytes) -> None:
            if self._dropping:
                return
            super().data_received(data)
            if self._dropping:
                return
            if self._in_header:
                self._header_bytes += len(data)
                if self._header_bytes > MAX_HEADER:
                    self._refuse(b"431 Request Header Fields Too Large")
            elif not self._answering and self.timeout_keep_alive_task is None:
                self._arm()  # bytes that begin no request have ended the time for idling

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._unwatch_reader()  # a look that is due soon would come too early
            self._unread, self._stalled = self.transport.get_write_buffer_size(), 0.0
            self._watch_reader()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch_reader()

        def _watch_reader(self) -> None:
            if self._reader_timer is None and self.transport.get_write_buffer_size():
                self._reader_timer = self.loop.call_later(read_timeout, self._look_at_reader)

        def _unwatch_reader(self) -> None:
            if self._reader_timer is not None:
                self._reader_timer.cancel()
                self._reader_timer = None

        def _look_at_reader(self) -> None:
            self._reader_timer = None
            size = self.transport.get_write_buffer_size()
            self._stalled = self._stalled + read_timeout if size >= self._unread else 0.0
            self._unread = size
            if size and self._stalled >= (request_timeout if self._answering else read_timeout):
                self.transport.abort()  # close() would wait for the reader
            else:
                self._watch_reader()

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
            self._watch_reader()

    return Connection
