"""The routes."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from pyllmlite._version import __version__
from pyllmlite.serve.chat import ChatWriter
from pyllmlite.serve.completions import CompletionWriter
from pyllmlite.serve.errors import ApiError
from pyllmlite.serve.gate import Gate, error_response
from pyllmlite.serve.generation import Door, EventStream, Generation
from pyllmlite.serve.metrics import Metrics
from pyllmlite.serve.params import chat_params, completion_params
from pyllmlite.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampling,
    TokenizeRequest,
)
from pyllmlite.serve.settings import ServeConfig
from pyllmlite.serve.text import Text
from pyllmlite.serve.tickets import BaseClient, Ticket
from pyllmlite.serve.tools import wanted_tools

log = logging.getLogger("pyllmlite.serve")

# Tokens that are written as JSON at once.
_PIECE = 1 << 14

PAGE = Path(__file__).with_name("page.html")
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "cache-control": "no-cache",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


class Service:
    """What the routes share.

    Args:
        model: The model as it was asked for; its last part is the name it is served under.
    """

    def __init__(self, client: BaseClient, config: ServeConfig, model: str) -> None:
        self.client = client
        self.config = config
        name = Path(model).name.removesuffix(".gguf") if Path(model).exists() else model
        self.name = config.served_model_name or name
        self.names = {self.name, model}
        self.created = int(time.time())
        self.text = Text()
        self.metrics = Metrics(client)
        self.door = Door(client, config)
        client.on_found = self.text.load
        client.on_ready = self._ready
        client.on_end = self._end
        client.on_tokens = self.metrics.note_tokens

    def _ready(self) -> None:
        info = self.client.info
        self.text.max_tokens = info["max_tokens"]
        log.info("%s", info["explain"])
        log.info("ready: %s, loaded in %.1f s", self.name, info["load_seconds"])

    def _end(self, ticket: Ticket) -> None:
        self.metrics.note_end(ticket)
        self.door.note_end()

    def check_model(self, asked: str | None) -> None:
        if asked and asked not in self.names:
            raise ApiError(
                404,
                f"there is no model {asked[:200]!r} here; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{kind}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self.name,
        }

    def start(
        self, prompts: list[list[int]], params: Any, stream: bool, request: Request
    ) -> Generation:
        """Let prompts in; ``ApiError`` 429 if too many wait."""
        self.door.check(len(prompts) * params.num_completions)
        return Generation(
            self.client,
            prompts,
            params,
            stream=stream,
            timeout=self.config.request_timeout,
            who=request.scope.get("pyllmlite.client", ""),
            arrival=request.scope.get("pyllmlite.arrival", time.monotonic()),
        )

    async def answer(
        self, generation: Generation, writer: Any, body: Sampling, request: Request
    ) -> Response:
        """The stream, or the whole answer."""
        # Also while a grammar is compiled, or all engines of a cluster are full.
        generation.watch(request.scope, request.receive)
        try:
            await generation.accepted()
            if not body.stream:
                return JSONResponse(await writer.whole())
        except BaseException:
            generation.close()
            raise
        finally:
            if not body.stream:
                generation.close()
        options = body.stream_options
        return EventStream(writer.events(bool(options and options.include_usage)), generation)


def make_app(service: Service) -> FastAPI:
    """The ASGI application; it ends the engine's process when it is shut down."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.client.connect()
        yield
        service.text.close()
        service.client.close()

    app = FastAPI(
        title="pyllmlite",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
    )
    _add_errors(app, service)
    _add_completions(app, service)
    _add_tokens(app, service)
    _add_state(app, service)
    app.add_middleware(
        Gate, config=service.config, note=lambda status: _refused(service, status)
    )
    if service.config.cors_origins:  # outside the gate: a preflight carries no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(service.config.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    return app


def _refused(service: Service, status: int) -> None:
    service.metrics.refused.labels(str(status)).inc()


def _add_errors(app: FastAPI, service: Service) -> None:
    def respond(error: ApiError) -> JSONResponse:
        _refused(service, error.status)
        return error_response(error)

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> Response:
        return respond(error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is no {request.method} {request.url.path[:200]}"
        headers = dict(error.headers or {})
        return respond(ApiError(error.status_code, message, headers=headers))

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part != "body")[:200]
        where = where.encode("utf-8", "replace").decode()
        message = f"{where}: {first['msg']}" if where else str(first["msg"])
        return respond(ApiError(400, message[:500], param=where or None))

    @app.exception_handler(Exception)
    async def on_bug(_: Request, error: Exception) -> Response:
        return respond(ApiError(500, "internal error"))


