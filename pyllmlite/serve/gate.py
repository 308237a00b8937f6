"""What every request passes before a route sees it: keys, size and pace of the body."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import time
from collections.abc import Callable
from typing import Any

from starlette.responses import JSONResponse

from pyllmlite.serve.errors import ApiError, left
from pyllmlite.serve.settings import ServeConfig

# Open without a key: what tells whether the server lives, and the page, which asks for one.
_OPEN = {"/", "/health", "/ready"}
# Bytes of bodies that are being received, all connections together.
_ALL_BODIES = 256 << 20


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _is_own_name(host: str, configured: str) -> bool:
    """Can a ``Host`` header say so without a name server's help?"""
    host = host.strip().lower()
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if name in ("", "localhost", configured.lower()):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, error.headers)


class Gate:
    """ASGI middleware.

    Args:
        note: Called with the status of each request refused here.
    """

    def __init__(self, app: Any, config: ServeConfig, note: Callable[[int], None]) -> None:
        self._app = app
        self._config = config
        self._note = note
        self._keys = [_digest(key.encode()) for key in config.api_keys]
        self._held = 0
        # A web page whose name's address turns into this machine's (DNS rebinding) is no other
        # origin to a browser; a server that everybody on this machine may use knows it by its name.
        self._check_names = not self._keys and _is_loopback(config.host)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["pyllmlite.arrival"] = time.monotonic()
        held = 0
        try:
            self._check_host(scope)
            self._check_key(scope)
            if scope["method"] in ("POST", "PUT", "PATCH"):
                _check_type(scope)
                body = await self._body(scope, receive)
                held = scope["pyllmlite.size"] = len(body)
                receive = _replay(body, receive)
                del body
        except ApiError as error:
            self._note(error.status)
            # What is left of the body is not read, so the connection can serve nothing more.
            error.headers = {**error.headers, "connection": "close"}
            await error_response(error)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._held -= held

    def _check_host(self, scope: Any) -> None:
        if not self._check_names:
            return
        for name, value in scope["headers"]:
            host = value.decode("latin-1")
            if name == b"host" and not _is_own_name(host, self._config.host):
                raise ApiError(
                    403,
                    f"this server is not called {host[:200]!r}: use its address or localhost, or "
                    "give it an API key",
                )

    def _check_key(self, scope: Any) -> None:
        if not self._keys:
            scope["pyllmlite.client"] = scope["client"][0] if scope["client"] else ""
            return
        if scope["path"] in _OPEN:
            return
        given = next((v for k, v in scope["headers"] if k == b"authorization"), b"")
        digest = _digest(given[7:].strip() if given[:7].lower() == b"bearer " else given)
        # All keys are compared, each in constant time, so that time says nothing about them.
        matches = [hmac.compare_digest(digest, key) for key in self._keys]
        if not any(matches):
            raise ApiError(
                401,
                "a valid API key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        scope["pyllmlite.client"] = f"key-{matches.index(True)}"

    async def _body(self, scope: Any, receive: Any) -> bytes:
        """The whole body; its bytes count in ``_held`` from their arrival on, until the caller
        gives them back.  If it does not arrive, nothing is left to give back."""
        chunks: list[bytes] = []
        try:
            await self._read(scope, receive, chunks)
        except BaseException:
            self._held -= sum(map(len, chunks))
            raise
        return b"".join(chunks)

    async def _read(self, scope: Any, receive: Any, chunks: list[bytes]) -> None:
        limit = self._config.max_body
        length = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
        if length.isdigit() and int(length[:20]) > limit:
            raise ApiError(413, f"the body may have at most {limit} bytes")
        size = 0
        loop = asyncio.get_running_loop()
        end = loop.time() + self._config.body_timeout
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(end - loop.time(), 0.001))
            except asyncio.TimeoutError:
                raise ApiError(408, "the body did not arrive in time") from None
            if message["type"] == "http.disconnect":
                raise left()
            chunk = message.get("body", b"")
            chunks.append(chunk)
            size += len(chunk)
            self._held += len(chunk)
            if size > limit:
                raise ApiError(413, f"the body may have at most {limit} bytes")
            if self._held > _ALL_BODIES:
                raise ApiError(503, "too many long requests at once", headers={"retry-after": "2"})
            if not message.get("more_body", False):
                return


def _check_type(scope: Any) -> None:
    """Besides the plain mistake: a web page may send other types anywhere, without being asked."""
    given = next((v for k, v in scope["headers"] if k == b"content-type"), b"")
    if given.split(b";")[0].strip().lower() != b"application/json":
        raise ApiError(415, "the body must be JSON: content-type: application/json")


def _replay(body: bytes, receive: Any) -> Any:
    """The body in one message, then what comes behind it (that the client leaves)."""
    pending: list[bytes] = [body]

    async def replay() -> Any:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return replay
