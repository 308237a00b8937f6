"""The engines of a cluster as the HTTP side sees them: one that is never full and does not die."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import secrets
import time
from dataclasses import replace
from typing import Any

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError

from pyllmlite.core.sampling import SamplingParams
from pyllmlite.serve.errors import ApiError
from pyllmlite.serve.ray import here
from pyllmlite.serve.ray.replay import Diverged, Replay
from pyllmlite.serve.tickets import BaseClient, Ticket
from pyllmlite.serve.worker import params_to_wire

log = logging.getLogger("pyllmlite.serve")

# Runs of one request: one that ends every engine it gets to must not end them all.
MAX_RUNS = 3
# Seconds between two looks at what the replicas say of themselves.
LOOK_EVERY = 1.0


class RayClient(BaseClient):
    """Sends prompts to a deployment of :class:`~pyllmlite.serve.ray.replica.Replica`.

    A replica that ends takes no request with it: each starts again on another one, and goes on
    where it was.

    Args:
        handle: Of the deployment.
        tokenizer: Its path.
        most: Replicas there will be at most.
    """

    def __init__(self, handle: Any, tokenizer: str, most: int) -> None:
        super().__init__()
        self._handle = handle
        self._generate = handle.options(stream=True).generate
        self._tokenizer = tokenizer
        self._most = most
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._watcher: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        self.on_found(self._tokenizer)
        self._watcher = asyncio.ensure_future(self._watch())

    def close(self, timeout: float = 5.0) -> None:
        self._closing = True
        for task in [*self._runs.values(), self._watcher]:
            if task is not None:
                task.cancel()

    async def _watch(self) -> None:
        while True:
            try:
                if self.state == "loading":
                    info = await self._handle.info.remote()
                    # Of all replicas: what may run at once before somebody has to wait.
                    seats = info["max_num_seqs"] * self._most
                    self.info = {**info, "max_num_seqs": seats}
                    self.state = "ready"
                    self.on_ready()
                said = [f["stats"] for f in self.replicas().values() if f.get("stats")]
                self.stats = total(said)
                if said and self.state == "ready":
                    blocks = min(stats["num_blocks"] for stats in said)
                    here.router.set_capacity(blocks * self.info["block_size"])
            except asyncio.CancelledError:
                raise
            except Exception as error:
                log.warning("no replica says how it is: %s", error)
            await asyncio.sleep(LOOK_EVERY)

    @staticmethod
    def replicas() -> dict[str, dict[str, Any]]:
        """Name to what it has said of itself, for those that run."""
        return {} if here.router is None else here.router.figures()

    async def snapshot(self) -> dict[str, Any]:
        self.check()
        names = list(self.replicas())
        calls = [_alone(self._handle.snapshot.remote, at=name) for name in names]
        answers = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10.0)
        found = {n: a for n, a in zip(names, answers, strict=True) if isinstance(a, dict)}
        if not found:
            raise ApiError(503, f"no engine answers: {answers or 'none runs'}")
        figures = total(found.values())
        cells = [cell for answer in found.values() for cell in answer["cells"]]
        pids = {name: said.get("pid") for name, said in self.replicas().items()}
        return {**figures, "t": "snapshot", "id": 0, "cells": cells, "replicas": pids}

    # -- requests --------------------------------------------------------------------------------
    def _send(
        self, ticket: Ticket, ids: list[int], params: SamplingParams, client: str, stream: bool
    ) -> None:
        if params.seed is None and params.temperature > 0:
            # A second run has to draw what the first one drew.
            params = replace(params, seed=secrets.randbits(63))
        call = {
            "prompt_token_ids": ids, "params": params_to_wire(params), "client": client,
            "stream": stream,
        }  # fmt: skip
        task = _alone(asyncio.ensure_future, self._run(ticket.id, call))
        self._runs[ticket.id] = task
        task.add_done_callback(lambda _: self._runs.pop(ticket.id, None))

    def _cancel(self, ticket: Ticket) -> None:
        task = self._runs.get(ticket.id)
        if task is not None:
            task.cancel()

    async def _run(self, id: str, call: dict[str, Any]) -> None:
        replay = Replay()
        for run in range(1, MAX_RUNS + 1):
            replay.restart()
            try:
                if await self._once(id, call, replay):
                    return
                reason = "its answer broke off"
            except Diverged:
                message = "the engine has stopped, and another one does not say the same again"
                self._refused(id, ApiError(503, message))
                return
            except (RayActorError, DeploymentUnavailableError) as error:
                reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            except RayTaskError as error:
                log.exception("a replica failed")
                reason = str(error).splitlines()[-1]
                self._refused(id, ApiError(500, f"the engine failed: {reason}"))
                return
            except Exception as error:
                log.exception("a request failed")
                self._refused(id, ApiError(500, f"the engine cannot be reached: {error}"))
                return
            log.warning("request %s, run %d: %s", id, run, reason)
        self._refused(id, ApiError(503, f"the engine has stopped {MAX_RUNS} times: {reason}"))

    async def _once(self, id: str, call: dict[str, Any], replay: Replay) -> bool:
        """One run; did it come to its end?"""
        items = self._generate.remote(**call)
        try:
            async for kind, *rest in items:
                if kind == "accepted":
                    if not replay.accepted:
                        replay.accepted = True
                        self._accepted(id)
                elif kind == "refused":
                    self._refused(id, ApiError(**rest[0]))
                    return True
                else:
                    deltas, end = replay.fresh(rest[0]), _here(rest[1])
                    if deltas or end is not None:
                        self.on_tokens(self._delivered(id, deltas, end))
                    if end is not None:
                        return True
            return False
        finally:
            items.cancel()


def _alone(call: Any, *args: Any, **kwargs: Any) -> Any:
    """``call(...)``, but not as a part of the HTTP request that it is made for.

    All calls of one request bear its id, and Serve's router, which finds calls by that, forgets
    all but one of those that wait at the same time.
    """
    return contextvars.Context().run(call, *args, **kwargs)


def _here(end: dict[str, Any] | None) -> dict[str, Any] | None:
    """Seconds ago to times of this machine's clock."""
    if end is None:
        return None
    now = time.monotonic()
    times = {
        name: None if end[name] is None else now - end[name]
        for name in ("first_token_time", "finish_time")
    }
    return {**end, **times}


def total(figures: Any) -> dict[str, int]:
    """Sums of whole numbers by name."""
    made: dict[str, int] = {}
    for one in figures:
        for name, value in one.items():
            if isinstance(value, int):
                made[name] = made.get(name, 0) + value
    return made
