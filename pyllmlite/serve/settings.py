"""How a server is set up: one flat dataclass, checked when it is made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pyllmlite.core.errors import ConfigError

API_KEY_VARIABLE = "PYLLMLITE_API_KEY"


@dataclass
class ServeConfig:
    """What the HTTP side allows; the engine has its own :class:`EngineConfig`.

    Attributes:
        host, port: Where to listen; port 0 takes a free one.
        served_model_name: The model's name in the API; None: from the model.
        api_keys: Who may use the server; empty: everybody.
        cors_origins: Origins whose pages may use it (``*``: all); empty: CORS is off.
        max_waiting: Sequences that may wait behind those that run; beyond that, 429.
        max_n: Completions of one HTTP request at most, over all of its prompts.
        max_body: Bytes of a request's body.
        max_connections: At once; beyond that, 503.
        request_timeout: Seconds from a request's arrival to its last token.
        body_timeout: Seconds for a request to arrive, headers and body each.
        drain_timeout: Seconds that running requests get after SIGTERM.
        access_log: A line for each request.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_waiting: int = 256
    max_n: int = 128
    max_body: int = 8 << 20
    max_connections: int = 1024
    request_timeout: float = 600.0
    body_timeout: float = 20.0
    drain_timeout: float = 30.0
    access_log: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be in [0, 65535], got {self.port}")
        for name, low in (("max_waiting", 0), ("max_n", 1), ("max_body", 1024),
                          ("max_connections", 1)):  # fmt: skip
            if getattr(self, name) < low:
                raise ConfigError(f"{name} must be at least {low}, got {getattr(self, name)}")
        for name in ("request_timeout", "body_timeout", "drain_timeout"):
            if not 0 < getattr(self, name) < 1e6:
                raise ConfigError(f"{name} must be a positive number of seconds")


def read_api_keys(file: str | os.PathLike[str] | None) -> tuple[str, ...]:
    """Keys from a file (one a line, ``#`` begins a comment) and from ``PYLLMLITE_API_KEY``
    (separated by commas).  Never from the command line, which every user of a machine can read."""
    lines = os.environ.get(API_KEY_VARIABLE, "").split(",")
    if file is not None:
        try:
            lines += Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"the API keys cannot be read: {error}") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if file is not None and not keys:
        raise ConfigError(f"{file}: holds no API key")
    for key in keys:
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError("an API key is printable ASCII without spaces")
    return keys
