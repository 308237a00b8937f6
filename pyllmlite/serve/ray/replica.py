"""One engine as a Ray Serve deployment: a child process of its actor, as in the plain server."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator
from typing import Any

from ray import serve

from pyllmlite.core.errors import ModelError, PyllmliteError
from pyllmlite.serve.client import EngineClient
from pyllmlite.serve.errors import ApiError
from pyllmlite.serve.tickets import Inbox
from pyllmlite.serve.worker import params_from_wire

log = logging.getLogger("pyllmlite.serve")


class Replica:
    """Runs prompts, and says what comes out of them.

    Items of :meth:`generate` are ``["accepted", replica]``, then ``["out", deltas, end]`` as the
    worker has them (the times of ``end`` as seconds ago), or ``["refused", {...}]``.

    Args:
        options: Fields of :class:`EngineConfig`.
        message_rate: Messages per second that all streams send together, about.  Each costs
            about a millisecond of processor time on its way to the client: with 64 streams a
            message per token would take a core.

    An engine that has died cannot be mended: the actor ends at once, which tells everybody that
    waits for it, and Serve starts another.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, options: dict[str, Any], message_rate: float, load_timeout: float = 600.0
    ) -> None:
        self._interval = 1.0 / message_rate
        self._client = EngineClient(options)
        ready = asyncio.Event()
        self._client.on_ready = ready.set
        self._client.on_dead = ready.set
        self._client.launch()
        await self._client.connect()
        try:
            await asyncio.wait_for(ready.wait(), load_timeout)
        except asyncio.TimeoutError:
            self._client.close()
            raise ModelError(f"the engine was not ready after {load_timeout:g} s") from None
        if self._client.failure is not None:
            self._client.close()
            raise ModelError(self._client.failure)
        self._client.on_dead = self._end
        self._name = serve.get_replica_context().replica_id.unique_id
        self._streams = 0

    def _end(self) -> None:
        log.error("the engine has stopped: %s", self._client.failure)
        os._exit(1)

    def __del__(self) -> None:
        client = getattr(self, "_client", None)
        if client is not None:
            client.close()

    async def info(self, at: str | None = None) -> dict[str, Any]:
        """What the engine said when it was ready."""
        return self._client.info

    async def snapshot(self, at: str | None = None) -> dict[str, Any]:
        """Its map of KV blocks and its figures."""
        return await self._client.snapshot()

    def record_routing_stats(self) -> dict[str, Any]:
        """What Serve carries to the routers now and then."""
        return {"pid": os.getpid(), "stats": self._client.stats}

    async def check_health(self) -> None:
        if self._client.state == "dead":
            raise RuntimeError(f"the engine has stopped: {self._client.failure}")

    async def generate(
        self,
        *,
        prompt_token_ids: list[int],
        params: dict[str, Any],
        client: str = "",
        stream: bool = False,
    ) -> AsyncIterator[list[Any]]:
        """Run one prompt; leaving the iterator ends it."""
        inbox = Inbox()
        self._streams += stream
        ticket = None
        try:
            made = params_from_wire(params)
            ticket = self._client.submit(
                inbox, 0, prompt_token_ids, made, client=client, stream=stream
            )
            await inbox.until_accepted(1)
            yield ["accepted", self._name]
            end = None
            while end is None:
                begun = time.monotonic()
                deltas: list[list[Any]] = []
                for _, more, end in await inbox.take():  # noqa: B007
                    deltas += more
                yield ["out", merged(deltas), None if end is None else _ago(end)]
                if end is None:
                    # Until then tokens gather and go together.
                    rest = self._streams * self._interval - (time.monotonic() - begun)
                    await inbox.rest(max(rest, 0.0))
        except ApiError as error:
            yield ["refused", {"status": error.status, "message": error.message,
                               "param": error.param, "code": error.code}]  # fmt: skip
        except PyllmliteError as error:
            yield ["refused", {"status": 400, "message": str(error)}]
        finally:
            self._streams -= stream
            if ticket is not None:
                self._client.abort(ticket)


def merged(deltas: list[list[Any]]) -> list[list[Any]]:
    """Deltas of the same completion that follow each other, as one."""
    made: dict[int, list[Any]] = {}
    for index, text, count, logprobs, reason, stop in deltas:
        one = made.get(index)
        if one is None:
            made[index] = [index, text, count, logprobs, reason, stop]
            continue
        one[1] += text
        one[2] += count
        if logprobs is not None:
            one[3] = (one[3] or []) + logprobs
        one[4:] = [reason, stop]
    return list(made.values())


def _ago(end: dict[str, Any]) -> dict[str, Any]:
    """With times as seconds ago: another machine's clock says something else."""
    now = time.monotonic()
    made = dict(end)
    for name in ("first_token_time", "finish_time"):
        if made[name] is not None:
            made[name] = now - made[name]
    return made
