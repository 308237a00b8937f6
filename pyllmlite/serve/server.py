"""From start to end: the port, the engine's process, signals, draining, the exit code."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import math
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyllmlite.core.errors import ConfigError, ModelError, StepError
from pyllmlite.serve.settings import ServeConfig

log = logging.getLogger("pyllmlite.serve")

_NEEDED = ("fastapi", "uvicorn", "httptools", "prometheus_client")


def check_packages() -> None:
    """``ConfigError`` if a package of the extra ``serve`` is missing."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the server needs {', '.join(missing)}: pip install 'pyllmlite[serve]'"
        )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.  ``ConfigError``: the port is in use, there is no such address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(1024)
        except BaseException:
            sock.close()
            raise
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"cannot listen on {host}:{port}: {reason}; choose another --port or --host"
        ) from None
    return sock


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def raise_file_limit(wanted: int) -> None:
    """Let this process have ``wanted`` files open, as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    wanted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError) as error:
        log.warning("only %d files may be open at once: %s", soft, error)


def _leave_early(*_: object) -> None:
    """On SIGTERM before there is anything to drain."""
    raise SystemExit(0)


def run(engine_options: dict[str, Any], config: ServeConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return.

    Args:
        engine_options: Fields of :class:`EngineConfig`, ``model`` among them.
    Raises:
        ConfigError: At once, e.g. the port is in use.
        ModelError: The model could not be loaded; StepError: the engine died later.
    """
    check_packages()
    logging.raiseExceptions = False  # a full disk under the log is no reason to stop
    # Each connection is an open file, and some more are for the rest.
    raise_file_limit(config.max_connections + 256)
    sock = listen(config.host, config.port)
    signal.signal(signal.SIGTERM, _leave_early)
    from pyllmlite.serve.client import EngineClient

    client = EngineClient(engine_options)
    client.launch()  # it loads while this process imports
    try:
        _serve(client, config, sock, engine_options.get("model"))
    finally:
        client.close()
        sock.close()
    if client.failure is not None and client.load_failed:
        raise ModelError(client.failure)
    if client.failure is not None and not client.closed_on_purpose:
        raise StepError(f"the engine has stopped: {client.failure}")


def _serve(client: Any, config: ServeConfig, sock: socket.socket, model: str | None) -> None:
    import uvicorn

    from pyllmlite.model.hub import DEFAULT_MODEL
    from pyllmlite.serve.app import Service, make_app
    from pyllmlite.serve.connection import connection_class
    from pyllmlite.serve.errors import ApiError

    service = Service(client, config, str(model or DEFAULT_MODEL))

    def give_up() -> None:
        client.abort_all(ApiError(503, "the server is shutting down"))

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            """SIGTERM and SIGINT drain; a second one ends at once.  (uvicorn's own would send
            itself the signal again at the end, and so never exit with 0.)"""
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self.leave, number)
            try:
                yield
            finally:
                for number in (signal.SIGTERM, signal.SIGINT):
                    loop.remove_signal_handler(number)
                    signal.signal(number, signal.SIG_IGN)  # it is leaving, with its own exit code

        def leave(self, number: int = 0) -> None:
            if self.should_exit:
                self.force_exit = True
            elif number:
                count = client.sequences
                log.info("%s: no new requests; %d sequences finish",
                         signal.Signals(number).name, count)  # fmt: skip
            if not service.door.draining:
                asyncio.get_running_loop().call_later(config.drain_timeout, give_up)
            service.door.draining = True
            self.should_exit = True

    server = Server(
        uvicorn.Config(
            make_app(service),
            http=connection_class(config.body_timeout, config.request_timeout),
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=config.access_log,
            server_header=False,
            limit_concurrency=config.max_connections,
            timeout_keep_alive=30,
            # A little later than what is told to those who wait: for readers that take nothing.
            timeout_graceful_shutdown=math.ceil(config.drain_timeout) + 2,
        )
    )
    client.on_dead = server.leave
    log.info("listening on %s, loading %s", _url(sock), service.name)
    server.run(sockets=[sock])
