"""The HTTP side as a Ray Serve deployment: the plain server's application before many engines."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from ray import serve

from pyllmlite.core.errors import ConfigError
from pyllmlite.serve.settings import ServeConfig, read_api_keys


class _Late:
    """An ASGI application that is made when its process starts: Serve wants one before."""

    made: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await _Late.made(scope, receive, send)


@serve.ingress(_Late())
class Front:
    """Takes HTTP requests, turns text into tokens and calls the engines.

    Args:
        engines: Handle of the deployment of engines.
        model, tokenizer, revision: As :class:`EngineConfig` has them.
        most: Engines there will be at most.
        settings: Fields of :class:`ServeConfig`.
        api_key_file: Where this process reads keys, besides its environment.
        keys_needed: There must be one.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        engines: Any,
        model: str | None,
        tokenizer: str | None,
        revision: str | None,
        most: int,
        settings: dict[str, Any],
        api_key_file: str | None,
        keys_needed: bool,
    ) -> None:
        from pyllmlite.model.hub import DEFAULT_MODEL
        from pyllmlite.serve.app import Service, make_app
        from pyllmlite.serve.ray.client import RayClient

        logging.getLogger("pyllmlite").setLevel(logging.INFO)
        keys = read_api_keys(api_key_file)
        if keys_needed and not keys:
            raise ConfigError(
                "PYLLMLITE_API_KEY is set where the application was started, but not where its "
                "HTTP side runs: set it for `ray start` too, or give api_key_file"
            )
        config = ServeConfig(**settings, api_keys=keys)
        path = await asyncio.get_running_loop().run_in_executor(
            None, _tokenizer_path, model, tokenizer, revision
        )
        client = RayClient(engines, path, most)
        _Late.made = make_app(Service(client, config, str(model or DEFAULT_MODEL)))


def _tokenizer_path(model: str | None, tokenizer: str | None, revision: str | None) -> str:
    from pyllmlite.model.hub import resolve
    from pyllmlite.model.source import open_model

    if tokenizer is not None:
        return str(resolve(tokenizer))
    return str(open_model(model, revision=revision).path)
