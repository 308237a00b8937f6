"""The engine's process: commands come in between two steps, one message goes out after each.

It is one thread over :class:`~pyllmlite.engine.engine.Engine`.  A second one would have to wait
for the interpreter's switch interval (5 ms), which is longer than a step.

Commands (lists): ``["start", options]`` first and once; ``["add", id, prompt_token_ids, params,
client, stream]``; ``["abort", id]``; ``["snapshot", id]``.  Messages (dicts) are told apart by
``"t"``: ``found`` (where the tokenizer is), ``ready``, ``failed``, ``step``, ``snapshot`` and
``dead``.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import logging
import select
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING, Any

from pyllmlite.core.errors import PyllmliteError
from pyllmlite.core.sampling import SamplingParams
from pyllmlite.serve.wire import Unpacker, WireError, pack

if TYPE_CHECKING:
    from pyllmlite.core.request import Logprob, Sequence
    from pyllmlite.engine.engine import Engine
    from pyllmlite.engine.state import RequestState

log = logging.getLogger("pyllmlite")

_READ = 1 << 20
# Cells of the page's map of KV blocks; more blocks than that share a cell.
MAX_CELLS = 1024
# Seconds between two messages of a step loop in which no output changes (a long prefill).
_STATS_EVERY = 0.25


class Sent:
    """What of one request has been sent.

    Attributes:
        stream: Tokens are sent as they come, else all at the end.
        chars, tokens: Per completion how much; tokens -1: it has ended.
    """

    __slots__ = ("chars", "stream", "tokens")

    def __init__(self, stream: bool) -> None:
        self.stream = stream
        self.chars: list[int] = []
        self.tokens: list[int] = []

    def deltas(self, state: RequestState) -> list[list[Any]]:
        """What is new: ``[index, text, num_tokens, logprobs, finish_reason, stop_reason]``."""
        if not self.stream:
            return self._whole(state) if state.live == 0 else []
        found: list[list[Any]] = []
        request = state.request
        while len(self.tokens) < len(request.sequences):
            self.tokens.append(0)
            self.chars.append(0)
        for index, seq in enumerate(request.sequences):
            if self.tokens[index] >= 0:
                delta = self._delta(index, seq, request.params)
                if delta is not None:
                    found.append(delta)
        return found

    @staticmethod
    def _whole(state: RequestState) -> list[list[Any]]:
        from pyllmlite.engine.outputs import request_output

        return [
            [
                done.index,
                done.text,
                len(done.token_ids),
                None if done.logprobs is None else [_logprobs(entry) for entry in done.logprobs],
                done.finish_reason,
                done.stop_reason,
            ]
            for done in request_output(state).outputs
        ]

    def _delta(self, index: int, seq: Sequence, params: SamplingParams) -> list[Any] | None:
        from pyllmlite.engine.stop import held_back

        chars, tokens = self.chars[index], self.tokens[index]
        detokenizer = seq.output.detokenizer
        text = detokenizer.text if detokenizer is not None else ""
        end = len(text)
        reason = seq.finish_reason
        if reason is None:
            if params.stop:
                end -= held_back(text, params.stop)
            # Half a character, or what may be the beginning of a stop string: there is nothing to
            # show yet.
            if end <= chars:
                return None
        total = seq.num_output_tokens
        logprobs = None
        if seq.logprobs is not None:
            logprobs = [_logprobs(entry) for entry in seq.logprobs[tokens:total]]
        self.chars[index], self.tokens[index] = end, total if reason is None else -1
        return [index, text[chars:end], total - tokens, logprobs, reason, seq.stop_reason]


def _logprobs(entry: dict[int, Logprob] | None) -> list[list[Any]] | None:
    """The chosen token first, then the best: ``[id, logprob, text]``."""
    if entry is None:
        return None
    return [[token, found.logprob, found.decoded_token] for token, found in entry.items()]


class Worker:
    """The step loop of one engine, spoken to through a socket.

    Args:
        sock: A connected stream socket; its end ends the loop.
    """

    def __init__(self, sock: socket.socket, engine: Engine, unpacker: Unpacker) -> None:
        from pyllmlite.engine.compiling import Compiler

        self._sock = sock
        self._engine = engine
        self._unpacker = unpacker
        self._sent: dict[str, Sent] = {}
        self._accepted: list[str] = []
        self._refused: list[list[str]] = []
        self._pending: list[Any] = []  # commands that came with others
        self._due = False  # the other side's figures are old
        # A compiler's thread says with a byte that it is done, which ends a wait for commands.
        self._woken, self._waker = socket.socketpair()
        for end in (self._woken, self._waker):
            end.setblocking(False)
        self._compiler = Compiler(engine.built.constraints, self._wake)
        self._compiling: dict[str, tuple[Any, ...]] = {}

    def run(self, pending: list[Any]) -> None:
        """Until the other side is gone."""
        self._pending = pending
        try:
            self._loop()
        except (BrokenPipeError, ConnectionResetError):  # gone in the middle of a message
            pass

    def _loop(self) -> None:
        engine = self._engine
        wait: float | None = 0.0
        last = 0.0
        while self._receive(wait):
            outputs = self._step() if engine.has_unfinished else []
            now = time.monotonic()
            idle = not engine.has_unfinished
            if outputs or self._accepted or self._refused or (
                self._due and (idle or now - last > _STATS_EVERY)
            ):
                self._send_step(outputs)
                last = now
                self._due = not idle
            wait = None if idle else engine.wait_seconds()
            compiling = self._compiler.wait_seconds()
            if compiling is not None:
                wait = compiling if wait is None else min(wait, compiling)

    def _step(self) -> list[Any]:
        outputs = [self._output(state) for state in self._engine.step()]
        return [output for output in outputs if output is not None]

    def _send_step(self, outputs: list[Any]) -> None:
        message: dict[str, Any] = {"t": "step", "stats": self._stats()}
        if outputs:
            message["out"] = outputs
        if self._accepted:
            message["accepted"], self._accepted = self._accepted, []
        if self._refused:
            message["refused"], self._refused = self._refused, []
        try:
            data = pack(message)
        except WireError:
            outputs = message.pop("out", [])
            data = pack(message) + b"".join(map(self._alone, outputs))
        self._sock.sendall(data)

    def _alone(self, output: list[Any]) -> bytes:
        """A message with one output; if that is too long to be sent, the request's failure."""
        message: dict[str, Any] = {"t": "step", "stats": self._stats(), "out": [output]}
        try:
            return pack(message)
        except WireError as error:
            id, _, end = output
            if end is None:
                self._sent.pop(id, None)
                self._engine.abort(id)
                end = {"cached": 0, "first_token_time": None, "finish_time": time.monotonic()}
            end = {name: end[name] for name in ("cached", "first_token_time", "finish_time")}
            message["out"] = [[id, [], {**end, "error": f"the answer cannot be sent: {error}"}]]
            return pack(message)

    def _stats(self) -> dict[str, int]:
        return {**self._engine.stats(), "preemptions": self._engine.pool.preemptions}

    def _output(self, state: RequestState) -> list[Any] | None:
        """``[id, deltas, end]``; ``end`` is None while the request runs."""
        request = state.request
        sent = self._sent.get(request.id)
        if sent is None:
            return None
        deltas = sent.deltas(state)
        end: dict[str, Any] | None = None
        if state.live == 0:
            del self._sent[request.id]
            end = {
                "error": request.error,
                "cached": request.num_cached_tokens,
                "first_token_time": request.first_token_time,
                "finish_time": request.finish_time,
            }
            if request.prompt_logprobs is not None:
                end["prompt_logprobs"] = [_logprobs(entry) for entry in request.prompt_logprobs]
        elif not deltas:
            return None
        return [request.id, deltas, end]

    # -- commands --------------------------------------------------------------------------------
    def _receive(self, wait: float | None) -> bool:
        """Carry out what has come, waiting for it at most ``wait`` seconds (None: for ever)."""
        if self._pending:
            commands, self._pending = self._pending, []
        else:
            ready = select.select([self._sock, self._woken], [], [], wait)[0]
            if self._woken in ready:
                self._woken.recv(1024)
            if self._compiling:
                self._admit()
            if self._sock not in ready:
                return True
            data = self._sock.recv(_READ)
            if not data:
                return False
            commands = self._unpacker.feed(data)
        for command in commands:
            self._execute(command)
        return True

    def _execute(self, command: list[Any]) -> None:
        if command[0] == "add":
            self._due = True
            self._add(*command[1:])
        elif command[0] == "abort":
            self._due = True
            self._sent.pop(command[1], None)
            if self._compiling.pop(command[1], None) is not None:
                self._compiler.cancel(command[1])
            self._engine.abort(command[1])
        elif command[0] == "snapshot":
            self._sock.sendall(
                pack({"t": "snapshot", "id": command[1], "cells": self._cells(), **self._stats()})
            )

    def _add(self, id: str, ids: list[int], params: Any, client: str, stream: bool) -> None:
        try:
            made = params_from_wire(params)
        except Exception as error:
            self._refuse(id, error)
            return
        if self._compiler.wants(made):
            self._compiling[id] = (ids, made, client, stream)
            self._compiler.submit(id, made)
        else:
            self._start(id, ids, made, client, stream)

    def _wake(self) -> None:
        try:
            self._waker.send(b"x")
        except BlockingIOError:  # enough lies there
            pass

    def _admit(self) -> None:
        """Requests whose constraints are compiled come in."""
        for id, error in self._compiler.take():
            request = self._compiling.pop(id)
            if error is None:
                self._start(id, *request)
            else:
                self._refuse(id, error)

    def _refuse(self, id: str, error: Exception) -> None:
        from pyllmlite.engine.failure import failure

        known = isinstance(error, PyllmliteError)
        self._refused.append([id, str(error) if known else failure("the request", error)])

    def _start(self, id: str, ids: list[int], made: Any, client: str, stream: bool) -> None:
        from pyllmlite.hooks.decoder import Decoder

        engine = self._engine
        try:
            engine.add(id, {"prompt_token_ids": ids}, made, client=client, stream=stream)
        except Exception as error:
            self._refuse(id, error)
            return
        # One that does more than append (beams) has nothing to show before the end.
        appends = type(engine.requests[id].decoder).advance is Decoder.advance
        self._sent[id] = Sent(stream and appends)
        self._accepted.append(id)

    def _cells(self) -> list[int]:
        """How full each cell of the map is, 0 (free or only cached) to 9 (all blocks held)."""
        import numpy as np

        cache = self._engine.built.cache
        table = cache.block_tables[0]
        held = np.zeros(cache.num_blocks, np.float32)
        held[table[table >= 0]] = 1.0
        per_cell = -(-len(held) // MAX_CELLS)
        held = np.pad(held, (0, -len(held) % per_cell)).reshape(-1, per_cell).mean(axis=1)
        return np.ceil(held * 9).astype(int).tolist()


def params_to_wire(params: SamplingParams) -> dict[str, Any]:
    """The fields that differ from the defaults, as JSON can say them."""
    default = SamplingParams()
    fields: dict[str, Any] = {}
    for name in (field.name for field in dataclasses.fields(SamplingParams)):
        value = getattr(params, name)
        if value != getattr(default, name):
            nested = dataclasses.is_dataclass(value) and not isinstance(value, type)
            fields[name] = dataclasses.asdict(value) if nested else value
    if params.logit_bias:  # a JSON object's names are strings
        fields["logit_bias"] = list(params.logit_bias.items())
    return fields


def params_from_wire(fields: dict[str, Any]) -> SamplingParams:
    """The inverse of :func:`params_to_wire`."""
    fields = dict(fields)
    if fields.get("logit_bias"):
        fields["logit_bias"] = dict(fields["logit_bias"])
    return SamplingParams(**fields)


def _load(sock: socket.socket, options: dict[str, Any]) -> Engine:
    from pyllmlite.core.config import EngineConfig
    from pyllmlite.engine.engine import Engine
    from pyllmlite.model.build import build
    from pyllmlite.model.hub import resolve
    from pyllmlite.model.source import open_model

    config = EngineConfig.from_kwargs(**options)
    source = open_model(config.model, revision=config.revision)
    tokenizer = resolve(config.tokenizer) if config.tokenizer is not None else source.path
    sock.sendall(pack({"t": "found", "tokenizer": str(tokenizer)}))
    built = build(source, config)
    engine = Engine(built)
    info = {
        "max_model_len": built.max_model_len,
        "max_tokens": min(built.max_model_len, built.cache.max_tokens_per_sequence()),
        "max_num_seqs": built.max_num_seqs,
        "max_logprobs": config.max_logprobs,
        "vocab_size": built.spec.vocab_size,
        "block_size": built.cache.block_size,
        "kv_bytes": built.cache.nbytes,
        "load_seconds": built.load_seconds,
        "explain": built.explain(),
    }
    sock.sendall(pack({"t": "ready", "info": info, "stats": engine.stats()}))
    return engine


def _first(sock: socket.socket, unpacker: Unpacker) -> list[Any] | None:
    """The commands that came first; None: the other side is gone."""
    commands: list[Any] = []
    while not commands:
        data = sock.recv(_READ)
        if not data:
            return None
        commands = unpacker.feed(data)
    return commands


def serve(sock: socket.socket) -> int:
    """Load a model and run its engine until the socket ends.  Returns the exit code."""
    unpacker = Unpacker()
    commands = _first(sock, unpacker)
    if commands is None:
        return 0
    try:
        engine = _load(sock, commands.pop(0)[1])
    except Exception as error:
        if not isinstance(error, PyllmliteError):
            log.exception("the model cannot be loaded")
        line = " ".join(str(error).split()) or type(error).__name__
        sock.sendall(pack({"t": "failed", "error": line}))
        return 1
    gc.collect()
    gc.freeze()  # what the model is made of need not be looked at by every collection
    try:
        Worker(sock, engine, unpacker).run(commands)
    except Exception as error:
        log.exception("the engine failed")
        sock.sendall(pack({"t": "dead", "error": f"{type(error).__name__}: {error}"}))
        return 1
    return 0


def main() -> None:
    """``python -m pyllmlite.serve.worker --fd N``: the socket is inherited."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    fd = parser.parse_args().fd
    # Signals that go to the whole group are the HTTP process's business: it drains, and then
    # closes the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.raiseExceptions = False  # a full disk under the log is no reason to stop
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        code = serve(socket.socket(fileno=fd))
    except OSError:  # the other side is gone
        code = 0
    sys.exit(code)


if __name__ == "__main__":
    main()
