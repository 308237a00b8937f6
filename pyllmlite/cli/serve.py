"""``pyllmlite serve``: an OpenAI-compatible server."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pyllmlite.cli.options import ENGINE, shared


@shared(engine=ENGINE)
def serve(
    model: Annotated[
        str | None,
        typer.Argument(help="Alias, hub id or path.", show_default="smollm2-135m"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    served_model_name: Annotated[
        str | None, typer.Option(help="The model's name in the API.", show_default=False)
    ] = None,
    api_key_file: Annotated[
        str | None,
        typer.Option(
            help="API keys, one a line; also from PYLLMLITE_API_KEY. Without, all may use it.",
            show_default=False,
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin whose web pages may use the server; may be given more than once.",
            show_default=False,
        ),
    ] = None,
    max_waiting: Annotated[
        int, typer.Option(help="Sequences that may wait; beyond that, status 429.")
    ] = 256,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds that a request may take.")
    ] = 600.0,
    body_timeout: Annotated[
        float, typer.Option(help="Seconds for a request's headers, and for its body, to arrive.")
    ] = 20.0,
    drain_timeout: Annotated[
        float, typer.Option(help="Seconds that running requests get after SIGTERM.")
    ] = 30.0,
    max_body: Annotated[
        str, typer.Option(help="Size of a request's body, as 8MiB.")
    ] = "8MiB",
    access_log: Annotated[bool, typer.Option("--access-log", help="Log each request.")] = False,
    *,
    engine: dict[str, Any],
) -> None:
    """Serve a model over HTTP: OpenAI's API, and a page at /.

    Listens on this machine only unless --host says otherwise. SIGTERM lets what runs finish.
    """
    import logging

    from pyllmlite.core.config import EngineConfig, parse_bytes
    from pyllmlite.serve.server import run
    from pyllmlite.serve.settings import ServeConfig, read_api_keys

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    for name in ("pyllmlite", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.INFO)
    EngineConfig.from_kwargs(model=model, **engine)  # what is wrong is said before anything starts
    run(
        {"model": model, **engine},
        ServeConfig(
            host=host,
            port=port,
            served_model_name=served_model_name,
            api_keys=read_api_keys(api_key_file),
            cors_origins=tuple(cors_origin or ()),
            max_waiting=max_waiting,
            request_timeout=request_timeout,
            body_timeout=body_timeout,
            drain_timeout=drain_timeout,
            max_body=parse_bytes(max_body),
            access_log=access_log,
        ),
    )