def _add_completions(app: FastAPI, service: Service) -> None:
    errors: dict[int | str, dict[str, Any]] = {
        400: {"description": "The request is wrong."},
        404: {"description": "No such model."},
        429: {"description": "The queue is full; see Retry-After."},
        503: {"description": "The engine is not there."},
    }

    @app.post("/v1/completions", responses=errors)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        params = completion_params(body)
        service.door.check(params.num_completions)
        given: list[Any] = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        if isinstance(given[0], int):
            given = [given]
        service.door.check(params.num_completions * len(given))
        prompts = [await service.text.prompt(prompt) for prompt in given]
        echoed: list[str | None] = [None] * len(prompts)
        first = [""] * len(prompts)
        if body.echo:
            detokenize = service.text.detokenize
            echoed = [p if isinstance(p, str) else await detokenize(p) for p in given]
            first = [await detokenize(ids[:1]) for ids in prompts]
            if body.stream and body.logprobs is not None:
                raise ApiError(400, "echo with logprobs cannot be streamed", param="echo")
        generation = service.start(prompts, params, bool(body.stream), request)
        writer = CompletionWriter(
            service.head("cmpl"), generation, echoed, first, body.max_tokens == 0
        )
        return await service.answer(generation, writer, body, request)

    @app.post("/v1/chat/completions", responses=errors)
    async def chat(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        params = chat_params(body)
        service.door.check(params.num_completions)
        tools = wanted_tools(body)
        await service.text.ready()
        if tools and not service.text.knows_tools():
            raise ApiError(
                400,
                f"the chat template of {service.name} knows no tools",
                param="tools",
                code="unsupported",
            )
        ids = await service.text.chat(body, tools, request.scope.get("pyllmlite.size", 0))
        if tools:
            params.skip_special_tokens = False  # the tags around calls may be special tokens
        generation = service.start([ids], params, bool(body.stream), request)
        writer = ChatWriter(service.head("chatcmpl"), generation, bool(tools))
        return await service.answer(generation, writer, body, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return _model(service)


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "pyllmlite",
        "max_model_len": service.client.info.get("max_model_len"),
    }


async def _tokens(
    ids: list[int], max_model_len: int, token: Callable[[int], str | None] | None
) -> AsyncIterator[str]:
    """JSON in pieces: millions of tokens at once would hold everybody up."""
    yield f'{{"count":{len(ids)},"max_model_len":{max_model_len},"tokens":['
    for start in range(0, len(ids), _PIECE):
        yield "," * (start > 0) + ",".join(map(str, ids[start : start + _PIECE]))
        await asyncio.sleep(0)
    if token is not None:
        yield '],"token_strs":['
        for start in range(0, len(ids), _PIECE):
            piece = json.dumps([token(id) for id in ids[start : start + _PIECE]])
            yield "," * (start > 0) + piece[1:-1]
            await asyncio.sleep(0)
    yield "]}"


def _add_tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        service.check_model(body.model)
        service.client.check()
        ids = await service.text.tokenize(body)
        token = service.text.tokenizer.token if body.return_token_strs else None
        pieces = _tokens(ids, service.client.info["max_model_len"], token)
        if len(ids) <= _PIECE:
            text = "".join([piece async for piece in pieces])
            return Response(text, media_type="application/json")
        return StreamingResponse(pieces, media_type="application/json")

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        service.check_model(body.model)
        service.client.check()
        return {"prompt": await service.text.detokenize(body.tokens)}


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses={503: {"description": "The engine has stopped."}})
    async def health() -> dict[str, str]:
        """Does the server live?  While the model is loaded it does."""
        if service.client.state == "dead":
            service.client.check()
        return {"status": service.client.state}

    @app.get("/ready", responses={503: {"description": "No requests are taken (yet)."}})
    async def ready() -> dict[str, str]:
        """Does it take requests?"""
        service.door.check(0)
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/stats")
    async def stats() -> dict[str, Any]:
        """What the page shows: figures of this moment and a map of the KV blocks."""
        found = await service.client.snapshot()
        info = service.client.info
        del found["t"], found["id"]
        return {
            **found,
            "model": service.name,
            "generated": service.metrics.generated,
            "max_num_seqs": info["max_num_seqs"],
            "max_waiting": service.config.max_waiting,
            "max_model_len": info["max_model_len"],
            "block_size": info["block_size"],
            "started": service.created,
        }

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=_PAGE_HEADERS)
